"""Batches of queries -> results: slices of the queries, each answered by one call of the compiled engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hqsearch.search.checks import PROBINGS, check_allowed, check_exclude, check_queries
from hqsearch.search.results import RadiusResult, SearchResult, SearchStats

if TYPE_CHECKING:
    from hqsearch.search.table import LeafTable

# Queries of one task: enough to share leaves, few enough to stay in the caches and to spread over threads.
_SLICE = 2048
_NO_MASK = np.empty(0, dtype=np.uint8)


class _Batch:
    """One call's validated arguments, and the arrays of the table in the order that the kernels take them."""

    def __init__(self, table: LeafTable, queries, level_scores, codes, n_probes, probing, exclude, allowed):
        if probing not in PROBINGS:
            raise ValueError(f"Expected probing to be one of {PROBINGS}, got {probing!r}")
        self.queries, self.level_scores, self.codes = check_queries(queries, level_scores, codes, table)
        self.directory = directory = table._directory
        n_queries = len(self.queries)
        flags = table._live_flags
        if allowed is None:
            self.keep = _NO_MASK if table.n_live_items == table.n_items else flags
            cell_live, n_items = directory.cell_live, table.n_live_items
        else:
            self.keep = flags = check_allowed(allowed, table.n_items) & flags[: table.n_items]
            cell_live, n_items = directory.count_kept(flags), int(np.count_nonzero(flags))
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
        tree = table._tree
        shared = table.sparsity > 1 or self.codes.shape[1] > 1
        self.queried = (self.codes, self.level_scores, own_cell)
        self.rules = (-1 if n_probes is None else n_probes, probing == "lexicographic")
        self.leaves = (
            directory.leaf_ids, directory.leaf_start, directory.leaf_cells, cell_live,
            tree.child_start, tree.digit, tree.level_start, shared,
        )  # fmt: skip

    def pairs(self, order: np.ndarray, n_neighbors: int):
        """Plan a slice; return its pairs sorted by cell and the plan's totals."""
        engine = _kernels()
        pair_query, pair_cell, totals = engine.plan_search(
            order, *self.queried, n_neighbors, *self.rules, *self.leaves
        )
        return *engine.sort_pairs(pair_query, pair_cell, self.directory.cell_live.size), totals

    def stats(self, totals) -> SearchStats:
        """Add up the totals of the slices' plans; refuse level scores that a plan could not use."""
        opened, empty, candidates, broken = np.sum([np.zeros(4, dtype=np.int64), *totals], axis=0).tolist()
        if broken:
            raise ValueError("Input level_scores contains NaN or infinity.")
        return SearchStats(len(self.queries), opened, empty, candidates, candidates, self.n_items)

    def over_slices(self, run, n_jobs: int | None) -> list:
        """Call `run` on slices of the queries, ordered by their leaves so that a slice shares leaves."""
        n_queries = len(self.queries)
        if n_queries <= 1:
            return [run(np.arange(n_queries))] if n_queries else []
        codes = self.codes
        order = np.lexsort(codes.T[::-1]) if codes.shape[1] > 1 else np.argsort(codes[:, 0], kind="stable")
        slices = [order[i : i + _SLICE] for i in range(0, n_queries, _SLICE)]
        from joblib import Parallel, delayed, effective_n_jobs

        if len(slices) == 1 or effective_n_jobs(n_jobs) == 1:
            return [run(piece) for piece in slices]
        return Parallel(n_jobs=n_jobs, prefer="threads")(delayed(run)(piece) for piece in slices)


def _kernels() -> Any:
    """Import the compiled engine; mypy would take its dispatchers for functions of no arguments."""
    from hqsearch.search import engine

    return engine


def _arrays(segment):
    """List the arrays of a segment in the order that the scoring kernels take them."""
    return (
        segment.plain, segment.encoded, segment.kind, segment.low, segment.step,
        segment.cell_start, segment.positions,
    )  # fmt: skip


def search_batch(
    table: LeafTable, queries, level_scores, codes, n_neighbors, n_probes, probing, exclude, allowed, n_jobs
) -> SearchResult:
    """Answer `LeafTable.search`, whose parameters these are."""
    engine = _kernels()
    batch = _Batch(table, queries, level_scores, codes, n_probes, probing, exclude, allowed)
    distances = np.empty((len(batch.queries), n_neighbors), dtype=np.float32)
    positions = np.empty((len(batch.queries), n_neighbors), dtype=np.int64)
    segments = batch.directory.segments

    def run(order):
        if len(segments) == 1:
            return engine.search_slice(
                batch.queries, order, batch.skipped, *batch.queried, n_neighbors, *batch.rules, *batch.leaves,
                *_arrays(segments[0]), batch.keep, distances, positions,
            )  # fmt: skip
        pair_query, pair_cell, totals = batch.pairs(order, n_neighbors)
        taken, skipped = engine.take_rows(batch.queries, batch.skipped, order)
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
                *_arrays(segment),
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
        taken, skipped = engine.take_rows(batch.queries, batch.skipped, order)
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
                *_arrays(segment),
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
