"""The flow problem of one level, and its views as scipy sparse graph and networkx graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse
from scipy.sparse import csgraph

if TYPE_CHECKING:
    import networkx

__all__ = ["LevelNetwork", "SparseFlowGraph", "level_network"]


REAL = (int, float, np.integer, np.floating)


def check_scores(scores: Any, n_dimensions: int, shape_in_words: str) -> np.ndarray:
    """Return `scores` as a C-contiguous float64 array, or say what was expected instead."""
    array = np.asarray(scores)
    if array.ndim != n_dimensions:
        raise ValueError(f"Expected scores of shape {shape_in_words}, got an array of shape {array.shape}.")
    if array.dtype != np.float64:
        if array.dtype.kind not in "fiu":
            raise ValueError(f"Expected scores of a real floating or integer dtype, got dtype {array.dtype}.")
        array = array.astype(np.float64)
    return np.ascontiguousarray(array)


def check_penalties(
    n_buckets: int, sparsity: Any, sibling_penalty: Any, orthogonality_penalty: Any
) -> tuple[int, float, float]:
    """Return the three parameters as plain numbers, or say what was expected instead."""
    whole = isinstance(sparsity, (int, np.integer)) and not isinstance(sparsity, bool)
    if not whole or not 1 <= sparsity <= n_buckets:
        raise ValueError(
            f"Expected sparsity to be an integer with 1 <= sparsity <= branching_factor, "
            f"but sparsity = {sparsity!r}, branching_factor = {n_buckets}."
        )
    for name, value in (
        ("sibling_penalty", sibling_penalty),
        ("orthogonality_penalty", orthogonality_penalty),
    ):
        if not isinstance(value, REAL) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ValueError(f"Expected {name} to be a finite number >= 0, got {value!r}.")
    return int(sparsity), float(sibling_penalty), float(orthogonality_penalty)


def check_parents(parents: Any, n_classes: int) -> np.ndarray:
    """Return `parents` as an int64 array, or say what was expected instead."""
    labels = np.asarray(parents)
    if labels.shape != (n_classes,):
        raise ValueError(
            f"Expected parents of shape (n_classes,) = ({n_classes},), got an array of shape {labels.shape}."
        )
    if labels.dtype.kind not in "iu" and labels.size:
        raise ValueError(f"Expected parents of an integer dtype, got dtype {labels.dtype}.")
    return np.ascontiguousarray(labels, dtype=np.int64)


def raise_for_status(status: int) -> None:
    """Turn a kernel's status into the error that it stands for."""
    from hqsearch.assignment import integer_costs

    if status == integer_costs.STATUS_OPTIMAL:
        return
    if status == integer_costs.STATUS_NOT_FINITE:
        raise ValueError("Input scores contains NaN or infinity.")
    if status == integer_costs.STATUS_OVERFLOW:
        raise ValueError(
            "Expected scores and penalties whose flow costs fit into int64 at a resolution of 1e-9 of the "
            "largest |score| (and |score| <= 1e300), got larger ones; lower the penalties."
        )
    raise RuntimeError(f"The flow solver stopped without an optimal solution (status {status}).")


class SparseFlowGraph(NamedTuple):
    """A flow network as scipy sparse matrices, arcs from row to column.

    Attributes
    ----------
    cost, capacity : csr_array of shape (n_nodes, n_nodes), int64
        One stored entry an arc in both, in the same order; a stored cost may be 0.
    supply : ndarray of shape (n_nodes,), int64
        Positive at the source, negative at the sink.
    roles : ndarray of shape (n_nodes,), str
        ``"source"``, ``"class"``, ``"group_bucket"``, ``"group_slot"``, ``"bucket"``, ``"bucket_slot"``,
        ``"sink"``.
    classes, groups, buckets : ndarray of shape (n_nodes,), int64
        What the node stands for; -1 where that does not apply.
    """

    cost: scipy.sparse.csr_array
    capacity: scipy.sparse.csr_array
    supply: np.ndarray
    roles: np.ndarray
    classes: np.ndarray
    groups: np.ndarray
    buckets: np.ndarray


