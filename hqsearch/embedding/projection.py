"""A trained embedding joined with the hidden layer below it, which knows more of other classes."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from hqsearch.embedding.inference import infer
from hqsearch.embedding.networks import EmbeddingNetwork, StageNetwork, side_by_side

# Principal axes change little with more items than this; of very wide layers fewer have to do.
_MOST_ITEMS, _MOST_NUMBERS = 8192, 2**24
# Of the largest singular value, at which an axis is rounding.
_LEAST_VALUE = 1e-5


class _SideBySide(StageNetwork):
    """A network whose outputs are those of both layers."""

    def __init__(self, network: StageNetwork, *, unit: bool):
        super().__init__(network.standardize, network.trunk, network.head)
        self.unit = unit

    def output(self, hidden: Tensor) -> Tensor:
        return side_by_side(self.head(hidden), hidden, unit=self.unit)


def with_hidden_layer(
    network: StageNetwork, X: np.ndarray, train: np.ndarray, *, weight: float, unit: bool, seed: int
) -> EmbeddingNetwork:
    """Join a trained embedding with the hidden layer, in as many numbers as the embedding has.

    Both layers side by side, the hidden one scaled to `weight` times the embedding's length, are projected to
    their principal axes: those of most squared length, so that distances change least. The axes are
    then turned as near to the trained embedding's own as they go; with a weight of 0 they are these.

    Parameters
    ----------
    network : StageNetwork
        Trained, in eval mode.
    X : ndarray of shape (n_samples, *input_shape)
        All items.
    train : ndarray of int64
        Positions of those that it was trained on.
    weight : float
        Length of the hidden layer, in root mean squares of the embedding's.
    unit : bool
        Whether the trained embedding is scaled to unit length.
    seed : int
        Of the choice among many items, and of the search for the axes.

    Returns
    -------
    EmbeddingNetwork
        On the device of `network`, whose layers it shares.
    """
    rng = np.random.default_rng(seed)
    n_outputs, n_hidden = network.head.out_features, network.head.in_features
    n_items = min(_MOST_ITEMS, max(_MOST_NUMBERS // (n_outputs + n_hidden), n_outputs))
    if len(train) > n_items:
        train = np.sort(rng.choice(train, n_items, replace=False))
    items = infer(_SideBySide(network, unit=unit).eval(), X[train]).cpu().numpy()
    # Of both layers' columns.
    scales = np.ones(n_outputs + n_hidden, dtype=np.float32)
    scales[n_outputs:] = weight * np.sqrt((items[:, :n_outputs] ** 2).sum(1).mean())
    axes = scales[:, None] * _principal_axes(items * scales, n_outputs, int(rng.integers(2**31)))
    device = network.head.weight.device
    return EmbeddingNetwork(
        network.standardize, network.trunk, network.head, torch.from_numpy(axes).to(device), unit=unit
    ).eval()


def _principal_axes(items: np.ndarray, n_axes: int, seed: int) -> np.ndarray:
    """Orthonormal axes of most squared length, float32 (n_numbers, n_axes), near those of the first numbers.

    Where items span fewer dimensions, the others are filled up by what they leave of the first numbers.
    """
    _, values, found = randomized_svd(items, n_axes, n_iter=5, random_state=seed)
    axes = found[values > _LEAST_VALUE * values.max(initial=0)].T.astype(np.float64)
    left_over = np.eye(len(axes), n_axes) - axes @ axes[:n_axes].T
    axes = np.hstack([axes, np.linalg.svd(left_over, full_matrices=False)[0][:, : n_axes - axes.shape[1]]])
    # The rotation that brings them nearest to the first numbers' own.
    left, _, right = np.linalg.svd(axes[:n_axes].T)
    return (axes @ left @ right).astype(np.float32)
