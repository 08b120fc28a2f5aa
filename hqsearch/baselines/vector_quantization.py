"""VQ: the nearest k-means cells are the code."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.utils._param_validation import Interval

from hqsearch.baselines.protocol import EmbeddingHashEncoder


class VectorQuantizationHashEncoder(EmbeddingHashEncoder):
    """Hash each item by the k-means cells nearest to its embedding ("VQ" in the papers).

    There is one level of `n_buckets` buckets, and a bucket's score is minus the squared Euclidean distance to
    its centroid. Centroids are fitted on the items of `fit` alone.

    Parameters
    ----------
    encoder : estimator or None, default=None
        Whose embedding is hashed, and ranks candidates. An estimator with `fit` and `embed` is cloned and
        fitted; wrapped in `sklearn.frozen.FrozenEstimator` a fitted one is used as it is, and `fit` needs no
        y. None is a `HierarchicalHashEncoder` with default parameters, of which only the metric stage is
        trained.
    n_buckets : int or None, default=None
        Cells. None takes as many as the embedding has dimensions, or as there are items where these are
        fewer; the other choice of the papers is `branching_factor**n_levels` of the codes compared with.
    sparsity : int, default=1
        Nearest cells that count, so buckets that an item lies in.
    random_state : int, RandomState instance or None, default=None
        Seed of k-means, and of the encoder unless that is frozen. None keeps the one that a given encoder
        has.

    Attributes
    ----------
    encoder_ : estimator
        The fitted encoder.
    cluster_centers_ : ndarray of shape (n_buckets, embedding_dim), dtype float32
        The centroids.
    n_levels : int
        1.
    branching_factor : int
        Number of cells.
    n_features_in_ : int
        `X.shape[1]` as seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features, where X has them.

    Warns
    -----
    ConvergenceWarning
        If there are fewer distinct vectors than cells: some cells are the same then, and of equal ones only
        the first is used for `sparsity=1`.

    Notes
    -----
    Level scores take `4 * n_buckets` bytes an item.

    References
    ----------
    The baseline "VQ" of Y. Jeong and H. O. Song, "Efficient end-to-end learning for quantizable
    representations", ICML 2018; with one cell an item, the inverted file of H. Jegou, M. Douze and C. Schmid,
    "Product quantization for nearest neighbor search", TPAMI 2011.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from hqsearch import HierarchicalHashEncoder
    >>> from hqsearch.baselines import VectorQuantizationHashEncoder
    >>> X, y = load_digits(return_X_y=True)
    >>> encoder = HierarchicalHashEncoder(metric_epochs=2, hash_epochs=0, random_state=0)
    >>> baseline = VectorQuantizationHashEncoder(encoder, n_buckets=20, random_state=0).fit(X[:500], y[:500])
    >>> baseline.level_scores(X[500:503]).shape
    (3, 1, 20)
    """

    _parameter_constraints: dict = {  # noqa: RUF012  scikit-learn's own form
        **EmbeddingHashEncoder._parameter_constraints,
        "n_buckets": [None, Interval(Integral, 1, None, closed="left")],
    }

    def __init__(
        self,
        encoder: Any = None,
        *,
        n_buckets: int | None = None,
        sparsity: int = 1,
        random_state: Any = None,
    ):
        self.encoder = encoder
        self.n_buckets = n_buckets
        self.sparsity = sparsity
        self.random_state = random_state

    def _fit_buckets(self, embedding: np.ndarray, seed: int) -> int:
        n_items, embedding_dim = embedding.shape
        n_buckets = min(embedding_dim, n_items) if self.n_buckets is None else self.n_buckets
        if n_buckets > n_items:
            raise ValueError(
                f"Expected n_buckets <= n_samples, but n_buckets = {n_buckets}, n_samples = {n_items}."
            )
        # Threads add up in any order; in float64 that leaves no trace in float32 centroids.
        k_means = KMeans(n_buckets, n_init=1, random_state=seed).fit(embedding.astype(np.float64))
        self.cluster_centers_ = k_means.cluster_centers_.astype(np.float32)
        return n_buckets

    def _score_buckets(self, embedding: np.ndarray) -> np.ndarray:
        return -euclidean_distances(embedding, self.cluster_centers_, squared=True)[:, None, :]