@dataclass(frozen=True, eq=False)
class LevelNetwork:
    """The flow problem of one level in integer costs; see `level_network`.

    Attributes
    ----------
    costs : ndarray of shape (n_classes, branching_factor), int64
        Cost of giving bucket t to class c: the negated score in units of ``2**-shift``.
    groups : ndarray of shape (n_classes,), int64
        Parent group of each class, numbered 0, 1, ...
    sparsity : int
        Units that leave the source for each class.
    sibling_cost, orthogonality_cost : int
        Penalties in the same units, lowered to equivalent ones where they dwarf the scores.
    shift : int
        One score is ``2**shift`` units.
    """

    costs: np.ndarray
    groups: np.ndarray
    sparsity: int
    sibling_cost: int
    orthogonality_cost: int
    shift: int

    def energy(self, codes: np.ndarray) -> int:
        """Return the energy of `codes` in cost units, exactly.

        Parameters
        ----------
        codes : ndarray of shape (n_classes, branching_factor), bool
            `sparsity` ones a row.

        Returns
        -------
        energy : int
            A Python integer: no overflow, no rounding.
        """
        per_bucket, per_group = bucket_counts(codes, self.groups)
        chosen = sum(int(cost) for cost in self.costs[np.asarray(codes, bool)])
        return (
            chosen
            + self.sibling_cost * int((per_group * (per_group - 1) // 2).sum())
            + self.orthogonality_cost * int((per_bucket * (per_bucket - 1) // 2).sum())
        )

    def components(self) -> np.ndarray:
        """Return which independent problem each class belongs to.

        Classes meet in the buckets of their group, and, with an orthogonality penalty, in all buckets;
        without one, the network without its source, buckets and sink falls apart.

        Returns
        -------
        labels : ndarray of shape (n_classes,), int32
            0, 1, ... for the connected components.
        """
        n_classes, n_buckets = self.costs.shape
        tails, heads, _, _, supplies = self.arcs()
        sink = n_classes + n_buckets
        # the nodes beyond the sink are those where only siblings meet
        meeting = heads != sink if self.orthogonality_cost else (heads > sink) & (tails < n_classes)
        graph = scipy.sparse.csr_array(
            (np.ones(int(meeting.sum())), (tails[meeting], heads[meeting])), shape=2 * (len(supplies),)
        )
        return csgraph.connected_components(graph, directed=False)[1][:n_classes]

    def arcs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the compact network as bulk arrays: parallel unit arcs carry the convex penalties.

        Nodes are the classes, then the buckets, then the sink, then one node for each bucket of each group
        that has siblings. The first ``n_classes * branching_factor`` arcs are the classes' choices, row by
        row.

        Returns
        -------
        tails, heads, capacities, costs : ndarray of shape (n_arcs,), int64
            One entry an arc.
        supplies : ndarray of shape (n_nodes,), int64
            `sparsity` at each class, its total taken back at the sink.
        """
        n_classes, n_buckets = self.costs.shape
        sink = n_classes + n_buckets
        buckets = np.arange(n_buckets)
        sizes = np.bincount(self.groups, minlength=1)
        shared = np.flatnonzero(sizes > 1) if self.sibling_cost else np.empty(0, np.int64)
        first_node = np.full(len(sizes), n_classes)
        first_node[shared] = sink + 1 + n_buckets * np.arange(len(shared))

        tails = [np.repeat(np.arange(n_classes), n_buckets)]
        heads = [(first_node[self.groups][:, None] + buckets).ravel()]
        costs = [self.costs.ravel()]
        for q in shared:
            unit = np.arange(sizes[q])
            tails.append(np.repeat(first_node[q] + buckets, sizes[q]))
            heads.append(np.repeat(n_classes + buckets, sizes[q]))
            costs.append(np.tile(unit * self.sibling_cost, n_buckets))
        tails.append(np.repeat(n_classes + buckets, n_classes))
        heads.append(np.full(n_buckets * n_classes, sink))
        costs.append(np.tile(np.arange(n_classes) * self.orthogonality_cost, n_buckets))

        supplies = np.zeros(sink + 1 + n_buckets * len(shared), np.int64)
        supplies[:n_classes] = self.sparsity
        supplies[sink] = -self.sparsity * n_classes
        tail, head, cost = (np.concatenate(part).astype(np.int64) for part in (tails, heads, costs))
        return tail, head, np.ones(len(tail), np.int64), cost, supplies

    def to_sparse(self) -> SparseFlowGraph:
        """Return the whole network as scipy sparse matrices with the role of each node.

        A sparse matrix holds one arc a pair of nodes, so each of the parallel unit arcs runs through a node
        of its own, its slot: bucket -> slot w (cost ``w * penalty``) -> sink.

        Returns
        -------
        graph : SparseFlowGraph
            Costs, capacities, supplies, roles.
        """
        n_classes, n_buckets = self.costs.shape
        tail, head, capacity, cost, _ = self.arcs()
        sink = n_classes + n_buckets
        n_choices = n_classes * n_buckets
        n_compact = int(max(sink, head.max(initial=0), tail.max(initial=0))) + 1
        n_slots = len(tail) - n_choices
        slots = n_compact + np.arange(n_slots)
        source = n_compact + n_slots
        n_nodes = source + 1

        groups = np.full(n_nodes, -1)
        buckets = np.full(n_nodes, -1)
        classes = np.full(n_nodes, -1)
        roles = np.full(n_nodes, "group_bucket", dtype="<U12")
        roles[:n_classes] = "class"
        roles[n_classes:sink] = "bucket"
        roles[sink] = "sink"
        roles[slots] = np.where(head[n_choices:] == sink, "bucket_slot", "group_slot")
        roles[source] = "source"
        classes[:n_classes] = np.arange(n_classes)
        groups[:n_classes] = self.groups
        buckets[n_classes:sink] = np.arange(n_buckets)
        inner = np.arange(sink + 1, n_compact)
        buckets[inner] = (inner - sink - 1) % n_buckets
        through = head[:n_choices]  # each class of a group points at the group's own bucket nodes
        private = through > sink
        groups[through[private]] = self.groups[tail[:n_choices][private]]
        buckets[slots] = buckets[tail[n_choices:]]
        groups[slots] = groups[tail[n_choices:]]

        everything = [
            (
                np.full(n_classes, source),
                np.arange(n_classes),
                np.full(n_classes, self.sparsity),
                np.zeros(n_classes),
            ),
            (tail[:n_choices], through, capacity[:n_choices], cost[:n_choices]),
            (tail[n_choices:], slots, capacity[n_choices:], cost[n_choices:]),
            (slots, head[n_choices:], capacity[n_choices:], np.zeros(n_slots)),
        ]
        rows, columns, capacities, costs = (
            np.concatenate([part[i] for part in everything]).astype(np.int64) for i in range(4)
        )
        shape = (n_nodes, n_nodes)
        supply = np.zeros(n_nodes, np.int64)
        supply[source] = self.sparsity * n_classes
        supply[sink] = -supply[source]
        return SparseFlowGraph(
            scipy.sparse.csr_array((costs, (rows, columns)), shape=shape),
            scipy.sparse.csr_array((capacities, (rows, columns)), shape=shape),
            supply,
            roles,
            classes,
            groups,
            buckets,
        )

    def to_networkx(self) -> networkx.DiGraph:
        """Return the network as a directed networkx graph, ready for `networkx.network_simplex`.

        Nodes carry `role`, `demand`, `layer` (for `networkx.multipartite_layout`) and, where they apply,
        `class_`, `group` and `bucket`; arcs carry `capacity` and `weight`.

        Returns
        -------
        graph : networkx.DiGraph
            Same nodes, in the same order, as `to_sparse`.
        """
        import networkx

        flow_graph = self.to_sparse()
        layers = {
            name: i
            for i, name in enumerate(
                ("source", "class", "group_bucket", "group_slot", "bucket", "bucket_slot", "sink")
            )
        }
        graph = networkx.DiGraph()
        for node, role in enumerate(flow_graph.roles.tolist()):
            facts = {"role": role, "layer": layers[role], "demand": -int(flow_graph.supply[node])}
            for name, values in (
                ("class_", flow_graph.classes),
                ("group", flow_graph.groups),
                ("bucket", flow_graph.buckets),
            ):
                if values[node] >= 0:
                    facts[name] = int(values[node])
            graph.add_node(node, **facts)
        costs = flow_graph.cost.tocoo()
        capacities = flow_graph.capacity.tocoo()
        graph.add_edges_from(
            (tail, head, {"capacity": capacity, "weight": weight})
            for tail, head, capacity, weight in zip(
                costs.coords[0].tolist(),
                costs.coords[1].tolist(),
                capacities.data.tolist(),
                costs.data.tolist(),
                strict=True,
            )
        )
        return graph


def bucket_counts(codes: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many classes chose each bucket, and the same for each group."""
    chosen = np.asarray(codes, dtype=bool)
    per_group = np.zeros((int(groups.max(initial=-1)) + 1, chosen.shape[1]), np.int64)
    np.add.at(per_group, groups, chosen)
    return chosen.sum(axis=0, dtype=np.int64), per_group


def level_network(
    scores: Any,
    parents: Any = None,
    *,
    sparsity: int = 1,
    sibling_penalty: float = 100.0,
    orthogonality_penalty: float = 0.1,
) -> LevelNetwork:
    """Build the flow problem of one level in int64 costs.

    Choosing `sparsity` buckets for each class at minimum energy (see `solve_level`) is a minimum-cost flow
    [1]_: source
    -> class (capacity `sparsity`) -> bucket of the class's parent group (cost minus the score, capacity 1) ->
    bucket (unit arcs of cost 0, 1, 2, ... sibling penalties) -> sink (unit arcs of cost 0, 1, 2, ...
    orthogonality penalties). A group of one class goes to the buckets directly.

    Parameters
    ----------
    scores : array-like of shape (n_classes, branching_factor)
        Class scores of the level; floats or integers.
    parents : array-like of shape (n_classes,), int, default=None
        Equal labels make siblings. None means that there are none, hence no sibling penalty.
    sparsity : int, default=1
        Buckets a class gets.
    sibling_penalty, orthogonality_penalty : float
        Penalties a pair of siblings, and any pair of classes, pays for each bucket it shares.

    Returns
    -------
    network : LevelNetwork
        The problem, with its views `to_sparse` and `to_networkx`.

    Raises
    ------
    ValueError
        If an input is of the wrong shape or dtype, not finite, out of range, or too large for int64 costs.

    References
    ----------
    .. [1] Jeong, Kim, Song, "End-to-End Efficient Representation Learning via Cascading Combinatorial
    Optimization",
       CVPR 2019, equation 5 and theorem 1; https://arxiv.org/abs/1902.10990

    Examples
    --------
    >>> from hqsearch.assignment import level_network
    >>> network = level_network([[3, 1, 0], [2, 1, 0]], parents=[7, 7], sibling_penalty=4)
    >>> graph = network.to_sparse()
    >>> {str(role): int((graph.roles == role).sum()) for role in sorted(set(graph.roles))}
    {'bucket': 3, 'bucket_slot': 6, 'class': 2, 'group_bucket': 3, 'group_slot': 6, 'sink': 1, 'source': 1}
    """
    from hqsearch.assignment import integer_costs, level_codes

    array = check_scores(scores, 2, "(n_classes, branching_factor)")
    n_classes, n_buckets = array.shape
    k, sibling, orthogonality = check_penalties(n_buckets, sparsity, sibling_penalty, orthogonality_penalty)
    labels = np.arange(n_classes) if parents is None else check_parents(parents, n_classes)
    groups, start, _ = level_codes.group_members(labels)
    costs = np.empty((n_classes, n_buckets), np.int64)
    sibling_cost, orthogonality_cost, shift, status = integer_costs.integer_costs(
        array, costs, sibling, orthogonality, level_codes.largest_group(start)
    )
    raise_for_status(status)
    return LevelNetwork(costs, groups, k, int(sibling_cost), int(orthogonality_cost), int(shift))
