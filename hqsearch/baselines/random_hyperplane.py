"""LSH: the signs of random projections are the code."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from sklearn.utils._param_validation import Interval

from hqsearch.baselines.protocol import EmbeddingHashEncoder
from hqsearch.codes import greedy_codes

# Leaf ids are int64, and the table asks for room above them.
MAX_BITS = 62


class RandomHyperplaneHashEncoder(EmbeddingHashEncoder):
    """Hash each item by the sides of random hyperplanes on which its embedding lies ("LSH" in the papers).

    There are `n_bits` levels of two buckets, so `2**n_bits` leaves. The scores of a level are minus and plus
    the projection on its hyperplane's normal vector, so that a leaf's score falls, from the item's own leaf
    on, by twice the projections of the bits that are flipped. With `sparsity=s` an item lies in the s best
    leaves by that score: its own, then mostly those at Hamming distance 1, nearest hyperplane first, and
    farther ones where several near hyperplanes cost less than one far one. An index goes on in that order.

    Parameters
    ----------
    encoder : estimator or None, default=None
        Whose embedding is hashed, and ranks candidates. An estimator with `fit` and `embed` is cloned and
        fitted; wrapped in `sklearn.frozen.FrozenEstimator` a fitted one is used as it is, and `fit` needs no
        y. None is a `HierarchicalHashEncoder` with default parameters, of which only the metric stage is
        trained.
    n_bits : int, default=12
        Hyperplanes, at most 62. The default makes as many leaves as two levels of 64 buckets.
    sparsity : int, default=1
        Leaves that an item lies in.
    random_state : int, RandomState instance or None, default=None
        Seed of the hyperplanes, and of the encoder unless that is frozen. None keeps the one that a given
        encoder has.

    Attributes
    ----------
    encoder_ : estimator
        The fitted encoder.
    center_ : ndarray of shape (embedding_dim,), dtype float32
        Mean of the fitted items, through which all hyperplanes go, so that they part the items wherever the
        embedding puts them.
    hyperplanes_ : ndarray of shape (embedding_dim, n_bits), dtype float32
        Normal vectors, from the standard normal distribution.
    n_levels : int
        `n_bits`.
    branching_factor : int
        2.
    n_features_in_ : int
        `X.shape[1]` as seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features, where X has them.

    References
    ----------
    M. Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002. Q. Lv, W. Josephson,
    Z. Wang, M. Charikar and K. Li, "Multi-probe LSH: efficient indexing for high-dimensional similarity
    search", VLDB 2007.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from hqsearch import HierarchicalHashEncoder
    >>> from hqsearch.baselines import RandomHyperplaneHashEncoder
    >>> X, y = load_digits(return_X_y=True)
    >>> encoder = HierarchicalHashEncoder(metric_epochs=2, hash_epochs=0, random_state=0)
    >>> baseline = RandomHyperplaneHashEncoder(encoder, n_bits=6, random_state=0).fit(X[:500], y[:500])
    >>> baseline.transform(X[500:503]).shape
    (3, 64)
    """

    _parameter_constraints: dict = {  # noqa: RUF012  scikit-learn's own form
        **EmbeddingHashEncoder._parameter_constraints,
        "n_bits": [Interval(Integral, 1, MAX_BITS, closed="both")],
    }

    def __init__(self, encoder: Any = None, *, n_bits: int = 12, sparsity: int = 1, random_state: Any = None):
        self.encoder = encoder
        self.n_bits = n_bits
        self.sparsity = sparsity
        self.random_state = random_state

    @property
    def n_levels(self) -> int:  # type: ignore[override]
        """Levels of the codes: one for each hyperplane."""
        # Python's numbers: powers of numpy's overflow.
        return int(self.n_bits)

    def _fit_buckets(self, embedding: np.ndarray, seed: int) -> int:
        rng = np.random.default_rng(seed)
        self.center_ = embedding.mean(0, dtype=np.float64).astype(np.float32)
        self.hyperplanes_ = rng.standard_normal((embedding.shape[1], self.n_bits), dtype=np.float32)
        return 2

    def _score_buckets(self, embedding: np.ndarray) -> np.ndarray:
        # In float64: a side should not depend on how many items are projected together.
        projections = (embedding - self.center_) @ self.hyperplanes_.astype(np.float64)
        return np.stack([-projections, projections], axis=2).astype(np.float32)

    def _codes(self, level_scores: np.ndarray) -> np.ndarray:
        return best_leaves(level_scores, self.sparsity)


def best_leaves(level_scores: np.ndarray, n_leaves: int) -> np.ndarray:
    """Leaves with the highest sums of level scores, where a level has two buckets of opposite score.

    Parameters
    ----------
    level_scores : ndarray of shape (n_samples, n_levels, 2)
        Scores; those of the second bucket are minus those of the first.
    n_leaves : int
        Leaves of each item, at most `2**n_levels`.

    Returns
    -------
    ndarray of shape (n_samples, n_leaves), dtype int64
        Leaf ids, best first. Of equal leaves that with fewer flipped bits, or with less of the narrow ones
        flipped, comes first.

    Raises
    ------
    ValueError
        If there are fewer leaves.
    """
    n_levels = level_scores.shape[1]
    if n_leaves > 2**n_levels:
        raise ValueError(f"Expected sparsity <= 2**n_bits, but sparsity = {n_leaves}, n_bits = {n_levels}.")
    # A bit belongs to the s best leaves only if fewer than s - 1 others are as cheap to flip: each of those
    # alone, and no bit at all, make a better leaf.
    margins = np.abs(level_scores[:, :, 1]).astype(np.float64)
    narrow = np.argsort(margins, axis=1, kind="stable")[:, : n_leaves - 1]
    costs: np.ndarray = np.zeros((len(level_scores), 1))
    flips: np.ndarray = np.zeros((len(level_scores), 1), dtype=np.int64)
    for level in narrow.T:
        margin = np.take_along_axis(margins, level[:, None], axis=1)
        bit = np.left_shift(np.int64(1), n_levels - 1 - level)[:, None]
        costs = np.hstack([costs, costs + margin])
        flips = np.hstack([flips, flips ^ bit])
        cheapest = np.argsort(costs, axis=1, kind="stable")[:, :n_leaves]
        costs, flips = (np.take_along_axis(each, cheapest, axis=1) for each in (costs, flips))
    return greedy_codes(level_scores, 1) ^ flips
