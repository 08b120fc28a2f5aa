"""Small cells of many queries: found in the lists that these share, gathered into blocks, scored together.

Codes that differ in one leaf make cells of a few items, which would leave most lanes of a block empty.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hqsearch.search.blocks import BLOCK, FLOAT16, LINE, PLAIN, SLACK, aligned_floats
from hqsearch.search.instructions import LEAF_KERNEL, prefetch
from hqsearch.search.scoring import COPIED, COPIED_BLOCKS, gather_block, score_chunk, square_distances_apart
from hqsearch.search.topk import NO_ITEM, offer

# Cells of at most so many items are gathered, or scored item by item.
SMALL_CELL = 24


@njit(**LEAF_KERNEL)
def gathering_limit(n_queries):
    """Largest cell to gather for so many queries: gathering pays by the query."""
    return min(SMALL_CELL, 4 * n_queries)


@njit(**LEAF_KERNEL)
def count_common(list_cell, first, first_end, second, second_end):
    """Count the cells that two lists have in common before they first differ."""
    n = min(first_end - first, second_end - second)
    for i in range(n):
        if list_cell[first + i] != list_cell[second + i]:
            return i
    return n


@njit(cache=True, nogil=True)
def share_lists(list_place, list_start, list_cell):
    """Cut lists of cells into sections that consecutive queries share.

    Queries whose codes differ in a later leaf begin with the same cells. The parameters are the lists as
    `plan_search` gives them. Returns rows of (first entry, end entry, first place, end place): the cells of
    those entries of `list_cell`, for those queries. Each pair of query and cell lies in one section.
    """
    n_lists = list_place.size - 1
    sections = np.empty((2 * n_lists, 4), dtype=np.int64)
    n_sections = 0
    first_list = 0
    while first_list < n_lists:
        first, end = list_start[first_list], list_start[first_list + 1]
        shared_end = end
        end_list = first_list + 1
        while end > first and end_list < n_lists:
            n_common = count_common(
                list_cell, first, shared_end, list_start[end_list], list_start[end_list + 1]
            )
            if 2 * n_common < end - first:
                break
            shared_end = first + n_common
            end_list += 1
        if end > first:
            sections[n_sections] = first, shared_end, list_place[first_list], list_place[end_list]
            n_sections += 1
        n_shared = shared_end - first
        for i in range(first_list, end_list):
            if list_start[i] + n_shared < list_start[i + 1]:
                sections[n_sections] = (
                    list_start[i] + n_shared, list_start[i + 1], list_place[i], list_place[i + 1],
                )  # fmt: skip
                n_sections += 1
        first_list = end_list
    return sections[:n_sections]


@njit(cache=True, nogil=True)
def list_large_cells(sections, list_cell, cell_start):
    """List the pairs of cells that are scored where they lie; they come in no order."""
    n_large = 0
    for section in range(len(sections)):
        first, end, first_place, end_place = sections[section]
        limit = gathering_limit(end_place - first_place)
        for entry in range(first, end):
            cell = list_cell[entry]
            if cell_start[cell + 1] - cell_start[cell] > limit:
                n_large += end_place - first_place
    large_query, large_cell = np.empty(n_large, dtype=np.int32), np.empty(n_large, dtype=np.int32)
    n_large = 0
    for section in range(len(sections)):
        first, end, first_place, end_place = sections[section]
        limit = gathering_limit(end_place - first_place)
        for entry in range(first, end):
            cell = list_cell[entry]
            if cell_start[cell + 1] - cell_start[cell] > limit:
                for place in range(first_place, end_place):
                    large_query[n_large], large_cell[n_large] = place, cell
                    n_large += 1
    return large_query, large_cell


@njit(**LEAF_KERNEL)
def copy_column(source, origin, origin_stride, target, start, stride, dim):
    """Copy `dim` values that lie `origin_stride` apart to places `stride` apart."""
    # Unsigned indices spare the test for negative ones.
    at, step = np.uint64(origin), np.uint64(origin_stride)
    to, target_step = np.uint64(start), np.uint64(stride)
    for _ in range(dim):
        target[to] = source[at]
        at += step
        to += target_step


@njit(**LEAF_KERNEL)
def count_lanes(sections, list_cell, cell_start, fewest):
    """Count the lanes that the section with the most small cells fills: whole blocks, or a narrow one.

    Sections of fewer queries than `fewest` don't count.

    More memory would only push other things out of the caches.
    """
    most = np.int64(0)
    for section in range(len(sections)):
        first, end, first_place, end_place = sections[section]
        if end_place - first_place < fewest:
            continue
        limit = gathering_limit(end_place - first_place)
        n_items = np.int64(0)
        for entry in range(first, end):
            width = cell_start[list_cell[entry] + 1] - cell_start[list_cell[entry]]
            n_items += width * (width <= limit)
        most = max(most, n_items)
    unit = SLACK if most <= BLOCK else BLOCK
    return min(COPIED, (most + unit - 1) // unit * unit)


@njit(**LEAF_KERNEL)
def score_apart(
    flat, dim, skipped, place, starts, strides, n_items, source, item_positions, work, keys, n_neighbors,
):  # fmt: skip
    """Score the listed items, where they lie, for one query: for one alone, gathering them takes longer."""
    words = work.distances.view(np.int32)
    n_lanes = (n_items + BLOCK - 1) // BLOCK * BLOCK
    for i in range(n_items, (n_items + 7) // 8 * 8):
        starts[i], strides[i] = starts[n_items - 1], strides[n_items - 1]
    for first in range(0, n_items, 8):
        square_distances_apart(flat, place * dim, dim, source, starts, strides, first, work.distances)
    for lane in range(n_items, n_lanes):
        words[lane] = NO_ITEM
    offer(
        words, 0, n_lanes // BLOCK, item_positions, 0, skipped[place], keys, place * n_neighbors, n_neighbors,
        work.minima, work.ranked,
    )  # fmt: skip


@njit(**LEAF_KERNEL)
def score_alone(
    flat, dim, skipped, place, first, end, limit, list_cell, plain, cell_start, positions,
    starts, strides, item_positions, work, keys, n_neighbors,
):  # fmt: skip
    """Score the small cells of the entries ``first:end`` for one query."""
    n_items = 0
    for entry in range(first, end):
        row, end_row = cell_start[list_cell[entry]], cell_start[list_cell[entry] + 1]
        width = end_row - row
        if width > limit:
            continue
        if n_items + width > COPIED:
            score_apart(
                flat, dim, skipped, place, starts, strides, n_items, plain, item_positions, work, keys,
                n_neighbors,
            )  # fmt: skip
            n_items = 0
        for i in range(width):
            starts[n_items + i] = np.uint64(row * dim + i)
            strides[n_items + i] = np.uint64(width)
            item_positions[n_items + i] = positions[row + i]
        n_items += width
    if n_items > 0:
        score_apart(
            flat, dim, skipped, place, starts, strides, n_items, plain, item_positions, work, keys,
            n_neighbors,
        )  # fmt: skip


@njit(**LEAF_KERNEL)
def prefetch_small_cells(sections, section, list_cell, cell_start, positions, plain, encoded, kind, dim):
    """Ask for the vectors of a section's small cells, which lie here and there, before they are gathered."""
    first, end, first_place, end_place = sections[section]
    limit = gathering_limit(end_place - first_place)
    for entry in range(first, end):
        row, end_row = cell_start[list_cell[entry]], cell_start[list_cell[entry] + 1]
        if end_row - row > limit:
            continue
        prefetch(positions, row)
        if kind == PLAIN:
            for value in range(row * dim, end_row * dim, LINE // 4):
                prefetch(plain, value)
        else:
            width = 2 if kind == FLOAT16 else 1
            for byte in range(row * dim * width, end_row * dim * width, LINE):
                prefetch(encoded, byte)


@njit(cache=True, nogil=True)
def score_small_cells(
    queries, skipped, sections, list_cell,
    plain, encoded, kind, low, step, cell_start, positions, keep, keys, n_neighbors, work,
):  # fmt: skip
    """Score the cells that `list_large_cells` leaves: gathered, or for a single query where they lie.

    `sections` come from `share_lists`, and `list_cell` is what that was given; `work` is a `Workspace`; the
    other parameters are those of `score_pairs`.
    """
    dim = queries.shape[1]
    decoding = kind != PLAIN or keep.size > 0
    n_lanes = count_lanes(sections, list_cell, cell_start, 1 if decoding else 2)
    starts, strides = np.empty(COPIED + 8, dtype=np.uint64), np.empty(COPIED + 8, dtype=np.uint64)
    widths = np.full(COPIED_BLOCKS, BLOCK)
    score_sections(
        queries.ravel(), dim, skipped, sections, list_cell,
        plain, encoded, kind, low, step, cell_start, positions, keep, keys, n_neighbors, work,
        np.arange(queries.shape[0]).astype(np.int32), widths, widths.copy(),
        aligned_floats(n_lanes * dim + SLACK), np.empty(COPIED, dtype=np.int32), starts, strides,
    )  # fmt: skip


@njit(**LEAF_KERNEL)
def score_sections(
    flat, dim, skipped, sections, list_cell,
    plain, encoded, kind, low, step, cell_start, positions, keep, keys, n_neighbors, work,
    places, widths, counts, gathered, gathered_positions, starts, strides,
):  # fmt: skip
    """Score the small cells of each section; see `score_small_cells`, which makes the memory for it.

    `places` counts the queries; `widths` and `counts` are full blocks; `gathered` and `gathered_positions`
    take the items of a chunk that several queries share, `starts` and `strides` say where those of one lie.
    """
    decoding = kind != PLAIN or keep.size > 0
    for section in range(len(sections)):
        if section + 1 < len(sections):
            prefetch_small_cells(
                sections, section + 1, list_cell, cell_start, positions, plain, encoded, kind, dim
            )
        first, end, first_place, end_place = sections[section]
        limit = gathering_limit(end_place - first_place)
        if end_place - first_place == 1 and not decoding:
            score_alone(
                flat, dim, skipped, first_place, first, end, limit, list_cell, plain, cell_start, positions,
                starts, strides, gathered_positions, work, keys, n_neighbors,
            )  # fmt: skip
            continue
        # A few items make a narrow block, so that not many lanes are scored for nothing.
        n_wanted = 0
        for entry in range(first, end):
            width = cell_start[list_cell[entry] + 1] - cell_start[list_cell[entry]]
            n_wanted += width * (width <= limit)
        stride = min(BLOCK, (n_wanted + SLACK - 1) // SLACK * SLACK)
        widths[0] = stride
        n_items = 0
        for entry in range(first, end):
            cell = list_cell[entry]
            row, width = cell_start[cell], cell_start[cell + 1] - cell_start[cell]
            if width > limit:
                continue
            if n_items + width > COPIED:
                counts[COPIED_BLOCKS - 1] = n_items - (COPIED_BLOCKS - 1) * BLOCK
                score_chunk(
                    flat, dim, skipped, places, first_place, end_place, gathered, 0, widths, counts,
                    COPIED_BLOCKS, gathered_positions, 0, work, keys, n_neighbors,
                )  # fmt: skip
                counts[COPIED_BLOCKS - 1] = BLOCK
                n_items = 0
            n_kept = width
            if decoding:
                n_kept = gather_block(
                    plain, encoded, kind, low, step, row * dim, width, row, positions, keep,
                    work.decoded, work.decoded_positions, work.kept_columns,
                )  # fmt: skip
            for i in range(n_kept):
                lane = n_items + i
                start = lane // BLOCK * dim * BLOCK + lane % BLOCK
                if decoding:
                    gathered_positions[lane] = work.decoded_positions[i]
                    copy_column(work.decoded, i, n_kept, gathered, start, stride, dim)
                else:
                    gathered_positions[lane] = positions[row + i]
                    copy_column(plain, row * dim + i, n_kept, gathered, start, stride, dim)
            n_items += n_kept
        if n_items > 0:
            n_blocks = (n_items + BLOCK - 1) // BLOCK
            counts[n_blocks - 1] = n_items - (n_blocks - 1) * BLOCK
            score_chunk(
                flat, dim, skipped, places, first_place, end_place, gathered, 0, widths, counts, n_blocks,
                gathered_positions, 0, work, keys, n_neighbors,
            )  # fmt: skip
            counts[n_blocks - 1] = BLOCK
