"""Candidates -> nearest neighbours: pairs of query and cell, scored cell by cell with a running top-k.

Every kernel adds a pair's squared differences in the order of the dimensions, one fused step each; so a
pair's distance has the same bits whichever kernel, block or group of queries computes it, and equal vectors
tie exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from hqsearch.search.blocks import BLOCK, FLOAT16, PLAIN, SLACK, aligned_floats, decode_bytes, decode_half
from hqsearch.search.instructions import (
    LEAF_KERNEL,
    sum_squares_16,
    sum_squares_32,
    sum_squares_64,
)
from hqsearch.search.topk import NO_ITEM, RANKED_ROW, offer

# Blocks scored before the running top-k looks at them: with more than one it sees few of their items.
CHUNK_BLOCKS = 16
CHUNK = CHUNK_BLOCKS * BLOCK
# Chunks whose items are copied first, decoded or gathered, are smaller: the copies stay in the caches.
COPIED_BLOCKS = 4
COPIED = COPIED_BLOCKS * BLOCK


class Workspace(NamedTuple):
    """Memory that scoring works in.

    Attributes
    ----------
    distances : ndarray of shape (4 * CHUNK,), dtype float32
        Of four queries to the items of a chunk.
    minima, ranked : ndarray
        For `topk.offer`.
    widths : ndarray of shape (CHUNK_BLOCKS,), dtype int64
        Items of each block of the chunk.
    decoded : ndarray of shape (COPIED * embedding_dim + SLACK,), dtype float32
        A chunk whose items were decoded or picked out; empty when chunks are scored where they lie.
    decoded_positions : ndarray of shape (COPIED,), dtype int32
        Positions of its items.
    kept_columns : ndarray of shape (BLOCK,), dtype int32
        Which items of a block are kept.
    """

    distances: np.ndarray
    minima: np.ndarray
    ranked: np.ndarray
    widths: np.ndarray
    decoded: np.ndarray
    decoded_positions: np.ndarray
    kept_columns: np.ndarray


_1, _2, _3, _4 = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
_C1, _C2, _C3 = np.uint64(CHUNK), np.uint64(2 * CHUNK), np.uint64(3 * CHUNK)
_LANES = np.uint64(SLACK)


@njit(**LEAF_KERNEL, fastmath={"contract"})
def square_distances_4(flat, q0, q1, q2, q3, dim, source, offset, width, out, first):
    """Squared distances of four queries (starts in `flat`) to one block: `out[first + g * CHUNK + i]`."""
    # Unsigned indices spare the test for negative ones, which would keep LLVM from vectorising.
    d, w, base = np.uint64(dim), np.uint64(width), np.uint64(offset)
    b0, b1, b2, b3 = np.uint64(q0), np.uint64(q1), np.uint64(q2), np.uint64(q3)
    padded = (w + _LANES - _1) // _LANES * _LANES
    t0 = np.uint64(first)
    t1, t2, t3 = t0 + _C1, t0 + _C2, t0 + _C3
    for lane in range(padded):
        out[t0 + lane] = np.float32(0)
        out[t1 + lane] = np.float32(0)
        out[t2 + lane] = np.float32(0)
        out[t3 + lane] = np.float32(0)
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
            s = out[t0 + i]
            s += (x0 - a00) * (x0 - a00)
            s += (x1 - a01) * (x1 - a01)
            s += (x2 - a02) * (x2 - a02)
            s += (x3 - a03) * (x3 - a03)
            out[t0 + i] = s
            s = out[t1 + i]
            s += (x0 - a10) * (x0 - a10)
            s += (x1 - a11) * (x1 - a11)
            s += (x2 - a12) * (x2 - a12)
            s += (x3 - a13) * (x3 - a13)
            out[t1 + i] = s
            s = out[t2 + i]
            s += (x0 - a20) * (x0 - a20)
            s += (x1 - a21) * (x1 - a21)
            s += (x2 - a22) * (x2 - a22)
            s += (x3 - a23) * (x3 - a23)
            out[t2 + i] = s
            s = out[t3 + i]
            s += (x0 - a30) * (x0 - a30)
            s += (x1 - a31) * (x1 - a31)
            s += (x2 - a32) * (x2 - a32)
            s += (x3 - a33) * (x3 - a33)
            out[t3 + i] = s
    for rest in range(whole * _4, d):
        a00, a10, a20, a30 = flat[b0 + rest], flat[b1 + rest], flat[b2 + rest], flat[b3 + rest]
        o0 = base + rest * w
        for i in range(padded):
            x0 = source[o0 + i]
            out[t0 + i] += (x0 - a00) * (x0 - a00)
            out[t1 + i] += (x0 - a10) * (x0 - a10)
            out[t2 + i] += (x0 - a20) * (x0 - a20)
            out[t3 + i] += (x0 - a30) * (x0 - a30)


@njit(**LEAF_KERNEL)
def square_distances_1(flat, q0, dim, source, offset, width, out, first):
    """Squared distances of one query to one block, bit by bit as `square_distances_4` computes them."""
    if width > 48:
        sum_squares_64(flat, q0, dim, source, offset, width, out, first)
        return
    if width > 16:
        sum_squares_32(flat, q0, dim, source, offset, width, out, first)
    done = 32 if width > 16 else 0
    if width > done:
        sum_squares_16(flat, q0, dim, source, offset + done, width, out, first + done)


@njit(**LEAF_KERNEL, fastmath={"contract"})
def square_distances_apart(flat, q0, dim, source, starts, strides, first, out):
    """Squared distances of one query to eight items that lie apart: ``out[first:first + 8]``.

    The values of item ``i`` are ``source[starts[i] + j * strides[i]]``. Eight sums at once, because each
    addition waits for the one before it.
    """
    o0, o1, o2, o3 = starts[first], starts[first + 1], starts[first + 2], starts[first + 3]
    o4, o5, o6, o7 = starts[first + 4], starts[first + 5], starts[first + 6], starts[first + 7]
    w0, w1, w2, w3 = strides[first], strides[first + 1], strides[first + 2], strides[first + 3]
    w4, w5, w6, w7 = strides[first + 4], strides[first + 5], strides[first + 6], strides[first + 7]
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
    b0 = np.uint64(q0)
    for j in range(np.uint64(dim)):
        a = flat[b0 + j]
        s0 += (source[o0] - a) * (source[o0] - a)
        s1 += (source[o1] - a) * (source[o1] - a)
        s2 += (source[o2] - a) * (source[o2] - a)
        s3 += (source[o3] - a) * (source[o3] - a)
        s4 += (source[o4] - a) * (source[o4] - a)
        s5 += (source[o5] - a) * (source[o5] - a)
        s6 += (source[o6] - a) * (source[o6] - a)
        s7 += (source[o7] - a) * (source[o7] - a)
        o0 += w0
        o1 += w1
        o2 += w2
        o3 += w3
        o4 += w4
        o5 += w5
        o6 += w6
        o7 += w7
    out[first], out[first + 1], out[first + 2], out[first + 3] = s0, s1, s2, s3
    out[first + 4], out[first + 5], out[first + 6], out[first + 7] = s4, s5, s6, s7


@njit(**LEAF_KERNEL)
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


@njit(**LEAF_KERNEL)
def score_chunk(
    flat, dim, skipped, places, first_place, end_place, source, offset, widths, counts, n_blocks,
    item_positions, first_position, work, keys, n_neighbors,
):  # fmt: skip
    """Score a chunk for the queries ``places[first_place:end_place]``.

    Its blocks lie `BLOCK` items apart; each is `widths[block]` wide, of which the first `counts[block]`
    are items.
    """
    distances = work.distances
    words = distances.view(np.int32)
    at_place = first_place
    while at_place < end_place:
        # Two or three are scored as four, the last one again and again: that is faster than one by one.
        n_scored = min(4, end_place - at_place)
        last = at_place + n_scored - 1
        for block in range(n_blocks):
            start = offset + block * dim * BLOCK
            target = block * BLOCK
            if n_scored > 1:
                square_distances_4(
                    flat, places[at_place] * dim, places[at_place + 1] * dim,
                    places[min(at_place + 2, last)] * dim, places[last] * dim,
                    dim, source, start, widths[block], distances, target,
                )  # fmt: skip
            else:
                square_distances_1(
                    flat, places[at_place] * dim, dim, source, start, widths[block], distances, target
                )
            for g in range(n_scored):
                for lane in range(counts[block], BLOCK):
                    words[g * CHUNK + target + lane] = NO_ITEM
        for g in range(n_scored):
            place = places[at_place + g]
            offer(
                words, g * CHUNK, n_blocks, item_positions, first_position,
                skipped[place], keys, place * n_neighbors, n_neighbors, work.minima, work.ranked,
            )  # fmt: skip
        at_place += n_scored


@njit(cache=True, nogil=True)
def make_workspace(dim, decoding):
    """Make the memory that scoring works in, once for all cells; `decoding` says whether cells are copied."""
    n_decoded = COPIED if decoding else 0
    return Workspace(
        aligned_floats(4 * CHUNK),
        aligned_floats(BLOCK).view(np.int32),
        np.empty(max(CHUNK + 1, RANKED_ROW), dtype=np.int64),
        np.empty(CHUNK_BLOCKS, dtype=np.int64),
        aligned_floats(n_decoded * dim + SLACK if decoding else 0),
        np.empty(n_decoded, dtype=np.int32),
        np.empty(BLOCK, dtype=np.int32),
    )


@njit(cache=True, nogil=True)
def score_pairs(
    queries, skipped, pair_query, pair_cell, first_pair, end_pair, first_cell,
    plain, encoded, kind, low, step, cell_start, positions, keep, keys, n_neighbors,
):  # fmt: skip
    """Score the pairs ``first_pair:end_pair``, which are sorted by cell, and update the rows of `keys`.

    Parameters
    ----------
    queries : ndarray of shape (n_planned, embedding_dim), dtype float32
        The queries of this task, side by side.
    skipped : ndarray of shape (n_planned,), dtype int64
        A position to leave out for each of them, -1 for none.
    pair_query, pair_cell : ndarray of shape (n_pairs,), dtype int32
        Rows of `queries`, and cells counted from `first_cell`.
    plain, encoded, kind, low, step, cell_start, positions
        The arrays of a `Segment`.
    keep : ndarray, dtype uint8
        Flag of each position that may be returned; empty when all may.
    keys : ndarray of shape (n_planned * n_neighbors,), dtype int64
        The running rows of least keys, one for each query.
    n_neighbors : int
        Length of a row.
    """
    work = make_workspace(queries.shape[1], kind != PLAIN or keep.size > 0)
    score_large_cells(
        queries.ravel(), queries.shape[1], skipped, pair_query, pair_cell, first_pair, end_pair, first_cell,
        plain, encoded, kind, low, step, cell_start, positions, keep, keys, n_neighbors, work,
    )  # fmt: skip


@njit(**LEAF_KERNEL)
def score_large_cells(
    flat, dim, skipped, pair_query, pair_cell, first_pair, end_pair, first_cell,
    plain, encoded, kind, low, step, cell_start, positions, keep, keys, n_neighbors, work,
):  # fmt: skip
    """Score pairs cell by cell, where the cells lie; the parameters are those of `score_pairs`."""
    decoding = kind != PLAIN or keep.size > 0
    block_size = dim * BLOCK
    widths = work.widths
    run = first_pair
    while run < end_pair:
        cell = pair_cell[run] - first_cell
        run_end = run + 1
        while run_end < end_pair and pair_cell[run_end] - first_cell == cell:
            run_end += 1
        row, last_row = cell_start[cell], cell_start[cell + 1]
        while row < last_row:
            n_rows = min(COPIED if decoding else CHUNK, last_row - row)
            n_blocks = (n_rows + BLOCK - 1) // BLOCK
            n_items = 0
            for block in range(n_blocks):
                at = row + block * BLOCK
                widths[block] = min(BLOCK, last_row - at)
                if decoding:
                    widths[block] = gather_block(
                        plain, encoded, kind, low, step, at * dim, widths[block], at, positions, keep,
                        work.decoded[block * block_size :], work.decoded_positions[block * BLOCK :],
                        work.kept_columns,
                    )  # fmt: skip
                n_items += widths[block]
            if n_items > 0 and decoding:
                score_chunk(
                    flat, dim, skipped, pair_query, run, run_end, work.decoded, 0, widths, widths, n_blocks,
                    work.decoded_positions, 0, work, keys, n_neighbors,
                )  # fmt: skip
            elif n_items > 0:
                score_chunk(
                    flat, dim, skipped, pair_query, run, run_end, plain, row * dim, widths, widths, n_blocks,
                    positions, row, work, keys, n_neighbors,
                )  # fmt: skip
            row += n_rows
        run = run_end
