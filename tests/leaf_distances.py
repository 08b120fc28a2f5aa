"""Items with codes, and the leaves nearest to queries by the definition, for several tests."""

import numpy as np

from hqsearch.centroids import PRIOR, CentroidSums
from hqsearch.codes import greedy_codes
from hqsearch.items import FittedItems

D, LEVELS = 5, 2


def describe(n_items, seed, sparsity=1, dim=3):
    """Random embeddings and level scores, and the codes of these."""
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(n_items, dim)).astype(np.float32)
    level_scores = rng.normal(size=(n_items, LEVELS, D)).astype(np.float32)
    return embedding, level_scores, greedy_codes(level_scores, sparsity)


def centroids_of(*blocks, branching_factor=D, n_levels=LEVELS):
    sums = CentroidSums(branching_factor=branching_factor, n_levels=n_levels)
    for block in blocks:
        sums.add(*block)
    return sums.finish()


def unit(scores):
    centred = scores.astype(np.float64) - scores.astype(np.float64).mean(-1, keepdims=True)
    flat = centred.reshape(len(scores), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def distances_by_definition(fitted, queries, prior=PRIOR, weight=1.0, code_of=None):
    """Squared distances, (n_queries, n_leaves), and the leaves in ascending order.

    `weight` is that of the code's distance, `code_of` the leaf whose code each leaf has.
    """
    embedding, level_scores, codes = fitted
    leaf_ids = np.unique(codes)
    deviation = embedding - embedding.mean(0)
    scale = 1 / np.sqrt((deviation.astype(np.float64) ** 2).sum(1).mean())
    total = []
    d = level_scores.shape[2]
    for leaf in leaf_ids:
        members = (codes == leaf).any(1)
        own = leaf if code_of is None else code_of[leaf]
        code = np.zeros((1, LEVELS, d))
        code[0, 0, own // d] = code[0, 1, own % d] = 1
        terms = [
            (weight, unit(queries[1]), unit(code)[0]),
            (2 - weight, unit(queries[1]), unit(level_scores[members]).mean(0)),
            (1, queries[0] * scale, embedding[members].mean(0) * scale),
        ]
        total.append(sum(w * ((ours - theirs) ** 2).sum(1) for w, ours, theirs in terms))
    sizes = np.array([(codes == leaf).sum() for leaf in leaf_ids])
    return np.array(total).T + prior * np.log(sizes.max() / sizes), leaf_ids


def search_by_definition(fitted, queries, live, k, n_probes, exclude=None, epsilon=0.0):
    """Positions of the k nearest live items in the nearest leaves that hold live ones."""
    distances, leaf_ids = distances_by_definition(fitted, queries)
    found, n_candidates = [], 0
    exclude = np.full(len(distances), -1) if exclude is None else exclude
    for query, row, own in zip(queries[0], distances, exclude, strict=True):
        candidates, opened, nearest = np.zeros(len(live) + 1, dtype=bool), 0, np.inf
        for i in np.argsort(row, kind="stable"):
            here = (fitted[2] == leaf_ids[i]).any(1) & live
            nearest = min(nearest, np.sqrt(row[i]) if here.any() else np.inf)
            is_near = np.sqrt(row[i]) <= (1 + epsilon) * nearest
            if opened >= n_probes and not is_near and candidates.sum() >= k:
                break
            candidates[:-1] |= here
            candidates[own] = False
            opened += here.any()
        positions = np.flatnonzero(candidates)
        n_candidates += len(positions)
        gaps = ((fitted[0][positions] - query) ** 2).sum(1)
        found.append(positions[np.argsort(gaps, kind="stable")[:k]])
    return np.array(found), n_candidates


def refined(fitted, branching_factor=D):
    return FittedItems.from_blocks(
        [tuple(a[i : i + 70] for a in fitted) for i in range(0, len(fitted[0]), 70)],
        branching_factor=branching_factor, n_levels=LEVELS, listing="centroids",
    )  # fmt: skip


def of_these(items, fitted, codes):
    """Centroids of items that are listed by centroids, made of all that are in each leaf."""
    return items.centroids.of_items(fitted[0], unit(fitted[1]), codes)


def in_few_leaves(n_items, d):
    """Items of three codes in a tree of d * d leaves."""
    rng = np.random.default_rng(0)
    codes = np.array([0, d + 1, d * d - 1])[rng.integers(0, 3, n_items)][:, None]
    level_scores = rng.normal(size=(n_items, LEVELS, d)).astype(np.float32)
    level_scores[np.arange(n_items), 0, codes[:, 0] // d] += 8
    level_scores[np.arange(n_items), 1, codes[:, 0] % d] += 8
    return rng.normal(size=(n_items, 3)).astype(np.float32), level_scores, codes
