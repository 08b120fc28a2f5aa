"""A proof that codes are optimal: prices under which no arc of the residual network is worth walking."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from scipy.sparse import csgraph

from hqsearch.assignment.network import LevelNetwork, bucket_counts, level_network

__all__ = ["Certificate", "certificate"]

EXACT_IN_FLOAT64 = 2.0**53


class Certificate(NamedTuple):
    """What `certificate` found.

    Attributes
    ----------
    optimal : bool
        Whether the codes have the least energy of all.
    prices : ndarray of shape (n_nodes,), int64, or None
        The proof: ``prices[head] <= prices[tail] + cost`` on every residual arc, checked in integers. None
        when a negative cycle exists, hence better codes.
    """

    optimal: bool
    prices: np.ndarray | None


def residual_arcs(network: LevelNetwork, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return tails, heads and costs of the residual network of `codes`, and its number of nodes.

    Nodes are classes, buckets and the sink. A path through the node of a group and a bucket is one arc here:
    a class takes the bucket, drops it, or takes it over from a sibling; passing from a bucket to itself costs
    at least 0. Of parallel unit arcs only the next one to fill and the last one filled matter, as costs are
    convex.
    """
    n_classes, n_buckets = network.costs.shape
    sibling, unit = network.sibling_cost, network.orthogonality_cost
    if network.groups.max(initial=0) == 0:
        # all are siblings: both penalties count the same pairs, and no exchange between siblings is needed
        sibling, unit = 0, sibling + unit
    sink = n_classes + n_buckets
    bucket_nodes = n_classes + np.arange(n_buckets)
    per_bucket, per_group = bucket_counts(codes, network.groups)
    siblings_there = per_group[network.groups] - codes
    change = network.costs + sibling * siblings_there

    classes, buckets = np.nonzero(~codes)
    parts = [(classes, bucket_nodes[buckets], change[classes, buckets])]
    classes, buckets = np.nonzero(codes)
    parts.append((bucket_nodes[buckets], classes, -change[classes, buckets]))
    sizes = np.bincount(network.groups, minlength=1)
    for r in np.flatnonzero(sizes[network.groups] > 1) if sibling else ():
        held = np.flatnonzero(codes[r])
        siblings = np.flatnonzero(network.groups == network.groups[r])
        taking_over = network.costs[np.ix_(siblings, held)] - network.costs[r, held]
        possible = ~codes[np.ix_(siblings, held)]
        cheapest = np.where(possible, taking_over, np.iinfo(np.int64).max).min(axis=1)
        willing = possible.any(axis=1)
        parts.append((siblings[willing], np.full(willing.sum(), r), cheapest[willing]))
    room = per_bucket < n_classes
    parts.append((bucket_nodes[room], np.full(room.sum(), sink), unit * per_bucket[room]))
    used = per_bucket > 0
    parts.append((np.full(used.sum(), sink), bucket_nodes[used], unit * (1 - per_bucket[used])))
    tails, heads, costs = (np.concatenate([part[i] for part in parts]).astype(np.int64) for i in range(3))
    return tails, heads, costs, sink + 1


def certificate(
    scores: Any,
    codes: Any,
    parents: Any = None,
    *,
    sibling_penalty: float = 100.0,
    orthogonality_penalty: float = 0.1,
) -> Certificate:
    """Prove that codes of one level are optimal, or find that they are not.

    A flow is of minimum cost exactly when its residual network has no negative cycle [1]_. Shortest distances
    from everywhere (`scipy.sparse.csgraph.bellman_ford`) exist exactly then, and are the proof: they are
    rounded to integers, and every residual arc is checked in integer arithmetic. Nothing of the solver is
    used.

    Parameters
    ----------
    scores : array-like of shape (n_classes, branching_factor)
        Class scores of the level.
    codes : array-like of shape (n_classes, branching_factor), bool
        Chosen buckets, the same number (at least one) for each class.
    parents : array-like of shape (n_classes,), int, default=None
        Parent group of each class, as in `solve_level`.
    sibling_penalty, orthogonality_penalty : float
        Penalties, as in `solve_level`.

    Returns
    -------
    certificate : Certificate
        Whether the codes are optimal, and the prices that prove it.

    Raises
    ------
    ValueError
        If `codes` is not such an array, or another input is not valid for `solve_level`.

    References
    ----------
    .. [1] Ahuja, Magnanti, Orlin, "Network Flows", 1993, theorem 9.1.

    Examples
    --------
    >>> from hqsearch.assignment import certificate
    >>> scores = [[1.0, 0.9], [1.0, 0.2]]
    >>> certificate(scores, [[False, True], [True, False]]).optimal
    True
    >>> certificate(scores, [[True, False], [False, True]]).optimal
    False
    """
    chosen = np.asarray(codes)
    if chosen.dtype != bool or chosen.shape != np.shape(scores) or chosen.ndim != 2:
        raise ValueError(
            f"Expected codes to be a bool array of the shape of scores, {np.shape(scores)}, "
            f"got dtype {chosen.dtype} and shape {chosen.shape}."
        )
    per_class = chosen.sum(axis=1)
    if len(set(per_class.tolist())) > 1:
        raise ValueError(
            f"Expected codes with the same number of buckets for each class, got between {per_class.min()} "
            f"and {per_class.max()}."
        )
    network = level_network(
        scores,
        parents,
        sparsity=int(per_class[0]) if len(per_class) else 1,
        sibling_penalty=sibling_penalty,
        orthogonality_penalty=orthogonality_penalty,
    )
    if len(per_class) == 0:
        return Certificate(True, np.zeros(chosen.shape[1] + 1, np.int64))

    tails, heads, costs, n_nodes = residual_arcs(network, chosen)
    # prices are sums along simple paths, so floating point is exact unless these could pass 2**53
    exact = float(np.abs(costs).max()) * n_nodes < EXACT_IN_FLOAT64
    start = np.full(n_nodes, n_nodes)
    everywhere = scipy.sparse.csr_array(
        (
            np.concatenate([costs, np.zeros(n_nodes, np.int64)]).astype(np.float64),
            (np.concatenate([tails, start]), np.concatenate([heads, np.arange(n_nodes)])),
        ),
        shape=(n_nodes + 1, n_nodes + 1),
    )
    try:
        prices = np.rint(csgraph.bellman_ford(everywhere, indices=n_nodes)[:n_nodes]).astype(np.int64)
    except csgraph.NegativeCycleError:
        if exact:
            return Certificate(False, None)
        prices = np.zeros(n_nodes, np.int64)
    order = np.argsort(heads, kind="stable")
    tails, heads, costs = tails[order], heads[order], costs[order]
    first = np.flatnonzero(np.diff(heads, prepend=-1))
    for _ in range(n_nodes):
        reached = np.minimum.reduceat(prices[tails] + costs, first)
        if (reached >= prices[heads[first]]).all():
            return Certificate(True, prices)
        prices[heads[first]] = np.minimum(prices[heads[first]], reached)
    return Certificate(False, None)
