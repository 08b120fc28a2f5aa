"""The compiled parts of a search, and all of them as one call for a table of one segment."""

from __future__ import annotations

import numpy as np
from numba import njit

from hqsearch.search.blocks import LINE, PLAIN
from hqsearch.search.gathering import list_large_cells, prefetch_small_cells, score_small_cells, share_lists
from hqsearch.search.instructions import AHEAD, array_at, prefetch
from hqsearch.search.probing import BAD_SCORES, order_by_code, pair_lists, plan_search, sort_pairs
from hqsearch.search.radius import collect_pairs
from hqsearch.search.scoring import make_workspace, score_large_cells, score_pairs
from hqsearch.search.topk import EMPTY_KEY, finish_rows

__all__ = [
    "BAD_QUERY",
    "BAD_SCORES",
    "EMPTY_KEY",
    "collect_pairs",
    "finish_rows",
    "order_by_code",
    "pair_lists",
    "plan_search",
    "score_pairs",
    "search_alone",
    "search_slice",
    "sort_pairs",
    "take_rows",
]

BAD_QUERY = BAD_SCORES + 1


@njit(cache=True, nogil=True)
def take_rows(queries, skipped, order, totals):
    """Copy the task's queries side by side: read at once they miss the caches together, not one by one.

    Sets ``totals[3]`` to `BAD_QUERY` when one of them holds NaN or infinity.
    """
    largest = np.float32(np.finfo(np.float32).max)
    n_bad = 0
    flat, dim = queries.ravel(), queries.shape[1]
    taken = np.empty((order.size, queries.shape[1]), dtype=np.float32)
    taken_skipped = np.empty(order.size, dtype=np.int64)
    for place in range(order.size):
        ahead = order[min(place + AHEAD, order.size - 1)] * dim
        for i in range(ahead, ahead + dim, LINE // 4):
            prefetch(flat, i)
        taken_skipped[place] = skipped[order[place]]
        for j in range(queries.shape[1]):
            value = queries[order[place], j]
            n_bad += not abs(value) <= largest
            taken[place, j] = value
    if n_bad > 0:
        totals[3] = BAD_QUERY
    return taken, taken_skipped


@njit(cache=True, nogil=True)
def search_slice(
    queries, order, skipped, codes, level_scores, own_cell, n_neighbors, n_probes, lexicographic,
    shared, leaf_ids, leaf_start, leaf_cells, cell_live, child_start, digit, level_start,
    plain, encoded, kind, low, step, cell_start, positions, keep, out_distances, out_positions,
):  # fmt: skip
    """Answer the queries named by `order` on a table of one segment.

    The parameters are those of `plan_search` and `score_pairs`; rows ``order`` of `out_distances` and
    `out_positions` are written. Returns `plan_search`'s totals and the least number of neighbours found.
    """
    list_place, list_start, list_cell, totals = plan_search(
        order, codes, level_scores, own_cell, n_neighbors, n_probes, lexicographic, shared,
        leaf_ids, leaf_start, leaf_cells, cell_live, child_start, digit, level_start,
    )  # fmt: skip
    taken, taken_skipped = take_rows(queries, skipped, order, totals)
    if totals[3] != 0:
        return totals, 0
    keys = np.full(order.size * n_neighbors, EMPTY_KEY, dtype=np.int64)
    if shared:
        sections = share_lists(list_place, list_start, list_cell)
        large_query, large_cell = list_large_cells(sections, list_cell, cell_start)
        if len(sections) > 0:
            # A single query has nothing else to do while it waits for them.
            prefetch_small_cells(
                sections, 0, list_cell, cell_start, positions, plain, encoded, kind, queries.shape[1]
            )
    else:
        large_query, large_cell = pair_lists(list_place, list_start, list_cell)
    large_query, large_cell = sort_pairs(large_query, large_cell, cell_live.size)
    work = make_workspace(taken.shape[1], kind != PLAIN or keep.size > 0)
    score_large_cells(
        taken.ravel(), taken.shape[1], taken_skipped, large_query, large_cell, 0, large_query.size, 0,
        plain, encoded, kind, low, step, cell_start, positions, keep, keys, n_neighbors, work,
    )  # fmt: skip
    if shared:
        # After the large cells: most items of the small ones are then too far to be looked at twice.
        score_small_cells(
            taken, taken_skipped, sections, list_cell,
            plain, encoded, kind, low, step, cell_start, positions, keep, keys, n_neighbors, work,
        )  # fmt: skip
    return totals, finish_rows(keys, order, n_neighbors, out_distances, out_positions)


@njit(cache=True, nogil=True)
def search_alone(
    query, code, level_scores, n_neighbors, n_probes, lexicographic, shared, places, keep, out_distances,
    out_positions,
):  # fmt: skip
    """Answer one query on a table of one segment, as `search_slice` does.

    `places` is the table's `_places`, whose order this is; the other parameters are those of `search_slice`.
    """
    alone, nothing = np.zeros(1, dtype=np.int64), np.full(1, -1, dtype=np.int64)
    return search_slice(
        query, alone, nothing, code, level_scores, nothing, n_neighbors, n_probes, lexicographic, shared,
        array_at(places, 0, np.int64), array_at(places, 1, np.int64), array_at(places, 2, np.int32),
        array_at(places, 3, np.int32), array_at(places, 4, np.int64), array_at(places, 5, np.int64),
        array_at(places, 6, np.int64),
        array_at(places, 7, np.float32), array_at(places, 8, np.uint8), places[13, 0],
        array_at(places, 9, np.float32), array_at(places, 10, np.float32), array_at(places, 11, np.int64),
        array_at(places, 12, np.int32),
        keep, out_distances, out_positions,
    )  # fmt: skip
