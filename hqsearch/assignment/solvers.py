"""Exact codes of one level: the compiled default, and independent solvers of the same problem."""

from __future__ import annotations

from typing import Any

import numpy as np

from hqsearch.assignment.network import (
    LevelNetwork,
    bucket_counts,
    check_parents,
    check_penalties,
    check_scores,
    level_network,
    raise_for_status,
)

__all__ = ["SOLVERS", "solve_level"]

SOLVERS = ("auto", "scipy", "networkx", "ortools")


def check_solver(solver: str) -> None:
    """Refuse an unknown solver, naming the known ones."""
    if solver not in SOLVERS:
        raise ValueError(f"Expected solver to be one of {SOLVERS}, got {solver!r}.")


def codes_by_scipy(network: LevelNetwork) -> np.ndarray:
    """Solve by HiGHS as a linear program, or as an assignment where that is what it is."""
    import scipy.optimize
    import scipy.sparse

    n_classes, n_buckets = network.costs.shape
    codes = np.zeros((n_classes, n_buckets), bool)
    alone = not network.sibling_cost or len(np.unique(network.groups)) == n_classes
    if network.sparsity == 1 and alone:
        copies = np.arange(n_classes) * network.orthogonality_cost
        table = (network.costs[:, :, None] + copies).reshape(n_classes, n_buckets * n_classes)
        rows, columns = scipy.optimize.linear_sum_assignment(table)
        codes[rows, columns // n_classes] = True
        return codes
    tails, heads, _, costs, supplies = network.arcs()
    arcs = np.arange(len(tails))
    shape = (len(supplies), len(tails))
    incidence = scipy.sparse.csr_array((np.ones(len(arcs)), (tails, arcs)), shape=shape)
    incidence -= scipy.sparse.csr_array((np.ones(len(arcs)), (heads, arcs)), shape=shape)
    # HiGHS works with absolute tolerances of 1e-7, so costs of order one
    unit = max(float(np.abs(costs).max()), 1.0)
    result = scipy.optimize.linprog(
        costs / unit, A_eq=incidence, b_eq=supplies, bounds=(0, 1), method="highs-ds"
    )
    if result.status != 0:
        raise RuntimeError(f"HiGHS found no optimum: {result.message}")
    return result.x[: n_classes * n_buckets].reshape(n_classes, n_buckets) > 0.5


def codes_by_networkx(network: LevelNetwork) -> np.ndarray:
    """Solve by the network simplex of networkx: pure Python, exact integers of any size, slow."""
    import networkx

    n_classes, n_buckets = network.costs.shape
    graph = network.to_networkx()
    _, flows = networkx.network_simplex(graph)
    codes = np.zeros((n_classes, n_buckets), bool)
    for c in range(n_classes):
        for node, flow in flows[c].items():
            codes[c, graph.nodes[node]["bucket"]] = flow == 1
    return codes


def codes_by_ortools(network: LevelNetwork) -> np.ndarray:
    """Solve by the cost-scaling push-relabel of OR-Tools, fed through its bulk arrays; needs `bench`."""
    from ortools.graph.python import min_cost_flow

    n_classes, n_buckets = network.costs.shape
    tails, heads, capacities, costs, supplies = network.arcs()
    solver = min_cost_flow.SimpleMinCostFlow()
    arcs = solver.add_arcs_with_capacity_and_unit_cost(tails, heads, capacities, costs)
    solver.set_nodes_supplies(np.arange(len(supplies)), supplies)
    status = solver.solve()
    if status != solver.OPTIMAL:
        raise RuntimeError(f"OR-Tools found no optimum: status {status}.")
    return solver.flows(arcs[: n_classes * n_buckets]).reshape(n_classes, n_buckets) > 0


def codes_by(solver: str, network: LevelNetwork) -> np.ndarray:
    """Solve by one of the independent solvers."""
    if network.costs.shape[0] == 0:
        return np.zeros(network.costs.shape, bool)
    solve = {"scipy": codes_by_scipy, "networkx": codes_by_networkx, "ortools": codes_by_ortools}[solver]
    return solve(network)


def codes_of_components(network: LevelNetwork, n_jobs: int | None, codes: np.ndarray) -> None:
    """Solve the independent parts of a level in parallel threads, into `codes`."""
    from joblib import effective_n_jobs

    from hqsearch.assignment import level_codes
    from hqsearch.threads import share_work

    _, start, members = level_codes.group_members(network.components().astype(np.int64))
    n_workers = effective_n_jobs(n_jobs)
    # cut where the classes are cut evenly: groups differ in size
    cuts = np.linspace(0, len(members), 4 * n_workers + 1)
    bounds = np.unique(np.searchsorted(start, cuts))
    statuses = np.zeros(len(bounds), np.int64)

    def solve_part(i: int) -> None:
        statuses[i] = level_codes.separate_codes(
            network.costs,
            network.sparsity,
            network.sibling_cost,
            start,
            members,
            bounds[i],
            bounds[i + 1],
            codes,
        )

    share_work(solve_part, len(bounds) - 1, n_workers)
    raise_for_status(int(statuses.max()))


def level_energy(
    scores: np.ndarray,
    codes: np.ndarray,
    groups: np.ndarray,
    sibling_penalty: float,
    orthogonality_penalty: float,
) -> float:
    """Return the energy of `codes` in score units, from the scores as they were given."""
    per_bucket, per_group = bucket_counts(codes, groups)
    return float(
        -scores[codes].sum()
        + sibling_penalty * (per_group * (per_group - 1) // 2).sum()
        + orthogonality_penalty * (per_bucket * (per_bucket - 1) // 2).sum()
    )


def solve_level(
    scores: Any,
    parents: Any = None,
    *,
    sparsity: int = 1,
    sibling_penalty: float = 100.0,
    orthogonality_penalty: float = 0.1,
    solver: str = "auto",
    return_energy: bool = False,
    n_jobs: int | None = None,
) -> np.ndarray | tuple[np.ndarray, float]:
    r"""Choose the buckets of each class at minimum energy, exactly.

    Minimises, over binary `z` with `sparsity` ones a row [1]_,

    .. math::

        E(z) = -\sum_{c,t} u_{ct} z_{ct} + \lambda_s \sum_{g,t} \tfrac{1}{2} m_{gt} (m_{gt} - 1)
               + \lambda_o \sum_t \tfrac{1}{2} m_t (m_t - 1)

    where :math:`m_{gt}` and :math:`m_t` count the classes of parent group g, and all classes, that chose
    bucket t.

    Parameters
    ----------
    scores : array-like of shape (n_classes, branching_factor)
        Class scores u; floats or integers.
    parents : array-like of shape (n_classes,), int, default=None
        Parent group of each class: equal labels make siblings. None means that no class has a sibling, hence
        no sibling penalty.
    sparsity : int, default=1
        Buckets a class gets, at most `branching_factor`.
    sibling_penalty, orthogonality_penalty : float
        Penalties a pair of siblings, and any pair of classes, pays for each bucket that it shares; >= 0.
    solver : {"auto", "scipy", "networkx", "ortools"}, default="auto"
        "auto" is compiled here: shortest paths on int64 costs. The others solve the same integers
        independently and slowly, for checks: "scipy" by HiGHS (by `scipy.optimize.linear_sum_assignment` for
        one bucket a class and no siblings), within floating-point tolerances; "networkx" by its network
        simplex; "ortools" by `SimpleMinCostFlow`, which must be installed.
    return_energy : bool, default=False
        Whether to return E(z) too, in score units.
    n_jobs : int, default=None
        Threads, as joblib counts them. Only used without an orthogonality penalty, where each group of
        siblings is a problem of its own; the codes do not depend on it.

    Returns
    -------
    codes : ndarray of shape (n_classes, branching_factor), bool
        `sparsity` ones a row. Among equally good codes always the same ones are returned.
    energy : float
        Only with `return_energy`.

    Raises
    ------
    ValueError
        If an input is of the wrong shape or dtype, not finite or out of range, or if penalties exceed the
        scores by so much that int64 costs at a resolution of 1e-9 of the largest ``|score|`` overflow.
    RuntimeError
        If a solver stops without an optimal solution.

    References
    ----------
    .. [1] Jeong, Kim, Song, "End-to-End Efficient Representation Learning via Cascading Combinatorial
    Optimization",
       CVPR 2019, equation 3; https://arxiv.org/abs/1902.10990

    Examples
    --------
    Both classes like bucket 0 best; as siblings they part, and the one that loses less by it moves.

    >>> from hqsearch.assignment import solve_level
    >>> codes, energy = solve_level([[1.0, 0.9], [1.0, 0.2]], parents=[0, 0], return_energy=True)
    >>> codes.astype(int)
    array([[0, 1],
           [1, 0]])
    >>> round(energy, 9)
    -1.9
    """
    check_solver(solver)
    if solver != "auto":
        network = level_network(
            scores,
            parents,
            sparsity=sparsity,
            sibling_penalty=sibling_penalty,
            orthogonality_penalty=orthogonality_penalty,
        )
        codes = codes_by(solver, network)
    else:
        from hqsearch.assignment import level_codes

        array = check_scores(scores, 2, "(n_classes, branching_factor)")
        n_classes, n_buckets = array.shape
        k, sibling, orthogonality = check_penalties(
            n_buckets, sparsity, sibling_penalty, orthogonality_penalty
        )
        labels = np.arange(n_classes) if parents is None else check_parents(parents, n_classes)
        codes = np.zeros((n_classes, n_buckets), bool)
        if n_jobs not in (None, 1) and orthogonality == 0 and sibling > 0 and n_classes:
            network = level_network(
                array, labels, sparsity=k, sibling_penalty=sibling, orthogonality_penalty=0.0
            )
            codes_of_components(network, n_jobs, codes)
        else:
            raise_for_status(level_codes.level_codes(array, labels, k, sibling, orthogonality, codes))
    if not return_energy:
        return codes
    groups = (
        np.arange(len(codes)) if parents is None else np.unique(np.asarray(parents), return_inverse=True)[1]
    )
    floats = np.asarray(scores, dtype=np.float64)
    return codes, level_energy(floats, codes, groups, float(sibling_penalty), float(orthogonality_penalty))
