"""Small cells of many queries: found in the lists that these share, gathered into blocks, scored together.

Codes that differ in one leaf make cells of a few items, which would leave most lanes of a block empty.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hqsearch.search.blocks import BLOCK, PLAIN, SLACK
from hqsearch.search.scoring import CHUNK, CHUNK_BLOCKS, gather_block, score_chunk
from hqsearch.search.topk import make_room

# Cells of at most so many items are gathered.
SMALL_CELL = 24


@njit(cache=True, nogil=True)
def gathering_limit(n_queries):
    """Largest cell to gather for so many queries: gathering pays by the query."""
    return min(SMALL_CELL, 4 * n_queries)


@njit(cache=True, nogil=True)
def count_common(pair_cell, first, first_end, second, second_end):
    """Count the cells that two lists have in common before they first differ."""
    n = min(first_end - first, second_end - second)
    for i in range(n):
        if pair_cell[first + i] != pair_cell[second + i]:
            return i
    return n


@njit(cache=True, nogil=True)
def share_lists(pair_query, pair_cell, n_planned):
    """Cut the queries' lists of cells into sections that consecutive queries share.

    Queries whose codes differ in a later leaf begin with the same cells. Returns rows of (first pair,
    end pair, first query, end query): the cells of those pairs, for those queries. Each pair lies in
    one section.
    """
    starts = np.searchsorted(pair_query, np.arange(n_planned + 1))
    sections = np.empty((2 * n_planned, 4), dtype=np.int64)
    n_sections = 0
    place = 0
    while place < n_planned:
        first, end = starts[place], starts[place + 1]
        shared_end = end
        family_end = place + 1
        while end > first and family_end < n_planned:
            n_common = count_common(pair_cell, first, shared_end, starts[family_end], starts[family_end + 1])
            if 2 * n_common < end - first:
                break
            shared_end = first + n_common
            family_end += 1
        if end > first:
            sections[n_sections] = first, shared_end, place, family_end
            n_sections += 1
        n_shared = shared_end - first
        while place < family_end:
            rest, rest_end = starts[place] + n_shared, starts[place + 1]
            after = place + 1
            while after < family_end and starts[after + 1] - starts[after] - n_shared == rest_end - rest:
                other = starts[after] + n_shared
                if count_common(pair_cell, rest, rest_end, other, starts[after + 1]) < rest_end - rest:
                    break
                after += 1
            if rest_end > rest:
                sections[n_sections] = rest, rest_end, place, after
                n_sections += 1
            place = after
    return sections[:n_sections]


@njit(cache=True, nogil=True)
def list_large_cells(sections, pair_cell, cell_start):
    """List the pairs of cells that are scored where they lie; they come in no order."""
    n_large = 0
    for section in range(len(sections)):
        first, end, first_place, end_place = sections[section]
        limit = gathering_limit(end_place - first_place)
        for pair in range(first, end):
            cell = pair_cell[pair]
            if cell_start[cell + 1] - cell_start[cell] > limit:
                n_large += end_place - first_place
    large_query, large_cell = np.empty(n_large, dtype=np.int32), np.empty(n_large, dtype=np.int32)
    n_large = 0
    for section in range(len(sections)):
        first, end, first_place, end_place = sections[section]
        limit = gathering_limit(end_place - first_place)
        for pair in range(first, end):
            cell = pair_cell[pair]
            if cell_start[cell + 1] - cell_start[cell] > limit:
                for place in range(first_place, end_place):
                    large_query[n_large], large_cell[n_large] = place, cell
                    n_large += 1
    return large_query, large_cell


@njit(cache=True, nogil=True)
def copy_column(source, origin, origin_stride, target, start, stride, dim):
    """Copy `dim` values that lie `origin_stride` apart to places `stride` apart."""
    # Unsigned indices spare the test for negative ones.
    at, step = np.uint64(origin), np.uint64(origin_stride)
    to, target_step = np.uint64(start), np.uint64(stride)
    for _ in range(dim):
        target[to] = source[at]
        at += step
        to += target_step


@njit(cache=True, nogil=True)
def count_lanes(sections, pair_cell, cell_start):
    """Count the lanes that the section with the most small cells fills: whole blocks, or a narrow one.

    Memory for more would only have to be cleared, for which a single query would wait.
    """
    most = np.int64(0)
    for section in range(len(sections)):
        first, end, first_place, end_place = sections[section]
        limit = gathering_limit(end_place - first_place)
        n_items = np.int64(0)
        for pair in range(first, end):
            width = cell_start[pair_cell[pair] + 1] - cell_start[pair_cell[pair]]
            n_items += width * (width <= limit)
        most = max(most, n_items)
    unit = SLACK if most <= BLOCK else BLOCK
    return min(CHUNK, (most + unit - 1) // unit * unit)


@njit(cache=True, nogil=True)
def score_small_cells(
    queries, skipped, sections, pair_cell,
    plain, encoded, kind, low, step, cell_start, positions, keep, keys, n_neighbors,
):  # fmt: skip
    """Gather and score the cells that `list_large_cells` leaves.

    `sections` come from `share_lists`, whose pairs those of `pair_cell` are; the other parameters are those
    of `score_pairs`.
    """
    dim = queries.shape[1]
    flat = queries.ravel()
    places = np.arange(queries.shape[0]).astype(np.int32)
    distances = np.empty(4 * CHUNK, dtype=np.float32)
    room = make_room(CHUNK_BLOCKS)
    widths = np.full(CHUNK_BLOCKS, BLOCK, dtype=np.int64)
    counts = widths.copy()
    n_lanes = count_lanes(sections, pair_cell, cell_start)
    gathered = np.zeros(n_lanes * dim + SLACK, dtype=np.float32)
    gathered_positions = np.empty(CHUNK, dtype=np.int32)
    decoding = kind != PLAIN or keep.size > 0
    scratch = np.zeros(dim * SMALL_CELL + SLACK if decoding else 0, dtype=np.float32)
    scratch_positions = np.empty(SMALL_CELL, dtype=np.int32)
    kept_columns = np.empty(SMALL_CELL, dtype=np.int32)
    for section in range(len(sections)):
        first, end, first_place, end_place = sections[section]
        limit = gathering_limit(end_place - first_place)
        # A few items make a narrow block, so that not many lanes are scored for nothing.
        n_wanted = 0
        for pair in range(first, end):
            width = cell_start[pair_cell[pair] + 1] - cell_start[pair_cell[pair]]
            n_wanted += width * (width <= limit)
        stride = min(BLOCK, (n_wanted + SLACK - 1) // SLACK * SLACK)
        widths[0] = stride
        n_items = 0
        for pair in range(first, end):
            cell = pair_cell[pair]
            row, width = cell_start[cell], cell_start[cell + 1] - cell_start[cell]
            if width > limit:
                continue
            if n_items + width > CHUNK:
                counts[CHUNK_BLOCKS - 1] = n_items - (CHUNK_BLOCKS - 1) * BLOCK
                score_chunk(
                    flat, dim, skipped, places, first_place, end_place, gathered, 0, widths, counts,
                    CHUNK_BLOCKS, gathered_positions, 0, distances, keys, n_neighbors, room,
                )  # fmt: skip
                counts[CHUNK_BLOCKS - 1] = BLOCK
                n_items = 0
            if decoding:
                n_kept = gather_block(
                    plain, encoded, kind, low, step, row * dim, width, row, positions, keep,
                    scratch, scratch_positions, kept_columns,
                )  # fmt: skip
                source, offset, item_positions, first_position = scratch, 0, scratch_positions, 0
            else:
                n_kept = width
                source, offset, item_positions, first_position = plain, row * dim, positions, row
            for i in range(n_kept):
                lane = n_items + i
                gathered_positions[lane] = item_positions[first_position + i]
                start = lane // BLOCK * dim * BLOCK + lane % BLOCK
                copy_column(source, offset + i, n_kept, gathered, start, stride, dim)
            n_items += n_kept
        if n_items > 0:
            n_blocks = (n_items + BLOCK - 1) // BLOCK
            counts[n_blocks - 1] = n_items - (n_blocks - 1) * BLOCK
            score_chunk(
                flat, dim, skipped, places, first_place, end_place, gathered, 0, widths, counts, n_blocks,
                gathered_positions, 0, distances, keys, n_neighbors, room,
            )  # fmt: skip
            counts[n_blocks - 1] = BLOCK
