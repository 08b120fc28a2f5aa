"""Compiled exact solver of one level without siblings: shortest paths on the exchanges between buckets.

Without a sibling penalty a unit that leaves bucket t for bucket b is one class that holds t taking b instead,
at cost ``exchange[t, b] = min over classes that hold t and not b of cost[c, b] - cost[c, t]``. So classes
need no nodes: the residual network is a dense table of branching_factor**2 exchanges plus the sink, kept up
to date as classes move.

Work bound: each phase settles at least one of the at most ``2 * n_classes * sparsity`` units that must travel
(else the solver reports `STATUS_STUCK`), settles each bucket once, and a settled bucket relaxes one row;
before it at most `SHEDDING_ROUNDS` exchanges a unit are made.
"""

import numpy as np
from numba import njit

from hqsearch.assignment.bucket_supply import (
    PRICE_LIMIT,
    REACHABLE,
    TAKEN,
    UNREACHED,
    balance_supply,
    smallest_entries,
)
from hqsearch.assignment.integer_costs import STATUS_OPTIMAL, STATUS_OVERFLOW, STATUS_STUCK

SHEDDING_ROUNDS = 4
PATIENCE = 10
"""Buckets that a search settles in vain after its last find, besides as many as the first find took."""


@njit(cache=True, nogil=True)
def fill_exchange_row(t, costs, open_costs, holders, counts, exchange):
    """Compute the cheapest exchanges out of bucket t from its holders."""
    n_buckets = costs.shape[1]
    for i in range(counts[t]):
        c = holders[t, i]
        held_cost = costs[c, t]
        if i == 0:
            for b in range(n_buckets):
                exchange[t, b] = open_costs[c, b] - held_cost
        else:
            for b in range(n_buckets):
                exchange[t, b] = min(exchange[t, b], open_costs[c, b] - held_cost)


@njit(cache=True, nogil=True)
def fill_exchange_entry(t, b, costs, open_costs, holders, counts, exchange):
    """Compute the cheapest exchange of bucket t for bucket b."""
    least = UNREACHED
    for i in range(counts[t]):
        c = holders[t, i]
        least = min(least, open_costs[c, b] - costs[c, t])
    exchange[t, b] = least


@njit(cache=True, nogil=True)
def move_class(c, t, b, costs, open_costs, held, places, holders, counts, exchange):
    """Let class c hold bucket b instead of t, and mend the exchanges that this touches."""
    n_buckets = costs.shape[1]
    j = 0
    while held[c, j] != t:
        j += 1
    n_left = counts[t] - 1
    counts[t] = n_left
    if places[c, j] != n_left:  # the last holder fills the gap
        other = holders[t, n_left]
        holders[t, places[c, j]] = other
        q = 0
        while held[other, q] != t:
            q += 1
        places[other, q] = places[c, j]
    held[c, j] = b
    places[c, j] = counts[b]
    holders[b, counts[b]] = c
    counts[b] += 1

    held_cost = costs[c, t]
    few = 4  # up to here a whole row is cheaper than asking which entries were this class's
    if n_left > few:
        for x in range(n_buckets):
            if exchange[t, x] == open_costs[c, x] - held_cost:
                fill_exchange_entry(t, x, costs, open_costs, holders, counts, exchange)
    open_costs[c, t] = held_cost
    open_costs[c, b] = TAKEN
    if n_left <= few:
        fill_exchange_row(t, costs, open_costs, holders, counts, exchange)
    for q in range(held.shape[1]):  # from its other buckets, c can't go to b any more, but to t
        s = held[c, q]
        if s != b:
            if exchange[s, b] == costs[c, b] - costs[c, s]:
                fill_exchange_entry(s, b, costs, open_costs, holders, counts, exchange)
            exchange[s, t] = min(exchange[s, t], held_cost - costs[c, s])
    held_cost = costs[c, b]
    if counts[b] == 1:
        for x in range(n_buckets):
            exchange[b, x] = open_costs[c, x] - held_cost
    else:
        for x in range(n_buckets):
            exchange[b, x] = min(exchange[b, x], open_costs[c, x] - held_cost)


@njit(cache=True, nogil=True)
def move_cheapest(t, b, costs, open_costs, held, places, holders, counts, exchange):
    """Make the exchange of t for b that its table entry stands for."""
    i = 0
    while open_costs[holders[t, i], b] - costs[holders[t, i], t] != exchange[t, b]:
        i += 1
    move_class(holders[t, i], t, b, costs, open_costs, held, places, holders, counts, exchange)


