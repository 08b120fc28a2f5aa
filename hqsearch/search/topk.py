"""Squared distances -> the least keys of each query: a running top-k that rarely branches.

A neighbour is one int64 key: the bits of its squared distance above its position. Squared distances are not
negative, so keys sort by distance and equal distances by position.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hqsearch.search.blocks import BLOCK, LINE
from hqsearch.search.instructions import (
    AHEAD,
    LEAF_KERNEL,
    bits_at_most,
    bits_below,
    count_bits,
    lowest_bit,
    prefetch,
    take_minima,
)

# Above every key of a real item: distance infinity at the highest position.
EMPTY_KEY = np.int64(0x7F800000_7FFFFFFF)
# Bits above infinity, for lanes without an item.
NO_ITEM = np.int32(0x7FFFFFFF)
# Up to this many neighbours a row is kept sorted; longer rows are heaps.
SORTED_ROW = 48
# Keys that are ranked at once, those of the row among them: sorting one by one mispredicts branches.
RANKED_ROW = 128
_KEYS_AT_ONCE = 32
_FEW = 3
# So many more minima than are needed may pass a bound: finding a better one takes longer.
_SPARE = 2


@njit(**LEAF_KERNEL)
def insert_key(keys, start, size, key):
    """Put `key`, lower than the worst one, into the row ``keys[start:start + size]`` and drop the worst.

    Short rows are sorted, the worst last; long rows are heaps, the worst first.
    """
    if size <= SORTED_ROW:
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


@njit(**LEAF_KERNEL)
def bound_least(minima, size, highest):
    """Give a value of at most `highest` that at least `size` minima do not exceed, and not many more.

    Returns `highest` when fewer than `size` minima lie under it.
    """
    lowest, top = minima[0], minima[0]
    for i in range(BLOCK):
        lowest = min(lowest, minima[i])
        top = max(top, minima[i])
    low, high = np.int64(lowest), np.int64(min(top, highest))
    while low < high:
        middle = np.int32((low + high) >> 1)
        count = count_bits(bits_at_most(minima, 0, middle))
        if count >= size:
            high = np.int64(middle)
            if count <= size + _SPARE:
                break
        else:
            low = np.int64(middle) + 1
    return np.int32(high)


@njit(**LEAF_KERNEL)
def rank_keys(ranked, n_keys, keys, start, size):
    """Write the least `size` of the first `n_keys` keys of `ranked`, sorted, to ``keys[start:]``.

    `ranked` has room for `RANKED_ROW` keys; the others in it are overwritten.
    """
    end = (n_keys + _KEYS_AT_ONCE - 1) // _KEYS_AT_ONCE * _KEYS_AT_ONCE
    for i in range(n_keys, end):
        ranked[i] = EMPTY_KEY
    for i in range(n_keys):
        rank = count_bits(bits_below(ranked, 0, ranked[i]))
        for first in range(_KEYS_AT_ONCE, end, _KEYS_AT_ONCE):
            rank += count_bits(bits_below(ranked, first, ranked[i]))
        if rank < size:
            keys[start + rank] = ranked[i]


@njit(**LEAF_KERNEL)
def offer(words, first, n_blocks, positions, first_position, skipped, keys, start, size, minima, ranked):
    """Offer the squared distances of a chunk to one query's row of keys.

    Parameters
    ----------
    words : ndarray, dtype int32
        Bits of squared distances; those at ``first + lane`` belong to the item at
        ``positions[first_position + lane]``. Lanes without an item hold `NO_ITEM`.
    n_blocks : int
        The chunk has ``n_blocks * BLOCK`` lanes.
    skipped : int
        A position to leave out, or -1.
    keys : ndarray, dtype int64
        Rows of keys; this query's is ``keys[start:start + size]``.
    minima : ndarray of shape (BLOCK,), dtype int32
        Memory to work in.
    ranked : ndarray of shape (max(n_lanes + 1, RANKED_ROW),), dtype int64
        Likewise.
    """
    worst_place = start + size - 1 if size <= SORTED_ROW else start
    worst = keys[worst_place]
    bound = np.int32(worst >> 32)
    n_close = np.int64(0)
    for block in range(n_blocks):
        n_close += count_bits(bits_at_most(words, first + block * BLOCK, bound))
    if n_close == 0:
        return
    if size <= SORTED_ROW and n_close > 2 * size:
        # The least items of the lanes are `BLOCK` items, so their size-th least bounds that of all items.
        # The item to leave out may be one of them.
        take_minima(words, first, words, first, minima)
        for block in range(1, n_blocks):
            take_minima(minima, 0, words, first + block * BLOCK, minima)
        bound = bound_least(minima, size + (skipped >= 0), bound)
    n_keys = 0
    for block in range(n_blocks):
        bits = bits_at_most(words, first + block * BLOCK, bound)
        while bits != 0:
            lane = block * BLOCK + lowest_bit(bits)
            bits &= bits - np.uint64(1)
            position = positions[first_position + lane]
            key = np.int64(words[first + lane]) << 32 | np.int64(position)
            # Writing first and counting afterwards needs no branch.
            ranked[n_keys] = key
            n_keys += (key < worst) & (position != skipped)
    if n_keys <= _FEW or n_keys > RANKED_ROW - SORTED_ROW or size > SORTED_ROW:
        for i in range(n_keys):
            if ranked[i] < worst:
                insert_key(keys, start, size, ranked[i])
                worst = keys[worst_place]
        return
    if keys[start] != EMPTY_KEY:
        for i in range(size):
            ranked[n_keys + i] = keys[start + i]
        n_keys += size
    rank_keys(ranked, n_keys, keys, start, size)


@njit(**LEAF_KERNEL)
def write_row(keys, start, size, query, bits, out_distances, out_positions):
    """Write a sorted row of keys as a row of the results; return the number of neighbours found."""
    squares = bits.view(np.float32)
    for i in range(size):
        bits[i] = np.int32(keys[start + i] >> 32)
    n_found = size
    for i in range(size):
        key = keys[start + i]
        out_distances[query, i] = np.sqrt(squares[i])
        out_positions[query, i] = np.int64(-1) if key == EMPTY_KEY else key & np.int64(0x7FFFFFFF)
        n_found -= key == EMPTY_KEY
    return n_found


@njit(cache=True, nogil=True)
def finish_rows(keys, order, n_neighbors, out_distances, out_positions):
    """Write rows of keys as sorted distances and positions; return the least number of neighbours found."""
    bits = np.empty(n_neighbors, dtype=np.int32)
    n_found = n_neighbors
    flat_distances, flat_positions = out_distances.ravel(), out_positions.ravel()
    for place in range(order.size):
        # Rows are written here and there: each is asked for before its turn comes.
        ahead = order[min(place + AHEAD, order.size - 1)] * n_neighbors
        for i in range(ahead, ahead + n_neighbors, LINE // 8):
            prefetch(flat_distances, i)
            prefetch(flat_positions, i)
        start = place * n_neighbors
        if n_neighbors > SORTED_ROW:
            keys[start : start + n_neighbors].sort()
        found = write_row(keys, start, n_neighbors, order[place], bits, out_distances, out_positions)
        n_found = min(n_found, found)
    return n_found
