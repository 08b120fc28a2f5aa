"""Compiled kernels from scores to codes: one level, and whole cascades in one call."""

import numpy as np
from numba import njit

from hqsearch.assignment.exchange_flow import exchange_flow
from hqsearch.assignment.integer_costs import STATUS_OPTIMAL, integer_costs
from hqsearch.assignment.sibling_flow import sibling_flow


@njit(cache=True, nogil=True)
def group_members(labels):
    """Renumber integer labels as 0, 1, ... in ascending order and list the members of each.

    Returns ``group`` (n_classes,), ``start`` (n_groups + 1,) and ``members`` (n_classes,), all int64: the
    classes of group ``q`` are ``members[start[q]:start[q + 1]]``, ascending.
    """
    n_classes = labels.shape[0]
    members = np.argsort(labels, kind="mergesort").astype(np.int64)
    group = np.empty(n_classes, np.int64)
    start = np.zeros(n_classes + 1, np.int64)
    n_groups = 0
    for i in range(n_classes):
        if i > 0 and labels[members[i]] != labels[members[i - 1]]:
            n_groups += 1
            start[n_groups] = i
        group[members[i]] = n_groups
    n_groups += 1 if n_classes else 0
    start[n_groups] = n_classes
    return group, start[: n_groups + 1], members


@njit(cache=True, nogil=True)
def largest_group(start):
    """Return the size of the largest group."""
    largest = 0
    for q in range(start.shape[0] - 1):
        largest = max(largest, start[q + 1] - start[q])
    return largest


@njit(cache=True, nogil=True)
def level_flow(costs, sparsity, sibling, orthogonality, group, start, members):
    """Solve one level of integer costs by the kernel that fits it; return buckets held, status and work."""
    n_classes, n_buckets = costs.shape
    if sparsity == n_buckets:
        held = np.empty((n_classes, sparsity), np.int32)
        held[:] = np.arange(sparsity)
        return held, STATUS_OPTIMAL, np.zeros(3, np.int64)
    n_groups = start.shape[0] - 1
    if n_groups == 1:  # all are siblings: both penalties count the same pairs
        return exchange_flow(costs, sparsity, orthogonality + sibling)[:3]
    if sibling == 0 or n_groups == n_classes:
        return exchange_flow(costs, sparsity, orthogonality)[:3]
    return sibling_flow(costs, sparsity, sibling, orthogonality, group, start, members)


@njit(cache=True, nogil=True)
def separate_codes(costs, sparsity, sibling, start, members, first, stop, codes):
    """Solve groups `first` to ``stop - 1`` into `codes`, each for itself: only siblings meet in a bucket."""
    for q in range(first, stop):
        classes = members[start[q] : start[q + 1]]
        size = classes.shape[0]
        group = np.zeros(size, np.int64)
        bounds = np.array([0, size])
        held, status, _ = level_flow(
            costs[classes], sparsity, sibling, np.int64(0), group, bounds, np.arange(size)
        )
        if status != STATUS_OPTIMAL:
            return status
        for i in range(size):
            for j in range(sparsity):
                codes[classes[i], held[i, j]] = True
    return STATUS_OPTIMAL


@njit(cache=True, nogil=True)
def level_codes(scores, labels, sparsity, sibling_penalty, orthogonality_penalty, codes):
    """Solve one level into `codes` (bool, zeros on entry); return a status."""
    n_classes, n_buckets = scores.shape
    if n_classes == 0:
        return STATUS_OPTIMAL
    group, start, members = group_members(labels)
    costs = np.empty((n_classes, n_buckets), np.int64)
    sibling, orthogonality, _, status = integer_costs(
        scores, costs, sibling_penalty, orthogonality_penalty, largest_group(start)
    )
    if status != STATUS_OPTIMAL:
        return status
    if orthogonality == 0 and sibling > 0:
        return separate_codes(costs, sparsity, sibling, start, members, 0, start.shape[0] - 1, codes)
    held, status, _ = level_flow(costs, sparsity, sibling, orthogonality, group, start, members)
    if status == STATUS_OPTIMAL:
        for c in range(n_classes):
            for j in range(sparsity):
                codes[c, held[c, j]] = True
    return status


@njit(cache=True, nogil=True)
def cascade_codes(scores, sparsity, sibling_penalty, orthogonality_penalty, codes):
    """Solve a batch of cascades, scores (n_batch, n_classes, n_levels, d), into `codes`; return a status.

    Each level sees which classes chose the same path so far: its parents are the pairs (parents of the level
    before, bucket chosen there).
    """
    n_batch, n_classes, n_levels, n_buckets = scores.shape
    level_scores = np.empty((n_classes, n_buckets), np.float64)
    for b in range(n_batch):
        labels = np.zeros(n_classes, np.int64)
        for v in range(n_levels):
            k = sparsity if v == n_levels - 1 else 1
            for c in range(n_classes):
                for t in range(n_buckets):
                    level_scores[c, t] = scores[b, c, v, t]
            level = np.zeros((n_classes, n_buckets), np.bool_)
            status = level_codes(
                level_scores, labels, k, sibling_penalty if v > 0 else 0.0, orthogonality_penalty, level
            )
            if status != STATUS_OPTIMAL:
                return status
            group, _, _ = group_members(labels)
            for c in range(n_classes):
                for t in range(n_buckets):
                    codes[b, c, v, t] = level[c, t]
                    if level[c, t] and v < n_levels - 1:
                        labels[c] = group[c] * n_buckets + t
    return STATUS_OPTIMAL
