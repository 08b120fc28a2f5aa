"""Compiled exact solver of one level with siblings: shortest paths over classes, buckets and the sink.

The layer of (group, bucket) nodes disappears into the three kinds of arcs of `sibling_groups`, because a path
through such a node is an arc between the classes and buckets on either side of it.

Work bound: each search settles at least one of the at most ``2 * n_classes * sparsity`` units that must
travel (else the solver reports `STATUS_STUCK`) and settles each node once; a settled class relaxes its row
and the buckets of its siblings, a settled bucket its holders.
"""

import numpy as np
from numba import njit

from hqsearch.assignment.bucket_supply import PRICE_LIMIT, REACHABLE, TAKEN, UNREACHED, balance_supply
from hqsearch.assignment.integer_costs import STATUS_OPTIMAL, STATUS_OVERFLOW, STATUS_STUCK
from hqsearch.assignment.sibling_groups import drop, place_groups, take

PATIENCE = 20
"""Nodes that a search settles in vain after its last find, besides as many as the first find took."""


@njit(cache=True, nogil=True)
def branch_is_free(u, sink, roots, branches, used, left, targets, n_found, group, group_counts):
    """Tell whether a unit may leave the root of u along the branch of u, besides those accepted so far.

    Two siblings that leave one bucket save different amounts of sibling cost, so only one of them is on a
    shortest path.
    """
    branch = branches[u]
    root = roots[u]
    if used[branch] or left[root] == 0:
        return False
    if root < sink < branch and group_counts[group[branch - sink - 1], root] > 1:
        for i in range(n_found):
            other = branches[targets[i]]
            if (
                roots[targets[i]] == root
                and other > sink
                and group[other - sink - 1] == group[branch - sink - 1]
            ):
                return False
    return True


@njit(cache=True, nogil=True)
def relax_class(
    u, distance, labels, distances, previous, through, prices, values,
    costs, open_costs, group, start, members, held, n_held,
):  # fmt: skip
    """Extend the search from a class to every bucket that it could take, and to its siblings."""
    n_buckets = costs.shape[1]
    first_class = n_buckets + 1
    c = u - first_class
    base = distance - values[c]
    row = open_costs[c]
    cheapest = UNREACHED
    for t in range(n_buckets):
        label = row[t] + prices[t]
        cheapest = min(cheapest, label)
        label += base
        shorter = label < labels[t]
        labels[t] = label if shorter else labels[t]
        previous[t] = u if shorter else previous[t]
    for i in range(start[group[c]], start[group[c] + 1]):
        r = members[i]
        if r == c:
            continue
        for j in range(n_held[r]):
            t = held[r, j]
            if row[t] != TAKEN:
                handed_on = costs[c, t] - costs[r, t] + values[r]
                cheapest = min(cheapest, handed_on)
                if base + handed_on < labels[first_class + r]:
                    labels[first_class + r] = base + handed_on
                    previous[first_class + r] = u
                    through[r] = t
    if cheapest > values[c]:
        # the value may be as large as the cheapest way out: fewer searches will come by here
        distances[u] += cheapest - values[c]
        values[c] = cheapest


@njit(cache=True, nogil=True)
def grow_trees(
    prices, values, sink_price, sink_excess, orthogonality, supply, excess,
    labels, distances, previous, through, roots, branches, used, left, targets,
    costs, open_costs, sibling, group, start, members, group_counts, held, n_held, holders, counts,
):  # fmt: skip
    """Grow shortest-path trees from all excess at once, and raise prices and values by what they found.

    Returns
    -------
    n_found, sink_price : int64
        The number of `targets` found, and the sink's price after the raise.
    """
    n_classes, n_buckets = costs.shape
    sink = n_buckets
    first_class = n_buckets + 1
    n_nodes = first_class + n_classes
    labels[:] = UNREACHED
    distances[:] = UNREACHED
    previous[:] = -1
    used[:] = False
    n_waiting = 0
    n_deficits = 0
    for t in range(n_buckets + 1):
        units = sink_excess if t == sink else excess[t]
        left[t] = max(units, 0)
        if units > 0:
            labels[t] = 0
        elif units < 0:
            n_deficits += 1
        n_waiting += left[t]
    n_found = 0
    n_settled = 0
    first_find = 0
    idle = 0
    radius = np.int64(0)
    while True:
        # settled nodes carry -1: never lowered, and as unsigned the largest of all
        least = np.uint64(UNREACHED)
        for v in range(n_nodes):
            least = min(least, np.uint64(labels[v]))
        distance = np.int64(least)
        if distance >= REACHABLE:
            break
        if n_found > 0 and distance > radius and idle > PATIENCE + first_find:
            break
        u = 0
        while labels[u] != distance:
            u += 1
        labels[u] = -1
        distances[u] = distance
        radius = distance
        idle += 1
        n_settled += 1
        before = previous[u]
        roots[u] = u if before < 0 else roots[before]
        branches[u] = u if before < 0 or previous[before] < 0 else branches[before]
        if u > sink:
            relax_class(
                u, distance, labels, distances, previous, through, prices, values,
                costs, open_costs, group, start, members, held, n_held,
            )  # fmt: skip
            continue
        if (sink_excess if u == sink else excess[u]) < 0:
            n_deficits -= 1
            if branch_is_free(u, sink, roots, branches, used, left, targets, n_found, group, group_counts):
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
                label = distance - orthogonality * (supply[t] - 1) + prices[t] - sink_price
                if supply[t] > 0 and label < labels[t]:
                    labels[t] = label
                    previous[t] = sink
            continue
        label = distance + orthogonality * supply[u] - prices[u] + sink_price
        if label < labels[sink]:
            labels[sink] = label
            previous[sink] = u
        for i in range(counts[u]):
            r = holders[u, i]
            cost = costs[r, u]
            if start[group[r] + 1] - start[group[r]] > 1:
                cost += sibling * (group_counts[group[r], u] - 1)
            label = distance - prices[u] + values[r] - cost
            if label < labels[first_class + r]:
                labels[first_class + r] = label
                previous[first_class + r] = u
    for t in range(n_buckets):
        prices[t] += max(radius - distances[t], 0)
    for c in range(n_classes):
        values[c] += max(radius - distances[first_class + c], 0)
    return n_found, sink_price + max(radius - distances[sink], 0)


