"""Items listed in the leaves of the nearest centroids, which start as the leaves of their codes."""

from __future__ import annotations

import math

import numpy as np

from hqsearch.centroids import MOST_LEAVES, LeafCentroids

# How often items and centroids take turns to move, and the share of the items that may move in the last turn.
N_ROUNDS, SETTLED_SHARE = 5, 0.005
# What a leaf of e times the mean size gains in squared distance while centroids move, as a share of how far
# its items are. Large leaves shrink; from about 0.2 on the first of them lose all their items.
CROWDING = 0.1
# Mean size below which no leaf is parted: a query wants its neighbours from the first that it opens.
FEWEST_ITEMS = 48
# A leaf of fewer items, as a share of the mean, is of items whose codes went wrong. It is a share of
# `FEWEST_ITEMS` at most, because many small classes beside a large one are no mistake.
TINY_SHARE = 0.25


def wanted_leaves(n_items: int) -> int:
    """Leaves to list items in, about, where their codes have no more: as an inverted file has lists."""
    return max(1, min(2 * math.isqrt(n_items), n_items // FEWEST_ITEMS))


def list_by_centroids(
    centroids: LeafCentroids,
    embedding: np.ndarray,
    directions: np.ndarray,
    codes: np.ndarray,
    n_jobs: int | None = None,
) -> tuple[LeafCentroids, np.ndarray]:
    """List items in their nearest leaves instead of those of their codes, as k-means does.

    The leaves of the codes are where it starts, but for tiny ones, and with large ones parted: those of more
    items than `wanted_leaves` would hold of equal size, into as many as that. Then items move to the nearest
    centroids, centroids to the mean of their items, up to `N_ROUNDS` times; a leaf that loses all its items
    then is gone. From the second time on leaves of more items than the mean are a little farther, which makes
    sizes more alike: a query looks at fewer items. In the end every item goes where a query like it is sent.

    Parameters
    ----------
    centroids : LeafCentroids
        Of the leaves of the items' codes.
    embedding : ndarray of shape (n_items, embedding_dim), dtype float32
        The items that these centroids were made of.
    directions : ndarray of shape (n_items, n_levels * branching_factor), dtype float16
        Their level scores, see `CentroidSums`.
    codes : ndarray of shape (n_items, sparsity), dtype int64
        Their leaves.
    n_jobs : int or None, default=None
        Threads, as in joblib.

    Returns
    -------
    centroids : LeafCentroids
        Of the leaves as they are then.
    codes : ndarray of shape (n_items, sparsity), dtype int64
        The leaves that each item is listed in, nearest first.
    """
    # Of unit length already, so as level scores they come to the same directions.
    level_scores = directions.reshape(-1, centroids.n_levels, centroids.branching_factor)
    sparsity = codes.shape[1]
    centroids = centroids.of_items(embedding, directions, codes)
    rows = centroids.rows_of(codes)
    sizes = np.bincount(rows.ravel(), minlength=len(centroids.leaf_ids))
    tiny = sizes < TINY_SHARE * min(sizes.mean(), FEWEST_ITEMS)
    astray = tiny[rows].any(1)
    if astray.any() and np.count_nonzero(~tiny) >= sparsity:
        codes = codes.copy()
        found = centroids.nearest(
            embedding[astray], level_scores[astray], sparsity, allowed=~tiny, n_jobs=n_jobs
        )
        codes[astray] = centroids.leaf_ids[found]
        centroids = centroids.of_items(embedding, directions, codes)
    centroids, codes = _part_large(centroids, embedding, directions, codes)
    moving = centroids
    for _ in range(N_ROUNDS):
        listed, distances = moving.list_items(embedding, level_scores, sparsity, n_jobs)
        n_moved = np.count_nonzero((np.sort(listed, 1) != np.sort(codes, 1)).any(1))
        codes, squared = listed, moving.squared_distances(listed[:, 0], distances[:, 0])
        centroids = centroids.of_items(embedding, directions, codes)
        if n_moved <= SETTLED_SHARE * len(codes):
            break
        moving = centroids.crowded(codes, squared, CROWDING)
    # Where queries will look for them: the centroids stay, and no leaf is farther than it is.
    return centroids, centroids.list_items(embedding, level_scores, sparsity, n_jobs)[0]


def _part_large(
    centroids: LeafCentroids, embedding: np.ndarray, directions: np.ndarray, codes: np.ndarray
) -> tuple[LeafCentroids, np.ndarray]:
    """Part the leaves that hold too many of these items; return the items' leaves of the deeper tree too."""
    rows = centroids.rows_of(codes.ravel())
    sizes = np.bincount(rows, minlength=len(centroids.leaf_ids))
    n_parts = _n_parts(sizes, wanted_leaves(len(codes)) / codes.size)
    n_part_levels = centroids.levels_for(int(n_parts.max()))
    most_parts = centroids.branching_factor**n_part_levels
    n_parts = np.minimum(n_parts, most_parts)
    # Always the same: an index's seed is its encoder's, and the same items should be in the same leaves.
    rng = np.random.default_rng(0)
    items = np.split(np.argsort(rows, kind="stable") // codes.shape[1], np.cumsum(sizes)[:-1])
    starts = [rng.choice(items[row], n_parts[row], replace=False) for row in np.flatnonzero(n_parts > 1)]
    first = np.concatenate([*starts, np.empty(0, dtype=np.int64)])
    parted = centroids.part(n_part_levels, n_parts, embedding[first], directions[first])
    return parted, codes.astype(np.int64) * most_parts


def _n_parts(sizes: np.ndarray, leaves_per_item: float) -> np.ndarray:
    """Into how many leaves to part each of these, so that there are at most `MOST_LEAVES` (int64)."""
    while True:
        n_parts = np.maximum(np.rint(sizes * leaves_per_item).astype(np.int64), 1)
        if n_parts.sum() <= MOST_LEAVES or n_parts.max() == 1:
            return n_parts
        leaves_per_item *= 0.9
