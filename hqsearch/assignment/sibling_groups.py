"""Compiled bookkeeping of classes with siblings, and their best placement inside a group.

Bucket prices are given here. A class holds buckets; ``open_costs[c, t]`` is what one more choice would cost:
the cost of (c, t) plus a sibling cost for each sibling that holds t, or `TAKEN` where c holds t itself. The
*value* of a class is its dual variable: no bucket that it holds costs more, none that it could take costs
less. Three kinds of residual arcs remain, none of which may have negative reduced cost:

* c takes t:           ``open_costs[c, t] + prices[t] - values[c]``
* c drops t:           ``values[c] - (cost[c, t] + sibling * (other siblings at t)) - prices[t]``
* c takes t from its sibling r:  ``cost[c, t] - cost[r, t] - values[c] + values[r]``
"""

import numpy as np
from numba import njit

from hqsearch.assignment.bucket_supply import TAKEN, UNREACHED, smallest_entries
from hqsearch.assignment.exchange_flow import exchange_flow
from hqsearch.assignment.integer_costs import STATUS_OPTIMAL

FEW_SIBLINGS = 8
"""Larger groups are placed by the exchange kernel, as one by one the work grows with the square."""


@njit(cache=True, nogil=True)
def take(
    c,
    t,
    costs,
    open_costs,
    sibling,
    group,
    start,
    members,
    group_counts,
    held,
    n_held,
    places,
    holders,
    counts,
):
    """Let class c hold bucket t."""
    j = n_held[c]
    held[c, j] = t
    places[c, j] = counts[t]
    holders[t, counts[t]] = c
    counts[t] += 1
    n_held[c] = j + 1
    g = group[c]
    if start[g + 1] - start[g] > 1:
        group_counts[g, t] += 1
        for i in range(start[g], start[g + 1]):
            r = members[i]
            if open_costs[r, t] != TAKEN:
                open_costs[r, t] += sibling
    open_costs[c, t] = TAKEN


@njit(cache=True, nogil=True)
def drop(
    c,
    t,
    costs,
    open_costs,
    sibling,
    group,
    start,
    members,
    group_counts,
    held,
    n_held,
    places,
    holders,
    counts,
):
    """Let class c hold bucket t no longer."""
    j = 0
    while held[c, j] != t:
        j += 1
    place = places[c, j]
    last = n_held[c] - 1
    held[c, j] = held[c, last]
    places[c, j] = places[c, last]
    n_held[c] = last
    last = counts[t] - 1
    counts[t] = last
    if place != last:  # the last holder fills the gap
        r = holders[t, last]
        holders[t, place] = r
        q = 0
        while held[r, q] != t:
            q += 1
        places[r, q] = place
    open_costs[c, t] = costs[c, t]
    g = group[c]
    if start[g + 1] - start[g] > 1:
        open_costs[c, t] += sibling * group_counts[g, t]  # c itself is among these, and taken off again below
        group_counts[g, t] -= 1
        for i in range(start[g], start[g + 1]):
            r = members[i]
            if open_costs[r, t] != TAKEN:
                open_costs[r, t] -= sibling


@njit(cache=True, nogil=True)
def cheapest_from_siblings(c, costs, open_costs, group, start, members, held, n_held, values):
    """Return the least cost at which class c could take a bucket from one of its siblings."""
    cheapest = UNREACHED
    for i in range(start[group[c]], start[group[c] + 1]):
        r = members[i]
        if r != c:
            for j in range(n_held[r]):
                t = held[r, j]
                if open_costs[c, t] != TAKEN:
                    cheapest = min(cheapest, costs[c, t] - costs[r, t] + values[r])
    return cheapest


