"""Level scores -> vectors of unit length, side by side with embeddings in a common unit."""

from __future__ import annotations

import numpy as np
from numba import njit

# The inverse of a smaller number is infinite.
_LEAST = np.float32(1e-36)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def write_directions(level_scores, length, embedding, scale, out):
    """Write each item's level scores, centred at each level and of the given length, then its embedding.

    Scores that are all equal at every level, or nearly, become zeros. One that is not finite makes its row
    NaN.

    Parameters
    ----------
    level_scores : ndarray of shape (n_items, n_levels, d), dtype float32
        Scores.
    length : float
        Length of the first `n_levels * d` numbers of a row.
    embedding : ndarray of shape (n_items, n_features), dtype float32
        What follows, times `scale`; it may have no columns.
    scale : float
        Factor.
    out : ndarray of shape (n_items, >= n_levels * d + n_features), dtype float32
        Written; what lies beyond stays.
    """
    n_items, n_levels, d = level_scores.shape
    for item in range(n_items):
        row = out[item]
        largest = np.float32(0)
        for level in range(n_levels):
            scores = level_scores[item, level]
            # In float64, where no sum of float32 overflows; and halves, because a difference might.
            total = 0.0
            for bucket in range(d):
                half = scores[bucket] * np.float32(0.5)
                row[level * d + bucket] = half
                total += np.float64(half)
            mean = np.float32(total / d)
            for bucket in range(d):
                value = row[level * d + bucket] - mean
                row[level * d + bucket] = value
                largest = max(largest, abs(value))
        # Scaled by the largest first: squares of large numbers would overflow.
        inverse = np.float32(1) / largest if largest > _LEAST else np.float32(0)
        squares = np.float32(0)
        for i in range(n_levels * d):
            value = row[i] * inverse
            squares += value * value
            row[i] = value
        factor = np.float32(length / np.sqrt(np.float64(squares))) if largest > _LEAST else np.float32(0)
        for i in range(n_levels * d):
            row[i] *= factor
        for j in range(embedding.shape[1]):
            row[n_levels * d + j] = embedding[item, j] * np.float32(scale)
