"""Classes parted into clusters of near items, for codes finer than the labels."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.cluster.vq import kmeans2
from sklearn.cluster import kmeans_plusplus

# A cluster of fewer items is hardly learned.
ITEMS_PER_CLUSTER = 8
_ROUNDS = 25


def part_classes(
    embedding: np.ndarray, y: np.ndarray, train: np.ndarray, n_clusters: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Part each class's training items into clusters by k-means.

    Parameters
    ----------
    embedding : ndarray of shape (n_samples, embedding_dim), dtype float32
        Of all items.
    y : ndarray of shape (n_samples,), dtype int64
        Class indices, 0 to n_classes - 1.
    train : ndarray of int64
        Positions of the training items, of which each class has at least one.
    n_clusters : int
        Most clusters of a class; there is at most one for each `ITEMS_PER_CLUSTER` items.
    seed : int
        Of the first centres.

    Returns
    -------
    clusters : ndarray of shape (n_samples,), dtype int64
        Cluster indices, those of a class next to each other and none empty. Items that are not trained on are
        in the first one of their class.
    class_of : ndarray of shape (n_all_clusters,), dtype int64
        Class of each cluster.
    """
    random_state = np.random.RandomState(seed)
    clusters = np.empty(len(y), dtype=np.int64)
    class_of: list[int] = []
    for label in range(int(y.max()) + 1):
        clusters[y == label] = len(class_of)
        members = train[y[train] == label]
        k = min(n_clusters, len(members) // ITEMS_PER_CLUSTER)
        parts = _k_means(embedding[members], k, random_state) if k > 1 else np.zeros(len(members), np.int64)
        clusters[members] = len(class_of) + parts
        class_of += [label] * (int(parts.max()) + 1)
    return clusters, np.array(class_of, dtype=np.int64)


def _k_means(rows: np.ndarray, k: int, random_state: np.random.RandomState) -> np.ndarray:
    """Cluster of each row, 0 to at most k - 1, none empty. On one thread, so always the same."""
    centres, _ = kmeans_plusplus(rows, k, random_state=random_state)
    with warnings.catch_warnings():
        # Of equal rows some clusters stay empty.
        warnings.simplefilter("ignore", UserWarning)
        _, labels = kmeans2(rows, centres, iter=_ROUNDS, minit="matrix")
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)