@njit(cache=True, nogil=True)
def shed(
    n_left, prices, sink_price, sink_excess, orthogonality, supply, excess,
    costs, open_costs, held, places, holders, counts, exchange,
):  # fmt: skip
    """Let buckets with an excess pass it on step by step, raising their prices, within a budget of steps.

    A bucket raises its price to its cheapest way out and takes that way; once rid of the excess it raises the
    price once more, so that the class it sent away does not come straight back. It is the row reduction of
    Jonker and Volgenant with buckets for rows, and it spares the search most of the short paths.

    Returns
    -------
    n_left, sink_excess : int64
        As in `balance_supply`, after these steps.
    """
    n_buckets = prices.shape[0]
    budget = SHEDDING_ROUNDS * (n_left + 1)
    queue = np.empty(n_buckets, np.int64)
    queued = np.zeros(n_buckets, np.bool_)
    first = 0
    length = 0
    for t in range(n_buckets):
        if excess[t] > 0:
            queue[length] = t
            queued[t] = True
            length += 1
    while length > 0 and budget > 0:
        t = queue[first]
        first = first + 1 if first + 1 < n_buckets else 0
        length -= 1
        queued[t] = False
        while budget > 0:
            budget -= 1
            ways = exchange[t]
            cheapest = UNREACHED
            for b in range(n_buckets):
                cheapest = min(cheapest, ways[b] + prices[b])
            through_sink = orthogonality * supply[t] + sink_price
            if excess[t] == 0:
                prices[t] = min(cheapest, through_sink)
                break
            if through_sink <= cheapest:
                prices[t] = through_sink
                if sink_excess >= 0:
                    break
                supply[t] += 1
                sink_excess += 1
                excess[t] -= 1
                n_left -= 1
                continue
            prices[t] = cheapest
            b = n_buckets
            for x in range(n_buckets):
                b = min(b, x if ways[x] + prices[x] == cheapest else n_buckets)
            move_cheapest(t, b, costs, open_costs, held, places, holders, counts, exchange)
            excess[t] -= 1
            if excess[b] < 0:
                n_left -= 1
            excess[b] += 1
            if excess[b] > 0 and not queued[b]:
                queue[first + length if first + length < n_buckets else first + length - n_buckets] = b
                queued[b] = True
                length += 1
    return n_left, sink_excess


@njit(cache=True, nogil=True)
def grow_trees(
    prices, sink_price, sink_excess, orthogonality, supply, excess, counts, exchange,
    labels, distances, previous, roots, branches, used, left, targets,
):  # fmt: skip
    """Grow shortest-path trees from all excess at once, and raise prices by what they found.

    It stops when every unit of excess has a deficit of its own to go to, or when the search has settled too
    many nodes since the last find. Two units of one root may leave along different branches, never along one.

    Returns
    -------
    n_found, sink_price : int64
        The number of `targets` found, and the sink's price after the raise.
    """
    n_buckets = prices.shape[0]
    sink = n_buckets
    n_waiting = 0
    n_deficits = 0
    for t in range(n_buckets + 1):
        units = sink_excess if t == sink else excess[t]
        labels[t] = 0 if units > 0 else UNREACHED
        left[t] = max(units, 0)
        previous[t] = -1
        distances[t] = UNREACHED
        used[t] = False
        n_waiting += left[t]
        n_deficits += 1 if units < 0 else 0
    n_found = 0
    n_settled = 0
    first_find = 0
    idle = 0
    radius = np.int64(0)
    while True:
        # settled nodes carry -1: never lowered, and as unsigned the largest of all
        least = np.uint64(UNREACHED)
        for v in range(n_buckets + 1):
            least = min(least, np.uint64(labels[v]))
        distance = np.int64(least)
        if distance >= REACHABLE:
            break
        if n_found > 0 and distance > radius and idle > PATIENCE + first_find:
            break
        u = n_buckets + 1
        for v in range(n_buckets + 1):
            u = min(u, v if labels[v] == distance else n_buckets + 1)
        labels[u] = -1
        distances[u] = distance
        radius = distance
        idle += 1
        n_settled += 1
        before = previous[u]
        roots[u] = u if before < 0 else roots[before]
        branches[u] = u if before < 0 or previous[before] < 0 else branches[before]
        if (sink_excess if u == sink else excess[u]) < 0:
            n_deficits -= 1
            if not used[branches[u]] and left[roots[u]] > 0:
                used[branches[u]] = True
                left[roots[u]] -= 1
                n_waiting -= 1
                targets[n_found] = u
                n_found += 1
                if n_found == 1:
                    first_find = n_settled
                idle = 0
            if n_waiting == 0 or n_deficits == 0:
                break
        if u == sink:
            for t in range(n_buckets):
                if supply[t] > 0:
                    label = distance - orthogonality * (supply[t] - 1) + prices[t] - sink_price
                    if label < labels[t]:
                        labels[t] = label
                        previous[t] = sink
            continue
        label = distance + orthogonality * supply[u] - prices[u] + sink_price
        if label < labels[sink]:
            labels[sink] = label
            previous[sink] = u
        if counts[u] > 0:
            base = distance - prices[u]
            ways = exchange[u]
            for t in range(n_buckets):
                label = base + ways[t] + prices[t]
                shorter = label < labels[t]
                labels[t] = label if shorter else labels[t]
                previous[t] = u if shorter else previous[t]
    for t in range(n_buckets):
        prices[t] += max(radius - distances[t], 0)
    return n_found, sink_price + max(radius - distances[sink], 0)


