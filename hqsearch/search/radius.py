"""Candidates -> all items within a radius of each query."""

from __future__ import annotations

import numpy as np
from numba import njit

from hqsearch.search.blocks import BLOCK, PLAIN, SLACK
from hqsearch.search.scoring import gather_block, square_distances_1


@njit(cache=True, nogil=True)
def collect_pairs(
    queries, skipped, radius, pair_query, pair_cell, first_pair, end_pair, first_cell,
    plain, encoded, kind, low, step, cell_start, positions, keep,
):  # fmt: skip
    """List the items within `radius` (float32, Euclidean) of the pairs' queries, in the order of the pairs.

    The parameters are those of `scoring.score_pairs`. Returns the queries' rows (int32), the distances
    (float32) and the positions (int32) of the items found.
    """
    dim = queries.shape[1]
    flat = queries.ravel()
    squares = np.empty(BLOCK, dtype=np.float32)
    scratch = np.zeros(dim * BLOCK + SLACK, dtype=np.float32)
    scratch_positions = np.empty(BLOCK, dtype=np.int32)
    kept_columns = np.empty(BLOCK, dtype=np.int32)
    found_query = np.empty(1024, dtype=np.int32)
    found_distance = np.empty(1024, dtype=np.float32)
    found_position = np.empty(1024, dtype=np.int32)
    n_found = 0
    run = first_pair
    while run < end_pair:
        cell = pair_cell[run] - first_cell
        run_end = run + 1
        while run_end < end_pair and pair_cell[run_end] - first_cell == cell:
            run_end += 1
        row, last_row = cell_start[cell], cell_start[cell + 1]
        while row < last_row:
            width = min(BLOCK, last_row - row)
            if kind != PLAIN or keep.size > 0:
                n_items = gather_block(
                    plain, encoded, kind, low, step, row * dim, width, row, positions, keep,
                    scratch, scratch_positions, kept_columns,
                )  # fmt: skip
                source, offset, item_positions, first_position = scratch, 0, scratch_positions, 0
            else:
                n_items = width
                source, offset, item_positions, first_position = plain, row * dim, positions, row
            for pair in range(run, run_end if n_items > 0 else run):
                query = pair_query[pair]
                square_distances_1(flat, query * dim, dim, source, offset, n_items, squares, 0)
                for i in range(n_items):
                    distance = np.sqrt(squares[i])
                    position = item_positions[first_position + i]
                    if distance <= radius and position != skipped[query]:
                        if n_found == found_query.size:
                            found_query = np.concatenate((found_query, found_query))
                            found_distance = np.concatenate((found_distance, found_distance))
                            found_position = np.concatenate((found_position, found_position))
                        found_query[n_found] = query
                        found_distance[n_found] = distance
                        found_position[n_found] = position
                        n_found += 1
            row += width
        run = run_end
    return found_query[:n_found], found_distance[:n_found], found_position[:n_found]
