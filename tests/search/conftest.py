"""A slow search that follows the definitions word by word, and tables to compare it with."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from hqsearch.search import LeafTable


def leaf_order(level_scores, branching_factor, leaves, probing):
    """Sort leaf ids as a query without own leaves would open them."""
    n_levels = len(level_scores)
    digits = np.array(
        [
            [leaf // branching_factor ** (n_levels - 1 - v) % branching_factor for v in range(n_levels)]
            for leaf in leaves
        ]
    )
    if probing == "best_first":
        totals = [sum(float(level_scores[v][path[v]]) for v in range(n_levels)) for path in digits]
        return [
            leaf for _, leaf in sorted((-total, leaf) for total, leaf in zip(totals, leaves, strict=True))
        ]
    ranks = np.argsort(np.argsort(-level_scores, axis=1, kind="stable"), axis=1)
    keys = [tuple(ranks[v][path[v]] for v in range(n_levels)) for path in digits]
    return [leaf for _, leaf in sorted(zip(keys, leaves, strict=True))]


def reference_search(
    vectors, item_codes, live, query, level_scores, own, n_neighbors, *,
    branching_factor, n_probes=None, probing="best_first", exclude=-1,
):  # fmt: skip
    """One query, leaf by leaf. `live` flags the items that exist; returns a namespace."""
    lists = {}
    for position in np.flatnonzero(live):
        for leaf in item_codes[position]:
            lists.setdefault(int(leaf), []).append(int(position))
    own = [int(leaf) for leaf in own]
    others = [leaf for leaf in sorted(lists) if leaf not in own]
    if others:
        others = leaf_order(level_scores, branching_factor, others, probing)
    wanted = len(own) if n_probes is None else n_probes
    candidates, opened, empty = set(), [], 0
    for leaf in own + others:
        if len(opened) >= wanted and len(candidates) >= n_neighbors:
            break
        opened.append(leaf)
        empty += leaf not in lists
        candidates |= set(lists.get(leaf, ())) - {exclude}
    squares = {p: float(((vectors[p].astype(np.float64) - query) ** 2).sum()) for p in candidates}
    nearest = sorted(candidates, key=lambda p: (squares[p], p))[:n_neighbors]
    positions = np.array(nearest + [-1] * (n_neighbors - len(nearest)), dtype=np.int64)
    distances = np.array([np.sqrt(squares[p]) for p in nearest] + [np.inf] * (n_neighbors - len(nearest)))
    return SimpleNamespace(
        positions=positions, distances=distances, opened=opened, empty=empty, candidates=len(candidates)
    )


def make_case(
    seed, n_items=300, n_queries=12, embedding_dim=5, branching_factor=4, n_levels=3, sparsity=1, spread=6
):
    """Items with small integer coordinates, so that distances tie often and are exact in float32."""
    rng = np.random.default_rng(seed)

    def draw(n):
        parents = rng.integers(0, max(1, branching_factor ** (n_levels - 1) // 3), n)
        buckets = np.argsort(rng.random((n, branching_factor)), axis=1)[:, :sparsity]
        vectors = rng.integers(0, spread, (n, embedding_dim)).astype(np.float32)
        return vectors, parents[:, None] * branching_factor + buckets

    vectors, codes = draw(n_items)
    queries, query_codes = draw(n_queries)
    query_codes[::3] = rng.integers(0, branching_factor**n_levels - sparsity, len(query_codes[::3]))[
        :, None
    ] + np.arange(sparsity)
    level_scores = rng.integers(-2, 3, (n_queries, n_levels, branching_factor)).astype(np.float32)
    return SimpleNamespace(
        vectors=vectors, codes=codes, queries=queries, query_codes=query_codes, level_scores=level_scores,
        shape={"branching_factor": branching_factor, "n_levels": n_levels}, rng=rng,
    )  # fmt: skip


def check_against_reference(
    table, case, live, n_neighbors, *, exclude=None, n_probes=None, probing="best_first", **options
):
    """Compare a search with the reference, neighbours and counts."""
    result = table.search(
        case.queries, case.level_scores, case.query_codes, n_neighbors,
        exclude=exclude, n_probes=n_probes, probing=probing, **options,
    )  # fmt: skip
    opened = empty = candidates = 0
    for i, query in enumerate(case.queries):
        expected = reference_search(
            case.vectors, case.codes, live, query, case.level_scores[i], case.query_codes[i], n_neighbors,
            branching_factor=case.shape["branching_factor"], n_probes=n_probes, probing=probing,
            exclude=-1 if exclude is None else exclude[i],
        )  # fmt: skip
        np.testing.assert_array_equal(result.positions[i], expected.positions)
        np.testing.assert_allclose(result.distances[i], expected.distances, rtol=1e-6)
        opened += len(expected.opened)
        empty += expected.empty
        candidates += expected.candidates
    stats = result.stats
    assert (stats.leaves_opened, stats.empty_leaves, stats.candidates) == (opened, empty, candidates)
    assert stats.distances == stats.candidates
    return result


@pytest.fixture
def cases():
    """The helpers above: importing between test modules is not possible under importlib mode."""
    return SimpleNamespace(
        make=make_case, check=check_against_reference, reference=reference_search, leaf_order=leaf_order,
        grid=product, build=lambda case, **kw: LeafTable.build(case.vectors, case.codes, **case.shape, **kw),
    )  # fmt: skip
