"""Candidates -> nearest neighbours: pairs of query and cell, scored cell by cell with a running top-k.

A neighbour is one int64 key: the bits of its squared distance above its position. Squared distances are not
negative, so keys sort by distance and equal distances by position. Every kernel adds a pair's squared
differences in the order of the dimensions, one fused step each; so a pair's distance has the same bits
whichever kernel, block or group of queries it is computed in, and equal vectors tie exactly.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hqsearch.search.blocks import BLOCK, FLOAT16, PLAIN, SLACK, decode_bytes, decode_half

# Above every key of a real item: distance infinity at the highest position.
EMPTY_KEY = np.int64(0x7F800000_7FFFFFFF)
# Below this many neighbours shifting a sorted row costs less than repairing a heap.
_SORTED_ROW = 48

_0, _1, _2, _3, _4 = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
_B1, _B2, _B3 = np.uint64(BLOCK), np.uint64(2 * BLOCK), np.uint64(3 * BLOCK)
_LANES = np.uint64(SLACK)


@njit(cache=True, nogil=True, fastmath={"contract"})
def square_distances_4(flat, q0, q1, q2, q3, dim, source, offset, width, out):
    """Squared distances of four queries (starts in `flat`) to one block: `out[g * BLOCK + i]`."""
    # Unsigned indices spare the test for negative ones, which keeps LLVM from vectorising.
    d, w, base = np.uint64(dim), np.uint64(width), np.uint64(offset)
    b0, b1, b2, b3 = np.uint64(q0), np.uint64(q1), np.uint64(q2), np.uint64(q3)
    padded = (w + _LANES - _1) // _LANES * _LANES
    for lane in range(4 * BLOCK):
        out[lane] = np.float32(0)
    whole = d // _4
    for quarter in range(whole):
        j = quarter * _4
        a00, a01, a02, a03 = flat[b0 + j], flat[b0 + j + _1], flat[b0 + j + _2], flat[b0 + j + _3]
        a10, a11, a12, a13 = flat[b1 + j], flat[b1 + j + _1], flat[b1 + j + _2], flat[b1 + j + _3]
        a20, a21, a22, a23 = flat[b2 + j], flat[b2 + j + _1], flat[b2 + j + _2], flat[b2 + j + _3]
        a30, a31, a32, a33 = flat[b3 + j], flat[b3 + j + _1], flat[b3 + j + _2], flat[b3 + j + _3]
        o0 = base + j * w
        o1 = o0 + w
        o2 = o1 + w
        o3 = o2 + w
        for i in range(padded):
            x0, x1, x2, x3 = source[o0 + i], source[o1 + i], source[o2 + i], source[o3 + i]
            s = out[i]
            s += (x0 - a00) * (x0 - a00)
            s += (x1 - a01) * (x1 - a01)
            s += (x2 - a02) * (x2 - a02)
            s += (x3 - a03) * (x3 - a03)
            out[i] = s
            s = out[_B1 + i]
            s += (x0 - a10) * (x0 - a10)
            s += (x1 - a11) * (x1 - a11)
            s += (x2 - a12) * (x2 - a12)
            s += (x3 - a13) * (x3 - a13)
            out[_B1 + i] = s
            s = out[_B2 + i]
            s += (x0 - a20) * (x0 - a20)
            s += (x1 - a21) * (x1 - a21)
            s += (x2 - a22) * (x2 - a22)
            s += (x3 - a23) * (x3 - a23)
            out[_B2 + i] = s
            s = out[_B3 + i]
            s += (x0 - a30) * (x0 - a30)
            s += (x1 - a31) * (x1 - a31)
            s += (x2 - a32) * (x2 - a32)
            s += (x3 - a33) * (x3 - a33)
            out[_B3 + i] = s
    for rest in range(whole * _4, d):
        a00, a10, a20, a30 = flat[b0 + rest], flat[b1 + rest], flat[b2 + rest], flat[b3 + rest]
        o0 = base + rest * w
        for i in range(padded):
            x0 = source[o0 + i]
            out[i] += (x0 - a00) * (x0 - a00)
            out[_B1 + i] += (x0 - a10) * (x0 - a10)
            out[_B2 + i] += (x0 - a20) * (x0 - a20)
            out[_B3 + i] += (x0 - a30) * (x0 - a30)


@njit(cache=True, nogil=True, fastmath={"contract"})
def square_distances_1(flat, q0, dim, source, offset, width, out):
    """Squared distances of one query to one block: `out[i]`, bit by bit as in `square_distances_4`."""
    d, w, base, b0 = np.uint64(dim), np.uint64(width), np.uint64(offset), np.uint64(q0)
    padded = (w + _LANES - _1) // _LANES * _LANES
    for lane in range(padded):
        out[lane] = np.float32(0)
    whole = d // _4
    for quarter in range(whole):
        j = quarter * _4
        a00, a01, a02, a03 = flat[b0 + j], flat[b0 + j + _1], flat[b0 + j + _2], flat[b0 + j + _3]
        o0 = base + j * w
        o1 = o0 + w
        o2 = o1 + w
        o3 = o2 + w
        for i in range(padded):
            x0, x1, x2, x3 = source[o0 + i], source[o1 + i], source[o2 + i], source[o3 + i]
            s = out[i]
            s += (x0 - a00) * (x0 - a00)
            s += (x1 - a01) * (x1 - a01)
            s += (x2 - a02) * (x2 - a02)
            s += (x3 - a03) * (x3 - a03)
            out[i] = s
    for rest in range(whole * _4, d):
        a00 = flat[b0 + rest]
        o0 = base + rest * w
        for i in range(padded):
            x0 = source[o0 + i]
            out[i] += (x0 - a00) * (x0 - a00)


@njit(cache=True, nogil=True)
def insert_key(keys, start, size, key):
    """Put `key`, lower than the worst one, into the row `keys[start:start + size]` and drop the worst.

    Short rows are kept sorted, the worst last; long rows are heaps, the worst first.
    """
    if size <= _SORTED_ROW:
        i = start + size - 1
        while i > start and keys[i - 1] > key:
            keys[i] = keys[i - 1]
            i -= 1
        keys[i] = key
        return
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and keys[start + child + 1] > keys[start + child]:
            child += 1
        if keys[start + child] <= key:
            break
        keys[start + i] = keys[start + child]
        i = child
    keys[start + i] = key


@njit(cache=True, nogil=True)
def offer(distances, words, first, width, block_positions, block_first, skipped, keys, start, size):
    """Offer a block's squared distances to one query's row; `skipped` is a position to leave out, or -1."""
    last = start + size - 1 if size <= _SORTED_ROW else start
    worst = np.int64(keys[last])
    worst_word = np.int32(worst >> 32)
    for i in range(width):
        # Bits of non-negative floats sort as the floats do; finite vectors never give NaN here.
        if words[first + i] <= worst_word:
            position = block_positions[block_first + i]
            key = np.int64(words[first + i]) << 32 | np.int64(position)
            if key < worst and position != skipped:
                insert_key(keys, start, size, key)
                worst = np.int64(keys[last])
                worst_word = np.int32(worst >> 32)


@njit(cache=True, nogil=True)
def gather_block(
    plain,
    encoded,
    kind,
    low,
    step,
    offset,
    width,
    row,
    positions,
    keep,
    source,
    block_positions,
    kept_columns,
):
    """Write the kept items of a block, decoded, into `source` and `block_positions`; return their number."""
    n_kept = width
    if keep.size > 0:
        n_kept = 0
        for i in range(width):
            if keep[positions[row + i]] != 0:
                kept_columns[n_kept] = i
                block_positions[n_kept] = positions[row + i]
                n_kept += 1
        if n_kept == 0:
            return 0
    else:
        for i in range(width):
            kept_columns[i] = i
            block_positions[i] = positions[row + i]
    dim = low.size
    if kind == PLAIN:
        for j in range(dim):
            for i in range(n_kept):
                source[j * n_kept + i] = plain[offset + j * width + kept_columns[i]]
        return n_kept
    if kind == FLOAT16:
        decode_half(encoded.view(np.uint16), offset, dim * width, source)
    else:
        decode_bytes(encoded, offset, width, low, step, source)
    if n_kept < width:
        # In place: the target of every move lies at or before its origin.
        for j in range(dim):
            for i in range(n_kept):
                source[j * n_kept + i] = source[j * width + kept_columns[i]]
    return n_kept


@njit(cache=True, nogil=True)
def score_pairs(
    queries,
    order,
    pair_query,
    pair_cell,
    first_pair,
    end_pair,
    first_cell,
    plain,
    encoded,
    kind,
    low,
    step,
    cell_start,
    positions,
    keep,
    skipped,
    keys,
    n_neighbors,
):
    """Score the pairs ``first_pair:end_pair``, which are sorted by cell, and update the rows of `keys`.

    `pair_query` holds places in `order`, `pair_cell` cells counted from `first_cell`; `keys` is flat, a
    row per place.
    """
    dim = queries.shape[1]
    flat = queries.ravel()
    distances = np.empty(4 * BLOCK, dtype=np.float32)
    words = distances.view(np.int32)
    decoding = kind != PLAIN or keep.size > 0
    scratch = np.zeros(dim * BLOCK + SLACK if decoding else 0, dtype=np.float32)
    scratch_positions = np.empty(BLOCK, dtype=np.int32)
    kept_columns = np.empty(BLOCK, dtype=np.int32)
    run = first_pair
    while run < end_pair:
        cell = pair_cell[run] - first_cell
        run_end = run + 1
        while run_end < end_pair and pair_cell[run_end] - first_cell == cell:
            run_end += 1
        row = cell_start[cell]
        last_row = cell_start[cell + 1]
        while row < last_row:
            width = min(BLOCK, last_row - row)
            if decoding:
                n_items = gather_block(
                    plain, encoded, kind, low, step, row * dim, width, row, positions, keep,
                    scratch, scratch_positions, kept_columns,
                )  # fmt: skip
                source, offset, block_positions, block_first = (
                    scratch,
                    np.int64(0),
                    scratch_positions,
                    np.int64(0),
                )
            else:
                n_items = width
                source, offset, block_positions, block_first = plain, row * dim, positions, row
            pair = run
            while n_items > 0 and pair < run_end:
                if pair + 4 <= run_end:
                    square_distances_4(
                        flat,
                        order[pair_query[pair]] * dim,
                        order[pair_query[pair + 1]] * dim,
                        order[pair_query[pair + 2]] * dim,
                        order[pair_query[pair + 3]] * dim,
                        dim, source, offset, n_items, distances,
                    )  # fmt: skip
                    n_scored = 4
                else:
                    square_distances_1(
                        flat, order[pair_query[pair]] * dim, dim, source, offset, n_items, distances
                    )
                    n_scored = 1
                for g in range(n_scored):
                    place = pair_query[pair + g]
                    offer(
                        distances, words, g * BLOCK, n_items, block_positions, block_first,
                        skipped[order[place]], keys, place * n_neighbors, n_neighbors,
                    )  # fmt: skip
                pair += n_scored
            row += width
        run = run_end


@njit(cache=True, nogil=True)
def finish_rows(keys, order, n_neighbors, out_distances, out_positions):
    """Write sorted rows of keys as distances and positions; return the least number of neighbours found."""
    bits = np.empty(n_neighbors, dtype=np.int32)
    squares = bits.view(np.float32)
    n_found = n_neighbors
    for place in range(order.size):
        row = keys[place * n_neighbors : (place + 1) * n_neighbors]
        if n_neighbors > _SORTED_ROW:
            row.sort()
        query = order[place]
        for i in range(n_neighbors):
            bits[i] = np.int32(row[i] >> 32)
        for i in range(n_neighbors):
            out_distances[query, i] = np.sqrt(squares[i])
            if row[i] == EMPTY_KEY:
                out_positions[query, i] = -1
                n_found = min(n_found, i)
            else:
                out_positions[query, i] = row[i] & np.int64(0x7FFFFFFF)
    return n_found