@njit(cache=True, nogil=True)
def send_unit(
    target, previous, through, supply,
    costs, open_costs, sibling, group, start, members, group_counts, held, n_held, places, holders, counts,
):  # fmt: skip
    """Send a unit along the tree path to `target`, walking it backwards; return where it started."""
    sink = costs.shape[1]
    v = target
    while previous[v] >= 0:
        u = previous[v]
        if v == sink:
            supply[u] += 1
        elif u == sink:
            supply[v] -= 1
        elif v < sink:  # class u takes bucket v
            take(
                u - sink - 1, v, costs, open_costs, sibling, group, start, members, group_counts, held,
                n_held, places, holders, counts,
            )  # fmt: skip
        else:  # class v drops bucket u, or the bucket that its sibling u takes over
            bucket = u if u < sink else through[v - sink - 1]
            drop(
                v - sink - 1, bucket, costs, open_costs, sibling, group, start, members, group_counts, held,
                n_held, places, holders, counts,
            )  # fmt: skip
            if u > sink:
                take(
                    u - sink - 1, bucket, costs, open_costs, sibling, group, start, members, group_counts,
                    held, n_held, places, holders, counts,
                )  # fmt: skip
        v = u
    return v


@njit(cache=True, nogil=True)
def sibling_flow(costs, sparsity, sibling, orthogonality, group, start, members):
    """Solve one level with siblings.

    Parameters
    ----------
    costs : ndarray of shape (n_classes, n_buckets), int64
        Cost of each choice.
    sparsity : int
        Buckets a class gets, fewer than `n_buckets`.
    sibling, orthogonality : int64
        Cost of each pair of siblings, and of each pair of classes, that shares a bucket; both positive.
    group, start, members : ndarray, int64
        Groups, as `level_codes.group_members` lists them.

    Returns
    -------
    held : ndarray of shape (n_classes, sparsity + 1), int32
        The buckets of each class in the first `sparsity` columns, in no particular order.
    status : int
        `STATUS_OPTIMAL`, `STATUS_OVERFLOW` or `STATUS_STUCK`.
    work : ndarray of shape (3,), int64
        Units that had to travel at first, the same again, searches.
    """
    n_classes, n_buckets = costs.shape
    open_costs = costs.copy()
    prices = np.zeros(n_buckets, np.int64)
    values = np.zeros(n_classes, np.int64)
    held = np.empty((n_classes, sparsity + 1), np.int32)  # one spare place while a unit passes through
    places = np.empty((n_classes, sparsity + 1), np.int32)
    n_held = np.zeros(n_classes, np.int64)
    holders = np.empty((n_buckets, n_classes), np.int32)
    counts = np.zeros(n_buckets, np.int64)
    group_counts = np.zeros((start.shape[0] - 1, n_buckets), np.int64)
    work = np.zeros(3, np.int64)
    status = place_groups(
        sparsity, prices, values, costs, open_costs, sibling, group, start, members, group_counts, held,
        n_held, places, holders, counts,
    )  # fmt: skip
    if status != STATUS_OPTIMAL:
        return held, status, work

    supply = np.empty(n_buckets, np.int64)
    excess = np.empty(n_buckets, np.int64)
    sink_price, sink_excess, n_left = balance_supply(
        prices, counts, n_classes * sparsity, orthogonality, supply, excess
    )
    work[:2] = n_left
    n_nodes = n_buckets + 1 + n_classes
    labels = np.empty(n_nodes, np.int64)
    distances = np.empty(n_nodes, np.int64)
    previous = np.empty(n_nodes, np.int64)
    roots = np.empty(n_nodes, np.int64)
    branches = np.empty(n_nodes, np.int64)
    through = np.empty(n_classes, np.int64)
    used = np.empty(n_nodes, np.bool_)
    left = np.empty(n_buckets + 1, np.int64)
    targets = np.empty(n_buckets + 1, np.int64)
    while n_left > 0:
        work[2] += 1
        n_found, sink_price = grow_trees(
            prices, values, sink_price, sink_excess, orthogonality, supply, excess,
            labels, distances, previous, through, roots, branches, used, left, targets,
            costs, open_costs, sibling, group, start, members, group_counts, held, n_held, holders, counts,
        )  # fmt: skip
        if n_found == 0:
            return held, STATUS_STUCK, work
        if max(prices.max(), values.max(), sink_price) > PRICE_LIMIT:
            return held, STATUS_OVERFLOW, work
        for i in range(n_found):
            origin = send_unit(
                targets[i], previous, through, supply,
                costs, open_costs, sibling, group, start, members, group_counts, held, n_held, places,
                holders, counts,
            )  # fmt: skip
            for node, change in ((targets[i], 1), (origin, -1)):
                if node == n_buckets:
                    sink_excess += change
                else:
                    excess[node] += change
        n_left -= n_found
    return held, STATUS_OPTIMAL, work
