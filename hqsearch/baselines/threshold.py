"""Th: the largest entries of the embedding are the code."""

from __future__ import annotations

from typing import Any

import numpy as np

from hqsearch.baselines.protocol import EmbeddingHashEncoder


class ThresholdHashEncoder(EmbeddingHashEncoder):
    """Hash each item by the indices of the largest entries of its embedding ("Th" in the papers).

    There is one level of `embedding_dim` buckets, and a bucket's score is the entry itself. Nothing is
    learned but the embedding.

    Parameters
    ----------
    encoder : estimator or None, default=None
        Whose embedding is hashed, and ranks candidates. An estimator with `fit` and `embed` is cloned and
        fitted; wrapped in `sklearn.frozen.FrozenEstimator` a fitted one is used as it is, and `fit` needs no
        y. None is a `HierarchicalHashEncoder` with default parameters, of which only the metric stage is
        trained.
    sparsity : int, default=1
        Entries that count, so buckets that an item lies in.
    random_state : int, RandomState instance or None, default=None
        Seed of the encoder, unless that is frozen. None keeps the one that a given encoder has.

    Attributes
    ----------
    encoder_ : estimator
        The fitted encoder.
    n_levels : int
        1.
    branching_factor : int
        Length of an embedding vector.
    n_features_in_ : int
        `X.shape[1]` as seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features, where X has them.

    References
    ----------
    The baseline "Th" of Y. Jeong and H. O. Song, "Efficient end-to-end learning for quantizable
    representations", ICML 2018.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from hqsearch import HierarchicalHashEncoder
    >>> from hqsearch.baselines import ThresholdHashEncoder
    >>> X, y = load_digits(return_X_y=True)
    >>> encoder = HierarchicalHashEncoder(metric_epochs=2, hash_epochs=0, random_state=0)
    >>> baseline = ThresholdHashEncoder(encoder, sparsity=2).fit(X[:500], y[:500])
    >>> codes = baseline.encode(X[500:503])
    >>> bool((codes[:, 0] == baseline.embed(X[500:503]).argmax(1)).all())
    True
    """

    def __init__(self, encoder: Any = None, *, sparsity: int = 1, random_state: Any = None):
        self.encoder = encoder
        self.sparsity = sparsity
        self.random_state = random_state

    def _fit_buckets(self, embedding: np.ndarray, seed: int) -> int:
        return embedding.shape[1]

    def _score_buckets(self, embedding: np.ndarray) -> np.ndarray:
        return embedding[:, None, :]
