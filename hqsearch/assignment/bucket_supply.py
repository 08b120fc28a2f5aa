"""Compiled pieces that both flow kernels share: smallest entries, and supply of buckets at given prices.

Vocabulary of the kernels. A *price* is the dual variable of a bucket: what one more class there costs the
rest. At given prices each class holds its cheapest buckets, and each bucket passes on to the sink the number
of units that its price pays for, its *supply*. A bucket that is held by more classes than that has an
*excess*, by fewer a deficit. Flow and prices then satisfy complementary slackness everywhere, and shortest
paths from excess to deficit keep it so, until nothing is left over: that is an optimal flow.
"""

import numpy as np
from numba import njit

UNREACHED = np.int64(2**62)
TAKEN = np.int64(2**61)
"""Stands in the table of costs for a bucket that the class holds already."""
REACHABLE = np.int64(2**60)
"""Labels below it are real path lengths; `COST_LIMIT` keeps these far away from it."""
PRICE_LIMIT = np.int64(2**59)
BLOCK = 32


@njit(cache=True, nogil=True)
def smallest_entries(row, n_smallest, positions, values):
    """Write positions and values of the smallest entries of `row`, ascending, ties to the lower position.

    The row is overwritten. Minima of blocks are kept, as finding them vectorises and a heap does not.
    """
    n_entries = row.shape[0]
    n_blocks = (n_entries + BLOCK - 1) // BLOCK
    block_minima = np.empty(n_blocks, np.int64)
    for b in range(n_blocks):
        least = UNREACHED
        for t in range(b * BLOCK, min((b + 1) * BLOCK, n_entries)):
            least = min(least, row[t])
        block_minima[b] = least
    for j in range(n_smallest):
        b = 0
        for other in range(1, n_blocks):
            if block_minima[other] < block_minima[b]:
                b = other
        first, stop = b * BLOCK, min((b + 1) * BLOCK, n_entries)
        position = first
        while row[position] != block_minima[b]:
            position += 1
        positions[j] = position
        values[j] = block_minima[b]
        row[position] = UNREACHED
        least = UNREACHED
        for t in range(first, stop):
            least = min(least, row[t])
        block_minima[b] = least


@njit(cache=True, nogil=True)
def balance_supply(prices, counts, n_units, orthogonality, supply, excess):
    """Set the sink's price so that supply meets demand as nearly as can be, and fill `supply` and `excess`.

    With price difference ``a = price - sink_price``, a bucket passes on x units where ``orthogonality * (x -
    1) <= a <= orthogonality * x``: one choice of x, or two where `a` is a multiple.

    Returns
    -------
    sink_price, sink_excess, n_left : int64
        The excess is negative where the sink still waits for units; `n_left` units must travel.
    """
    n_buckets = prices.shape[0]
    low = prices.min() - orthogonality * (n_units + 1)
    high = prices.max() + orthogonality
    while high - low > 1:  # the highest price at which the buckets can pass on n_units
        middle = low + (high - low) // 2
        total = 0
        for t in range(n_buckets):
            if prices[t] >= middle:
                total += (prices[t] - middle) // orthogonality + 1
        if total >= n_units:
            low = middle
        else:
            high = middle
    sink_price = low

    total = 0
    n_undecided = 0
    for t in range(n_buckets):
        above = prices[t] - sink_price
        supply[t] = 0
        if above >= 0:
            supply[t] = above // orthogonality
            if supply[t] * orthogonality != above or counts[t] > supply[t]:
                supply[t] += 1
            else:
                n_undecided += 1
        total += supply[t]
    if 2 * (n_units - total) >= n_undecided:
        # few would be spared: ask every undecided bucket for its unit, instead of all units through the one
        # sink
        for t in range(n_buckets):
            if prices[t] >= sink_price and supply[t] * orthogonality == prices[t] - sink_price:
                supply[t] += 1
                total += 1
    n_left = max(total - n_units, 0)
    for t in range(n_buckets):
        excess[t] = counts[t] - supply[t]
        n_left += max(excess[t], 0)
    return sink_price, total - n_units, n_left