@njit(cache=True, nogil=True)
def path_is_tight(target, previous, prices, sink_price, orthogonality, supply, exchange):
    """Tell whether every arc of the path to `target` has reduced cost zero as things stand now."""
    sink = prices.shape[0]
    v = target
    while previous[v] >= 0:
        u = previous[v]
        if v == sink:
            slack = orthogonality * supply[u] - prices[u] + sink_price
        elif u == sink:
            slack = prices[v] - sink_price - orthogonality * (supply[v] - 1) if supply[v] > 0 else 1
        else:
            slack = exchange[u, v] + prices[v] - prices[u]
        if slack != 0:
            return False
        v = u
    return True


@njit(cache=True, nogil=True)
def exchange_flow(costs, sparsity, orthogonality):
    """Solve one level without siblings.

    Parameters
    ----------
    costs : ndarray of shape (n_classes, n_buckets), int64
        Cost of each choice.
    sparsity : int
        Buckets a class gets, fewer than `n_buckets`.
    orthogonality : int64
        Cost of each pair of classes that shares a bucket.

    Returns
    -------
    held : ndarray of shape (n_classes, sparsity), int32
        The buckets of each class, in no particular order.
    status : int
        `STATUS_OPTIMAL`, `STATUS_OVERFLOW` or `STATUS_STUCK`.
    work : ndarray of shape (3,), int64
        Units that had to travel at first, units left to search for after shedding, searches.
    prices : ndarray of shape (n_buckets,), int64
        What one more class in a bucket costs the rest: the dual variables, the sink's being 0.
    """
    n_classes, n_buckets = costs.shape
    open_costs = costs.copy()
    held = np.empty((n_classes, sparsity), np.int32)
    places = np.empty((n_classes, sparsity), np.int32)
    holders = np.empty((n_buckets, n_classes), np.int32)
    counts = np.zeros(n_buckets, np.int64)
    work = np.zeros(3, np.int64)
    row = np.empty(n_buckets, np.int64)
    positions = np.empty(sparsity, np.int64)
    values = np.empty(sparsity, np.int64)
    for c in range(n_classes):
        row[:] = costs[c]
        smallest_entries(row, sparsity, positions, values)
        for j in range(sparsity):
            t = positions[j]
            held[c, j] = t
            places[c, j] = counts[t]
            holders[t, counts[t]] = c
            counts[t] += 1
            open_costs[c, t] = TAKEN
    if orthogonality == 0:
        return held, STATUS_OPTIMAL, work, np.zeros(n_buckets, np.int64)

    prices = np.zeros(n_buckets, np.int64)
    supply = np.empty(n_buckets, np.int64)
    excess = np.empty(n_buckets, np.int64)
    sink_price, sink_excess, n_left = balance_supply(
        prices, counts, n_classes * sparsity, orthogonality, supply, excess
    )
    work[0] = n_left
    if n_left == 0:
        return held, STATUS_OPTIMAL, work, prices - sink_price
    exchange = np.empty((n_buckets, n_buckets), np.int64)
    for t in range(n_buckets):
        fill_exchange_row(t, costs, open_costs, holders, counts, exchange)
    n_left, sink_excess = shed(
        n_left, prices, sink_price, sink_excess, orthogonality, supply, excess,
        costs, open_costs, held, places, holders, counts, exchange,
    )  # fmt: skip
    work[1] = n_left

    n_nodes = n_buckets + 1
    labels = np.empty(n_nodes, np.int64)
    distances = np.empty(n_nodes, np.int64)
    previous = np.empty(n_nodes, np.int64)
    roots = np.empty(n_nodes, np.int64)
    branches = np.empty(n_nodes, np.int64)
    left = np.empty(n_nodes, np.int64)
    targets = np.empty(n_nodes, np.int64)
    used = np.empty(n_nodes, np.bool_)
    while n_left > 0:
        work[2] += 1
        n_found, sink_price = grow_trees(
            prices, sink_price, sink_excess, orthogonality, supply, excess, counts, exchange,
            labels, distances, previous, roots, branches, used, left, targets,
        )  # fmt: skip
        if max(prices.max(), sink_price) > PRICE_LIMIT:
            return held, STATUS_OVERFLOW, work, prices
        n_settled = 0
        for i in range(n_found):
            # two branches of one root may both rest on the same class: then the second waits for the next
            # search
            v = targets[i]
            if not path_is_tight(v, previous, prices, sink_price, orthogonality, supply, exchange):
                continue
            n_settled += 1
            if v == n_buckets:
                sink_excess += 1
            else:
                excess[v] += 1
            while previous[v] >= 0:
                u = previous[v]
                if v == n_buckets:
                    supply[u] += 1
                elif u == n_buckets:
                    supply[v] -= 1
                else:
                    move_cheapest(u, v, costs, open_costs, held, places, holders, counts, exchange)
                v = u
            if v == n_buckets:
                sink_excess -= 1
            else:
                excess[v] -= 1
        if n_settled == 0:
            return held, STATUS_STUCK, work, prices
        n_left -= n_settled
    return held, STATUS_OPTIMAL, work, prices - sink_price
