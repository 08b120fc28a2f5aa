"""What held-out items tell: how far a query has to look, and which items are of other classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from sklearn.metrics.pairwise import euclidean_distances

from hqsearch.items import Described, FittedItems
from hqsearch.search import LeafTable

# Ascending; the first one opens the nearest leaf alone.
EPSILONS = (0.0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4)
# Items and queries that are looked at.
MOST_ITEMS, MOST_QUERIES = 16384, 2048
# Neighbours whose labels count, and standard errors that a difference may be below zero; a single query, too.
_KS, _SLACK = (1, 16), 0.5


@dataclass(frozen=True)
class Calibration:
    """What an encoder keeps of its held-out items.

    Attributes
    ----------
    score_gap : tuple of float or None
        `mean_score_gap` of theirs; None where nobody asked.
    distance_ratio : tuple of float or None
        `mean_distance_ratio` of theirs.
    class_means : ndarray of shape (n_classes, embedding_dim), dtype float32, or None
        That it is of.
    epsilon : float
        `least_epsilon`.
    """

    score_gap: tuple[float, float] | None = None
    distance_ratio: tuple[float, float] | None = None
    class_means: np.ndarray | None = None
    epsilon: float = 0.0


def class_means_of(embedding: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean embedding of each class.

    Parameters
    ----------
    embedding : ndarray of shape (n_items, embedding_dim)
        Items.
    y : ndarray of shape (n_items,), dtype int64
        Their classes, 0 to n_classes - 1, none of them empty.

    Returns
    -------
    ndarray of shape (n_classes, embedding_dim), dtype float32
    """
    order = np.argsort(y, kind="stable")
    counts = np.bincount(y)
    means = [part.mean(0, dtype=np.float64) for part in np.split(embedding[order], np.cumsum(counts)[:-1])]
    return np.array(means, dtype=np.float32)


def mean_distance_ratio(embedding: np.ndarray, class_means: np.ndarray) -> tuple[float, float]:
    """Mean ratio of the distances to the nearest and the second nearest class, and its standard error.

    Items of one of the classes are near its mean and far from all others; items of other classes lie between
    them.

    Parameters
    ----------
    embedding : ndarray of shape (n_items, embedding_dim)
        At least two items.
    class_means : ndarray of shape (n_classes, embedding_dim)
        Of at least two classes.

    Returns
    -------
    mean, standard_error : float
        Of ratios from 0 to 1.
    """
    nearest = np.partition(euclidean_distances(embedding, class_means), 1, axis=1)[:, :2].astype(np.float64)
    ratios = nearest[:, 0] / np.maximum(nearest[:, 1], np.finfo(np.float64).tiny)
    return float(ratios.mean()), float(ratios.std(ddof=1)) / math.sqrt(len(ratios))


def least_epsilon(
    gallery: Described,
    gallery_y: np.ndarray,
    queries: Described,
    query_y: np.ndarray,
    *,
    branching_factor: int,
    n_levels: int,
    n_jobs: int | None = None,
) -> float:
    """Find the least epsilon with which searching is as precise as exhaustive search, as far as it is cheap.

    Parameters
    ----------
    gallery, queries : tuple of ndarray
        Embedding, level scores and codes, as an encoder's `describe` gives them.
    gallery_y, query_y : ndarray of int64
        Their classes.
    branching_factor, n_levels : int
        Of the codes.
    n_jobs : int or None, default=None
        Threads, as in joblib.

    Returns
    -------
    float
        One of `EPSILONS`: the first whose precision at 1 and at 16 is that of exhaustive search of the same
        embedding or more, half a standard error of their difference or one query aside. Where none is, or
        only at a speed-up below the number of classes when one neighbour is asked for, the largest that is
        not as slow as that. 0 where leaves have no centroids.
    """
    items = FittedItems.from_blocks(
        [gallery], branching_factor=branching_factor, n_levels=n_levels, listing="centroids", n_jobs=n_jobs
    )
    if items.centroids is None:
        return EPSILONS[0]
    ks = sorted({min(k, len(gallery_y)) for k in _KS})
    is_right = gallery_y[_exhaustive(gallery[0], queries[0], ks[-1], n_jobs)] == query_y[:, None]
    n_classes = len(np.unique(gallery_y))
    chosen = EPSILONS[0]
    for epsilon in EPSILONS:
        results = {k: items.search(queries, k, epsilon=epsilon, n_jobs=n_jobs) for k in ks}
        if epsilon and results[ks[0]].stats.suf() < n_classes:
            break
        chosen = epsilon
        if all(
            _is_as_precise(gallery_y[result.positions] == query_y[:, None], is_right[:, :k])
            for k, result in results.items()
        ):
            break
    return chosen


def _exhaustive(gallery: np.ndarray, queries: np.ndarray, k: int, n_jobs: int | None) -> np.ndarray:
    """Positions of the nearest items of all, ties as an index breaks them: a table of one leaf."""
    (n_items, _), n_queries = gallery.shape, len(queries)
    root = np.zeros((n_items, 1), dtype=np.int64)
    table = LeafTable.build(gallery, root, branching_factor=1, n_levels=1)
    no_scores = np.zeros((n_queries, 1, 1), dtype=np.float32)
    code = np.zeros((n_queries, 1), dtype=np.int64)
    return table.search(queries, no_scores, code, k, n_jobs=n_jobs).positions


def _is_as_precise(found: np.ndarray, exhaustive: np.ndarray) -> bool:
    """Compare query by query which neighbours are of its class; (n_queries, k) each."""
    gaps = found.mean(1) - exhaustive.mean(1)
    return bool(gaps.mean() >= -max(_SLACK * gaps.std() / math.sqrt(len(gaps)), 1 / len(gaps)))
