"""An embedding out of two layers: the trained one, and the one below, which knows more of other classes."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from torch import Tensor

from hqsearch.embedding.inference import infer
from hqsearch.embedding.networks import EmbeddingNetwork, StageNetwork, side_by_side

# Principal axes change little with more items than this.
_MOST_ITEMS = 8192


class _SideBySide(StageNetwork):
    """A network whose outputs are those of both layers."""

    unit: bool

    def output(self, hidden: Tensor) -> Tensor:
        return side_by_side(self.head(hidden), hidden, unit=self.unit)


def with_hidden_layer(
    network: StageNetwork, X: np.ndarray, train: np.ndarray, *, weight: float, unit: bool, seed: int
) -> EmbeddingNetwork:
    """Join a trained embedding with the layer below, in as many numbers as the embedding has.

    Both layers side by side, the lower one scaled to `weight` times the embedding's length, are projected to
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
        Length of the lower layer, in root mean squares of the embedding's.
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
    if len(train) > _MOST_ITEMS:
        train = np.sort(rng.choice(train, _MOST_ITEMS, replace=False))
    joined = _SideBySide(network.standardize, network.trunk, network.head).eval()
    joined.unit = unit
    items = infer(joined, X[train]).cpu().numpy().astype(np.float64)
    n_outputs = network.head.out_features
    # Of both layers' columns.
    scales = np.ones(items.shape[1])
    scales[n_outputs:] = weight * np.sqrt((items[:, :n_outputs] ** 2).sum(1).mean())
    search = TruncatedSVD(n_outputs, random_state=int(rng.integers(np.iinfo(np.int32).max)))
    found = search.fit(items * scales).components_.T
    # Fewer items have fewer axes.
    axes = np.zeros((items.shape[1], n_outputs))
    axes[:, : found.shape[1]] = found
    left, _, right = np.linalg.svd(axes[:n_outputs].T)
    projection = torch.from_numpy((scales[:, None] * axes @ left @ right).astype(np.float32))
    device = network.head.weight.device
    return EmbeddingNetwork(
        network.standardize, network.trunk, network.head, projection.to(device), unit=unit
    ).eval()