@njit(cache=True, nogil=True)
def insert_unit(
    newcomer, prices, values, labels, unsettled, previous, through,
    costs, open_costs, sibling, group, start, members, group_counts, held, n_held, places, holders, counts,
):  # fmt: skip
    """Give class `newcomer` one more bucket at least cost to its group, at the given bucket prices.

    A shortest path among the siblings, each of which may hand a bucket on and take another; any bucket ends
    it.
    """
    n_buckets = costs.shape[1]
    first = start[group[newcomer]]
    size = start[group[newcomer] + 1] - first
    for i in range(size):
        labels[i] = 0 if members[first + i] == newcomer else UNREACHED
        unsettled[i] = labels[i]
        previous[i] = -1
    reach = UNREACHED
    end = -1
    bucket = -1
    while True:
        s = -1
        nearest = reach
        for i in range(size):
            if unsettled[i] < nearest:
                nearest = unsettled[i]
                s = i
        if s < 0:
            break
        unsettled[s] = UNREACHED
        c = members[first + s]
        base = labels[s] - values[c]
        cheapest = UNREACHED
        for t in range(n_buckets):
            cheapest = min(cheapest, open_costs[c, t] + prices[t])
        if base + cheapest < reach:
            reach = base + cheapest
            end = s
            bucket = 0
            while open_costs[c, bucket] + prices[bucket] != cheapest:
                bucket += 1
        for i in range(size):
            r = members[first + i]
            if r == c:
                continue
            for j in range(n_held[r]):
                t = held[r, j]
                label = base + costs[c, t] - costs[r, t] + values[r]
                if label < labels[i] and open_costs[c, t] != TAKEN:
                    labels[i] = label
                    unsettled[i] = label
                    previous[i] = s
                    through[i] = t
    for i in range(size):
        if labels[i] < reach:
            values[members[first + i]] += reach - labels[i]
    i = end
    while previous[i] >= 0:
        c = members[first + i]
        drop(
            c, through[i], costs, open_costs, sibling, group, start, members, group_counts, held, n_held,
            places, holders, counts,
        )  # fmt: skip
        take(
            c, bucket, costs, open_costs, sibling, group, start, members, group_counts, held, n_held, places,
            holders, counts,
        )  # fmt: skip
        bucket = through[i]
        i = previous[i]
    take(
        newcomer, bucket, costs, open_costs, sibling, group, start, members, group_counts, held, n_held,
        places, holders, counts,
    )  # fmt: skip


@njit(cache=True, nogil=True)
def place_one_by_one(
    c, sparsity, prices, values, row, positions, cheapest, labels, unsettled, previous, through,
    costs, open_costs, sibling, group, start, members, group_counts, held, n_held, places, holders, counts,
):  # fmt: skip
    """Place class c beside those of its siblings that are placed already, at least cost to them all."""
    for t in range(costs.shape[1]):
        row[t] = open_costs[c, t] + prices[t]
    smallest_entries(row, sparsity + 1, positions, cheapest)
    from_siblings = cheapest_from_siblings(c, costs, open_costs, group, start, members, held, n_held, values)
    if from_siblings >= cheapest[sparsity - 1]:
        values[c] = min(cheapest[sparsity], from_siblings)
        for j in range(sparsity):
            take(
                c, positions[j], costs, open_costs, sibling, group, start, members, group_counts, held,
                n_held,
                places, holders, counts,
            )  # fmt: skip
        return
    values[c] = min(cheapest[0], from_siblings)
    for _ in range(sparsity):
        insert_unit(
            c, prices, values, labels, unsettled, previous, through,
            costs, open_costs, sibling, group, start, members, group_counts, held, n_held, places, holders,
            counts,
        )  # fmt: skip


@njit(cache=True, nogil=True)
def place_groups(
    sparsity, prices, values,
    costs, open_costs, sibling, group, start, members, group_counts, held, n_held, places, holders, counts,
):  # fmt: skip
    """Place all classes of all groups, each group optimally at bucket prices of zero; return a status."""
    n_buckets = costs.shape[1]
    row = np.empty(n_buckets, np.int64)
    positions = np.empty(sparsity + 1, np.int64)
    cheapest = np.empty(sparsity + 1, np.int64)
    labels = np.empty(FEW_SIBLINGS, np.int64)
    unsettled = np.empty(FEW_SIBLINGS, np.int64)
    previous = np.empty(FEW_SIBLINGS, np.int64)
    through = np.empty(FEW_SIBLINGS, np.int64)
    for q in range(start.shape[0] - 1):
        classes = members[start[q] : start[q + 1]]
        if classes.shape[0] <= FEW_SIBLINGS:
            for c in classes:
                place_one_by_one(
                    c, sparsity, prices, values, row, positions, cheapest, labels, unsettled, previous,
                    through,
                    costs, open_costs, sibling, group, start, members, group_counts, held, n_held, places,
                    holders,
                    counts,
                )  # fmt: skip
            continue
        # many siblings are a level of their own, whose prices say what a class gives for a bucket
        found, status, _, group_prices = exchange_flow(costs[classes], sparsity, sibling)
        if status != STATUS_OPTIMAL:
            return status
        for i in range(classes.shape[0]):
            c = classes[i]
            for j in range(sparsity):
                take(
                    c, found[i, j], costs, open_costs, sibling, group, start, members, group_counts, held,
                    n_held,
                    places, holders, counts,
                )  # fmt: skip
            values[c] = UNREACHED
            for t in range(n_buckets):
                if open_costs[c, t] != TAKEN:
                    values[c] = min(values[c], costs[c, t] + group_prices[t])
    return STATUS_OPTIMAL
