"""Trained networks applied to items, batch by batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from hqsearch.embedding.networks import StageNetwork

BATCH_MULTIPLE = 16
_BATCH = 2048
# Of images on a CPU: what a layer makes of them stays in its caches.
_CACHED_BATCH = 128


# Losses whose embedding has unit length.
UNIT_LOSSES = frozenset({"triplet", "proxy"})


def split_levels(outputs: Tensor, n_levels: int, branching_factor: int, loss: str) -> Tensor:
    """Level scores, (..., n_levels, d), of network outputs, (..., n_levels * d).

    Unit blocks for triplet; for proxy log-probabilities of a level's buckets, so that the score of a leaf is
    the logarithm of its probability.
    """
    scores = outputs.unflatten(-1, (n_levels, branching_factor))
    if loss == "triplet":
        return nn.functional.normalize(scores, dim=-1)
    return scores.log_softmax(-1) if loss == "proxy" else scores


def embed(network: StageNetwork, X: Tensor | np.ndarray, loss: str, rows: np.ndarray | None = None) -> Tensor:
    """Embedding of all items or those of `rows`, float32, (n_items, embedding_dim); see `UNIT_LOSSES`."""
    return as_embedding(infer(network, X, rows), loss)


def as_embedding(outputs: Tensor, loss: str) -> Tensor:
    """Embedding that network outputs stand for: unit rows for `UNIT_LOSSES`."""
    return nn.functional.normalize(outputs, dim=-1) if loss in UNIT_LOSSES else outputs


def level_scores(
    network: StageNetwork, X: Tensor | np.ndarray, loss: str, n_levels: int, branching_factor: int
) -> np.ndarray:
    """Level scores of all items, float32 array of shape (n_samples, n_levels, branching_factor)."""
    return split_levels(infer(network, X), n_levels, branching_factor, loss).cpu().numpy()


def inference_batch(X: Tensor | np.ndarray, device: torch.device) -> int:
    """How many items of X to run through a network at once on a device."""
    return _CACHED_BATCH if X.ndim > 2 and device.type == "cpu" else _BATCH


def infer(network: StageNetwork, X: Tensor | np.ndarray, rows: np.ndarray | None = None) -> Tensor:
    """Run `network`, which must be in eval mode, batch by batch on its device, on all items or these rows.

    Batches are padded to a multiple of `BATCH_MULTIPLE` items: matrix products of other heights may add up in
    another order, and an item's output should not depend on what it is asked together with.
    """
    device = next(network.parameters()).device
    size = inference_batch(X, device)
    with torch.inference_mode():
        asked = [slice(start, start + size) for start in range(0, len(X if rows is None else rows), size)]
        parts = asked if rows is None else [rows[part] for part in asked]
        return torch.cat([_padded(network, as_tensor(X[part], device)) for part in parts]).float()


def _padded(network: StageNetwork, x: Tensor) -> Tensor:
    n_missing = -len(x) % BATCH_MULTIPLE
    if n_missing == 0:
        return network(x)
    return network(torch.cat([x, x[:1].expand(n_missing, *x.shape[1:])]))[: len(x)]


def as_tensor(X: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Put X on the device; no copy where it is there already and may be written to."""
    if isinstance(X, np.ndarray):
        X = torch.from_numpy(np.require(X, requirements=["C", "W"]))
    return X.to(device)
