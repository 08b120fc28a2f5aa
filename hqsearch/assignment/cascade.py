"""Levels chained by parent, and many independent cascades at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hqsearch.assignment.network import check_penalties, check_scores, raise_for_status
from hqsearch.assignment.solvers import check_solver, solve_level
from hqsearch.threads import share_work

__all__ = ["solve_cascade", "solve_cascades"]

SHAPE = "(n_classes, n_levels, branching_factor)"


def check_levels(array: np.ndarray) -> None:
    """Refuse a cascade without levels."""
    if array.shape[-2] < 1:
        raise ValueError(f"Expected scores with n_levels >= 1, got an array of shape {array.shape}.")


def cascade_by(
    solver: str, scores: np.ndarray, sparsity: int, sibling_penalty: float, orthogonality_penalty: float
) -> np.ndarray:
    """Solve one cascade, level by level, by one of the independent solvers."""
    n_classes, n_levels, n_buckets = scores.shape
    codes = np.zeros(scores.shape, bool)
    parents = np.zeros(n_classes, np.int64)
    for level in range(n_levels):
        last = level == n_levels - 1
        codes[:, level] = solve_level(
            scores[:, level],
            None if level == 0 else parents,
            sparsity=sparsity if last else 1,
            sibling_penalty=sibling_penalty,
            orthogonality_penalty=orthogonality_penalty,
            solver=solver,
        )
        if not last:
            parents = np.unique(parents * n_buckets + codes[:, level].argmax(axis=1), return_inverse=True)[1]
    return codes


def solve_batch(
    batch: np.ndarray, sparsity: int, sibling_penalty: float, orthogonality_penalty: float
) -> np.ndarray:
    """Solve cascades of one shape, (n_batch, n_classes, n_levels, branching_factor), in one kernel call."""
    from hqsearch.assignment import level_codes

    codes = np.zeros(batch.shape, bool)
    raise_for_status(
        level_codes.cascade_codes(batch, sparsity, sibling_penalty, orthogonality_penalty, codes)
    )
    return codes


def solve_cascade(
    scores: Any,
    *,
    sparsity: int = 1,
    sibling_penalty: float = 100.0,
    orthogonality_penalty: float = 0.1,
    solver: str = "auto",
) -> np.ndarray:
    """Choose the path of each class: level by level, each exactly, given the levels above.

    Levels 1 to ``n_levels - 1`` give a class one bucket, the last level gives it `sparsity` buckets. Classes
    that chose the same path so far are siblings at the next level (cascading as in [1]_, algorithm 1).

    Parameters
    ----------
    scores : array-like of shape (n_classes, n_levels, branching_factor)
        Class scores of each level; floats or integers.
    sparsity : int, default=1
        Buckets a class gets at the last level.
    sibling_penalty, orthogonality_penalty : float
        Penalties, as in `solve_level`.
    solver : {"auto", "scipy", "networkx", "ortools"}, default="auto"
        As in `solve_level`.

    Returns
    -------
    codes : ndarray of shape (n_classes, n_levels, branching_factor), bool
        Chosen buckets.

    Raises
    ------
    ValueError
        If an input is of the wrong shape or dtype, not finite, out of range, or too large for int64 costs.

    References
    ----------
    .. [1] Jeong, Kim, Song, "End-to-End Efficient Representation Learning via Cascading Combinatorial
    Optimization",
       CVPR 2019; https://arxiv.org/abs/1902.10990

    Examples
    --------
    >>> from hqsearch.assignment import solve_cascade
    >>> scores = [[[9, 0], [5, 4]], [[9, 0], [5, 1]]]
    >>> solve_cascade(scores, sibling_penalty=10, orthogonality_penalty=0).astype(int).tolist()
    [[[1, 0], [0, 1]], [[1, 0], [1, 0]]]
    """
    check_solver(solver)
    array = check_scores(scores, 3, SHAPE)
    check_levels(array)
    k, sibling, orthogonality = check_penalties(
        array.shape[2], sparsity, sibling_penalty, orthogonality_penalty
    )
    if solver != "auto":
        return cascade_by(solver, array, k, sibling, orthogonality)
    return solve_batch(array[None], k, sibling, orthogonality)[0]


def solve_cascades(
    scores_batch: Any,
    *,
    sparsity: int = 1,
    sibling_penalty: float = 100.0,
    orthogonality_penalty: float = 0.1,
    solver: str = "auto",
    n_jobs: int | None = None,
) -> np.ndarray | list[np.ndarray]:
    """Solve many independent cascades, in parallel threads.

    Parameters
    ----------
    scores_batch : array-like of shape (n_batch, n_classes, n_levels, branching_factor), or sequence of
    n_batch \
            array-likes of shape (n_classes_i, n_levels, branching_factor)
        Class scores of each cascade.
    sparsity : int, default=1
        Buckets a class gets at the last level.
    sibling_penalty, orthogonality_penalty : float
        Penalties, as in `solve_level`.
    solver : {"auto", "scipy", "networkx", "ortools"}, default="auto"
        As in `solve_level`.
    n_jobs : int, default=None
        Threads, as joblib counts them: None is 1 outside a `joblib.parallel_config`, -1 is one a processor.
        The kernels leave the GIL, and the codes do not depend on `n_jobs`.

    Returns
    -------
    codes : ndarray of shape (n_batch, n_classes, n_levels, branching_factor), bool, or a list of n_batch
    arrays
        Chosen buckets; an array for an array, a list for a sequence.

    Raises
    ------
    ValueError
        If an input is of the wrong shape or dtype, not finite, out of range, or too large for int64 costs.

    Examples
    --------
    >>> import numpy as np
    >>> from hqsearch.assignment import solve_cascade, solve_cascades
    >>> scores_batch = np.random.default_rng(0).normal(size=(8, 6, 2, 4))
    >>> codes = solve_cascades(scores_batch, n_jobs=2)
    >>> all((codes[i] == solve_cascade(scores_batch[i])).all() for i in range(8))
    True
    """
    from joblib import effective_n_jobs

    check_solver(solver)
    n_workers = effective_n_jobs(n_jobs)
    if isinstance(scores_batch, Sequence):
        options: dict[str, Any] = {
            "sparsity": sparsity,
            "sibling_penalty": sibling_penalty,
            "orthogonality_penalty": orthogonality_penalty,
            "solver": solver,
        }
        cascades: list[Any] = [None] * len(scores_batch)

        def solve_one(i: int) -> None:
            cascades[i] = solve_cascade(scores_batch[i], **options)

        share_work(solve_one, len(cascades), n_workers)
        return cascades
    batch = check_scores(scores_batch, 4, f"(n_batch, {SHAPE[1:]}")
    check_levels(batch)
    k, sibling, orthogonality = check_penalties(
        batch.shape[3], sparsity, sibling_penalty, orthogonality_penalty
    )
    if solver != "auto":
        by_other = [cascade_by(solver, scores, k, sibling, orthogonality) for scores in batch]
        return np.array(by_other, dtype=bool).reshape(batch.shape)
    # several parts a thread even out what cascades differ by
    bounds = np.linspace(0, len(batch), min(len(batch), 8 * n_workers if n_workers > 1 else 1) + 1).astype(
        int
    )
    codes = np.zeros(batch.shape, bool)
    statuses = np.zeros(len(bounds), np.int64)

    from hqsearch.assignment import level_codes

    def solve_part(i: int) -> None:
        part = slice(bounds[i], bounds[i + 1])
        statuses[i] = level_codes.cascade_codes(batch[part], k, sibling, orthogonality, codes[part])

    share_work(solve_part, len(bounds) - 1, n_workers)
    raise_for_status(int(statuses.max()))
    return codes
