"""Batches of queries -> results: slices of the queries, each answered by one call of the compiled engine."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from hqsearch.search.checks import check_allowed, check_exclude, check_probing, check_queries, readable
from hqsearch.search.results import RadiusResult, SearchResult, SearchStats
from hqsearch.threads import share_work

if TYPE_CHECKING:
    from hqsearch.search.table import LeafTable

# Queries of one task: enough to share leaves, few enough to stay in the caches and to spread over threads.
_SLICE, _MIN_SLICE, _LONGER = 2048, 128, 4
_NO_MASK = np.empty(0, dtype=np.uint8)
_ONE_QUERY = np.zeros(1, dtype=np.int64)


class _Batch:
    """One call's validated arguments, and the arrays of the table in the order that the kernels take them."""

    def __init__(self, table: LeafTable, queries, level_scores, codes, n_probes, probing, exclude, allowed):
        check_probing(probing)
        self.queries, self.level_scores, self.codes = check_queries(queries, level_scores, codes, table)
        self.directory = directory = table._directory
        self.leaves = table._leaf_arrays
        n_queries = len(self.queries)
        flags = readable(table._live_flags)
        if allowed is None:
            self.keep = _NO_MASK if table.n_live_items == table.n_items else flags
            n_items = table.n_live_items
        else:
            self.keep = flags = check_allowed(allowed, table.n_items) & flags[: table.n_items]
            n_items = int(np.count_nonzero(flags))
            self.leaves = (*self.leaves[:3], directory.count_kept(flags), *self.leaves[4:])
        self.n_items = n_items * n_queries
        if exclude is None:
            self.skipped = own_cell = np.full(n_queries, -1, dtype=np.int64)
        else:
            skipped = check_exclude(exclude, n_queries, table.n_items)
            # An item that can't be returned anyway is not left out a second time.
            counts = (skipped >= 0) & (np.append(flags[: table.n_items], 0)[skipped] != 0)
            self.skipped = np.where(counts, skipped, -1)
            own_cell = directory.cells_of(self.skipped)
            self.n_items -= int(np.count_nonzero(counts))
        self.queried = (self.codes, self.level_scores, own_cell)
        shared = table.sparsity > 1 or self.codes.shape[1] > 1
        self.rules = (-1 if n_probes is None else n_probes, probing == "lexicographic", shared)

    def pairs(self, order: np.ndarray, n_neighbors: int):
        """Plan a slice; return its pairs sorted by cell and the plan's totals."""
        engine = _kernels()
        *lists, totals = engine.plan_search(order, *self.queried, n_neighbors, *self.rules, *self.leaves)
        return *engine.sort_pairs(*engine.pair_lists(*lists), self.directory.cell_live.size), totals

    def stats(self, totals) -> SearchStats:
        """Add up the totals of the slices' plans; refuse level scores that a plan could not use."""
        columns = np.array([(0,) * 4, *totals])
        opened, empty, candidates, _ = columns.sum(axis=0).tolist()
        broken = columns[:, 3].max()
        if broken:
            refuse_numbers(broken)
        return SearchStats(len(self.queries), opened, empty, candidates, candidates, self.n_items)

    def over_slices(self, run, n_jobs: int | None) -> list:
        """Call `run` on slices of the queries, ordered by their leaves so that a slice shares leaves."""
        n_queries = len(self.queries)
        if n_queries <= 1:
            return [run(_ONE_QUERY)] if n_queries else []
        order = _kernels().order_by_code(self.codes)
        # joblib says how many threads; `share_work` says why they are not its own.
        from joblib import effective_n_jobs

        n_threads = effective_n_jobs(n_jobs)
        # Queries of one code share its leaves only; those that open further leaves meet more of the same
        # cells in a longer slice.
        most = _SLICE * min(_LONGER, max(1, self.rules[0] // self.codes.shape[1]))
        # Small batches too are spread over the threads; of large ones every thread gets as many slices.
        size = min(most, max(_MIN_SLICE, -(-n_queries // (2 * n_threads))))
        n_slices = -(-n_queries // size)
        if n_slices > n_threads:
            n_slices = -(-n_slices // n_threads) * n_threads
        slices = np.array_split(order, n_slices)
        outcomes: list = [None] * n_slices

        def answer(i: int) -> None:
            outcomes[i] = run(slices[i])

        share_work(answer, n_slices, n_threads)
        return outcomes


def refuse_numbers(broken: int) -> None:
    """Raise for the argument in which the engine found NaN or infinity."""
    name = "level_scores" if broken == _kernels().BAD_SCORES else "queries"
    raise ValueError(f"Input {name} contains NaN or infinity.")


@cache
def _kernels() -> Any:
    """Import the compiled engine; mypy would take its dispatchers for functions of no arguments."""
    from hqsearch.search import engine

    return engine


def _search_alone(
    table: LeafTable, queries, level_scores, codes, n_neighbors, n_probes, lexicographic
) -> SearchResult:
    """Answer one query on a table of one segment, as `search_batch` would.

    The kernel takes about 5 microseconds: making a batch of one query would double that.
    """
    distances = np.empty((1, n_neighbors), dtype=np.float32)
    positions = np.empty((1, n_neighbors), dtype=np.int64)
    keep = _NO_MASK if table.n_live_items == table.n_items else readable(table._live_flags)
    shared = table.sparsity > 1 or codes.shape[1] > 1
    places, _arrays = table._places
    totals, n_found = _kernels().search_alone(
        queries, codes, level_scores, n_neighbors, -1 if n_probes is None else n_probes, lexicographic,
        shared, places, keep, distances, positions,
    )  # fmt: skip
    opened, empty, candidates, broken = totals.tolist()
    if broken:
        refuse_numbers(broken)
    stats = SearchStats(1, opened, empty, candidates, candidates, table.n_live_items)
    return SearchResult(distances, positions, stats, n_found)


def search_batch(
    table: LeafTable, queries, level_scores, codes, n_neighbors, n_probes, probing, exclude, allowed, n_jobs
) -> SearchResult:
    """Answer `LeafTable.search`, whose parameters these are."""
    engine = _kernels()
    if exclude is None and allowed is None and len(table._directory.segments) == 1:
        checked = check_queries(queries, level_scores, codes, table)
        if len(checked[0]) == 1:
            check_probing(probing)
            return _search_alone(table, *checked, n_neighbors, n_probes, probing == "lexicographic")
        queries, level_scores, codes = checked
    batch = _Batch(table, queries, level_scores, codes, n_probes, probing, exclude, allowed)
    distances = np.empty((len(batch.queries), n_neighbors), dtype=np.float32)
    positions = np.empty((len(batch.queries), n_neighbors), dtype=np.int64)
    segments = batch.directory.segments

    def run(order):
        if len(segments) == 1:
            return engine.search_slice(
                batch.queries, order, batch.skipped, *batch.queried, n_neighbors, *batch.rules, *batch.leaves,
                *segments[0].kernel_arrays, batch.keep, distances, positions,
            )  # fmt: skip
        pair_query, pair_cell, totals = batch.pairs(order, n_neighbors)
        taken, skipped = engine.take_rows(batch.queries, batch.skipped, order, totals)
        keys = np.full(order.size * n_neighbors, engine.EMPTY_KEY, dtype=np.int64)
        for first, segment in zip(batch.directory.first_cell, segments, strict=True):
            lo, hi = np.searchsorted(pair_cell, (first, first + segment.n_cells))
            engine.score_pairs(
                taken,
                skipped,
                pair_query,
                pair_cell,
                lo,
                hi,
                first,
                *segment.kernel_arrays,
                batch.keep,
                keys,
                n_neighbors,
            )
        return totals, engine.finish_rows(keys, order, n_neighbors, distances, positions)

    outcomes = batch.over_slices(run, n_jobs)
    stats = batch.stats([totals for totals, _ in outcomes])
    return SearchResult(
        distances, positions, stats, min((found for _, found in outcomes), default=n_neighbors)
    )


def radius_batch(
    table: LeafTable, queries, level_scores, codes, radius, n_probes, probing, exclude, allowed, n_jobs
) -> RadiusResult:
    """Answer `LeafTable.radius_search`, whose parameters these are."""
    engine = _kernels()
    batch = _Batch(table, queries, level_scores, codes, n_probes, probing, exclude, allowed)

    def run(order):
        pair_query, pair_cell, totals = batch.pairs(order, 0)
        taken, skipped = engine.take_rows(batch.queries, batch.skipped, order, totals)
        found = [(order[:0], np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int32))]
        for first, segment in zip(batch.directory.first_cell, batch.directory.segments, strict=True):
            lo, hi = np.searchsorted(pair_cell, (first, first + segment.n_cells))
            places, *rest = engine.collect_pairs(
                taken,
                skipped,
                np.float32(radius),
                pair_query,
                pair_cell,
                lo,
                hi,
                first,
                *segment.kernel_arrays,
                batch.keep,
            )
            found.append((order[places], *rest))
        return totals, found

    outcomes = batch.over_slices(run, n_jobs)
    stats = batch.stats([totals for totals, _ in outcomes])
    pieces = [piece for _, found in outcomes for piece in found]
    if not pieces:
        pieces = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int32))]
    rows, distances, positions = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.lexsort((positions, distances, rows))
    counts = np.bincount(rows, minlength=len(batch.queries))
    indptr = np.append(0, np.cumsum(counts)).astype(np.int64)
    return RadiusResult(indptr, distances[order], positions[order].astype(np.int64), stats)


def plan_batch(
    table: LeafTable, level_scores, codes, n_neighbors, n_probes, probing
) -> tuple[np.ndarray, np.ndarray]:
    """Plan a search without doing it: rows of `codes`, ascending, and the cells that each would score."""
    queries = np.zeros((len(codes), table.embedding_dim), dtype=np.float32)
    batch = _Batch(table, queries, level_scores, codes, n_probes, probing, None, None)
    order = np.arange(len(codes))
    engine = _kernels()
    *lists, totals = engine.plan_search(order, *batch.queried, n_neighbors, *batch.rules, *batch.leaves)
    batch.stats([totals])
    return engine.pair_lists(*lists)
