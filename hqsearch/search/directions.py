"""Level scores as directions: centred at each level, of unit length, so that no unit of theirs counts."""

from __future__ import annotations

import numpy as np

from hqsearch.search.checks import readable


def level_directions(
    level_scores: np.ndarray,
    embedding: np.ndarray | None = None,
    *,
    length: float = 1.0,
    scale: float = 1.0,
    n_more: int = 0,
) -> np.ndarray:
    """Centre level scores at each level and give them one length; put embeddings behind them.

    Parameters
    ----------
    level_scores : ndarray of shape (n_items, n_levels, d)
        Scores. Where all of a level are equal, at every level, the direction is zero.
    embedding : ndarray of shape (n_items, n_features), default=None
        What follows, if anything.
    length : float, default=1.0
        Length of a direction.
    scale : float, default=1.0
        Factor of the embedding.
    n_more : int, default=0
        Zeros at the end of each row.

    Returns
    -------
    ndarray of shape (n_items, n_levels * d + n_features + n_more), dtype float32
        A row for each item; of NaN where a score is not finite.
    """
    from hqsearch.search.direction_kernel import write_directions

    level_scores = readable(np.ascontiguousarray(level_scores, dtype=np.float32))
    n_items, n_levels, d = level_scores.shape
    if embedding is None:
        embedding = np.empty((n_items, 0), dtype=np.float32)
    embedding = readable(np.ascontiguousarray(embedding, dtype=np.float32))
    out = np.zeros((n_items, n_levels * d + embedding.shape[1] + n_more), dtype=np.float32)
    write_directions(level_scores, length, embedding, scale, out)
    return out
