"""Squared distances -> the least keys of each query: a running top-k that rarely branches.

A neighbour is one int64 key: the bits of its squared distance above its position. Squared distances are not
negative, so keys sort by distance and equal distances by position.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hqsearch.search.blocks import BLOCK

# Above every key of a real item: distance infinity at the highest position.
EMPTY_KEY = np.int64(0x7F800000_7FFFFFFF)
# Bits above infinity, for lanes without an item.
NO_ITEM = np.int32(0x7FFFFFFF)
# Up to this many neighbours a row is kept sorted; longer rows are heaps.
SORTED_ROW = 48
# Up to this many survivors are ranked at once; sorting them one by one mispredicts branches.
_RANKED = 64
_FEW = 3

_BLOCK = np.uint64(BLOCK)


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
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
        # An int32 count keeps the comparison at full vector width.
        count = np.int32(0)
        for i in range(BLOCK):
            count = np.int32(count + np.int32(minima[i] <= middle))
        if count >= size:
            high = np.int64(middle)
            if count <= size + 2:
                break
        else:
            low = np.int64(middle) + 1
    return np.int32(high)


@njit(cache=True, nogil=True)
def count_within(minima, bound):
    """Count the minima of at most `bound`."""
    count = np.int32(0)
    for i in range(BLOCK):
        count = np.int32(count + np.int32(minima[i] <= bound))
    return count


@njit(cache=True, nogil=True)
def offer(words, first, n_blocks, positions, first_position, skipped, keys, start, size, room):
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
    room : tuple of ndarray
        Scratch, as `make_room` gives it.
    """
    minima, lanes, survivors, ranked = room
    worst_place = start + size - 1 if size <= SORTED_ROW else start
    worst = keys[worst_place]
    bound = np.int32(worst >> 32)
    base = np.uint64(first)
    for i in range(_BLOCK):
        minima[i] = words[base + i]
    for block in range(1, n_blocks):
        base += _BLOCK
        for i in range(_BLOCK):
            minima[i] = min(minima[i], words[base + i])
    if size <= SORTED_ROW and (worst == EMPTY_KEY or count_within(minima, bound) > 2 * size):
        # The least items of the lanes are `BLOCK` items, so their size-th least bounds that of all items.
        # The item to leave out may be one of them.
        bound = bound_least(minima, size + (skipped >= 0), bound)
    # Writing first and counting afterwards needs no branch.
    n_lanes = 0
    for i in range(BLOCK):
        lanes[n_lanes] = i
        n_lanes += minima[i] <= bound
    n_survivors = 0
    for i in range(n_lanes):
        for block in range(n_blocks):
            lane = lanes[i] + block * BLOCK
            survivors[n_survivors] = lane
            n_survivors += words[first + lane] <= bound
    n_keys = 0
    for i in range(n_survivors):
        lane = survivors[i]
        position = positions[first_position + lane]
        key = np.int64(words[first + lane]) << 32 | np.int64(position)
        ranked[n_keys] = key
        n_keys += (key < worst) & (position != skipped)
    if n_keys <= _FEW or n_keys > _RANKED or size > SORTED_ROW:
        for i in range(n_keys):
            if ranked[i] < worst:
                insert_key(keys, start, size, ranked[i])
                worst = keys[worst_place]
        return
    if keys[start] != EMPTY_KEY:
        for i in range(size):
            ranked[n_keys] = keys[start + i]
            n_keys += ranked[n_keys] != EMPTY_KEY
    for i in range(n_keys):
        rank = 0
        for j in range(n_keys):
            rank += ranked[j] < ranked[i]
        if rank < size:
            keys[start + rank] = ranked[i]


@njit(cache=True, nogil=True)
def make_room(n_blocks):
    """Make the scratch arrays of `offer` for chunks of at most `n_blocks` blocks."""
    return (
        np.empty(BLOCK, dtype=np.int32),
        np.empty(BLOCK + 1, dtype=np.int64),
        np.empty(n_blocks * BLOCK + 1, dtype=np.int64),
        np.empty(n_blocks * BLOCK + SORTED_ROW + 1, dtype=np.int64),
    )


@njit(cache=True, nogil=True)
def finish_rows(keys, order, n_neighbors, out_distances, out_positions):
    """Write sorted rows of keys as distances and positions; return the least number of neighbours found."""
    bits = np.empty(n_neighbors, dtype=np.int32)
    squares = bits.view(np.float32)
    n_found = n_neighbors
    for place in range(order.size):
        row = keys[place * n_neighbors : (place + 1) * n_neighbors]
        if n_neighbors > SORTED_ROW:
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
