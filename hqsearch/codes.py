"""Level scores to codes, and codes as sparse rows: what every encoder shares."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.sparse as sp

# So many best of a row are found sooner one by one than by sorting it.
_FEW = 8
# Numbers of level scores that are made float64 at once.
_COLUMNS = 256


def greedy_codes(level_scores: np.ndarray, sparsity: int) -> np.ndarray:
    """Code of each item: the best bucket of every level but the last, and the `sparsity` best of the last.

    Parameters
    ----------
    level_scores : ndarray of shape (n_samples, n_levels, branching_factor)
        Score of each bucket at each level.
    sparsity : int
        Active buckets in the last level, 1 to branching_factor.

    Returns
    -------
    ndarray of shape (n_samples, sparsity), dtype int64
        Bucket ids `sum_v digit_v * branching_factor**(n_levels - v)`, level 1 the most significant digit,
        best first; ties go to the lower id.

    Raises
    ------
    ValueError
        If `sparsity` exceeds the branching factor.

    Notes
    -----
    Equation (2) of Jeong, Kim & Song, CVPR 2019.

    Examples
    --------
    >>> import numpy as np
    >>> from hqsearch.codes import greedy_codes
    >>> greedy_codes(np.array([[[0.1, 0.9, 0.0], [0.3, 0.1, 0.2]]]), sparsity=2)
    array([[3, 5]])
    """
    level_scores = np.asarray(level_scores)
    n_levels, branching_factor = level_scores.shape[1:]
    if not 1 <= sparsity <= branching_factor:
        raise ValueError(
            f"Expected 1 <= sparsity <= branching_factor, but sparsity = {sparsity}, "
            f"branching_factor = {branching_factor}."
        )
    parents = np.zeros(len(level_scores), dtype=np.int64)
    for level in range(n_levels - 1):
        parents = parents * branching_factor + level_scores[:, level].argmax(1)
    return parents[:, None] * branching_factor + _best_buckets(-level_scores[:, -1], sparsity)


def _best_buckets(costs: np.ndarray, n_best: int) -> np.ndarray:
    """Columns of the least costs of each row, least first, equal ones by ascending column. Spoils `costs`."""
    if n_best == 1:
        return costs.argmin(1)[:, None]
    # What is taken becomes infinite, so nothing else may be.
    if n_best > _FEW or costs.dtype.kind != "f" or not np.isfinite(costs).all():
        return costs.argsort(1, kind="stable")[:, :n_best]
    best = np.empty((len(costs), n_best), dtype=np.int64)
    rows = np.arange(len(costs))
    for i in range(n_best):
        costs.argmin(1, out=best[:, i])
        costs[rows, best[:, i]] = np.inf
    return best


def mean_score_gap(level_scores: np.ndarray) -> tuple[float, float]:
    """Mean gap between the scores of an item's best and second best buckets, and its standard error.

    Parameters
    ----------
    level_scores : ndarray of shape (n_samples, n_levels, branching_factor)
        Of at least two items, and two buckets a level.

    Returns
    -------
    mean, standard_error : float
        Of the sum of an item's gaps over the levels.
    """
    best = np.partition(level_scores, -2, axis=2)[:, :, -2:]
    gaps = (best[:, :, 1] - best[:, :, 0]).sum(axis=1, dtype=np.float64)
    return float(gaps.mean()), float(gaps.std(ddof=1)) / math.sqrt(len(gaps))


def code_matrix(codes: np.ndarray, n_leaves: int) -> sp.csr_matrix:
    """Codes as binary rows.

    Parameters
    ----------
    codes : ndarray of shape (n_samples, sparsity), dtype int64
        Bucket ids, all different within a row.
    n_leaves : int
        `branching_factor**n_levels`.

    Returns
    -------
    csr_matrix of shape (n_samples, n_leaves), dtype float64
        `sparsity` ones per row, columns ascending.
    """
    n_samples, sparsity = codes.shape
    indptr = np.arange(n_samples + 1, dtype=np.int64) * sparsity
    return sp.csr_matrix(
        (np.ones(codes.size), np.sort(codes, 1).ravel(), indptr), shape=(n_samples, n_leaves)
    )


_making_rows = threading.Lock()


class CellScores:
    """Mean level scores of the items that share their leaves, so that fitted items can be queries again.

    Searching from a fitted item needs level scores only to order the leaves beyond its own. Keeping them for
    each item would take more memory than the embedding, so they are kept for each cell, a cell being a set
    of leaves; items of one cell have nearly the same scores.

    Cells are only ever added, and a cell's scores never change. So several snapshots of an index may share
    one object, and threads may read it while one adds to it.

    Parameters
    ----------
    codes : ndarray of shape (n_items, sparsity), dtype int64
        Leaves of each item.
    level_scores : ndarray of shape (n_items, n_levels, branching_factor), dtype float32
        Their scores.

    Notes
    -----
    Memory in bytes: `4 * n_levels * branching_factor + 8 * sparsity` for each cell in the arrays, and about
    `150 + 32 * sparsity` in the look-up, which is made when it is first used.
    """

    def __init__(self, codes: np.ndarray, level_scores: np.ndarray):
        self._set(*_cell_sums(codes, level_scores))

    @classmethod
    def from_blocks(cls, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> CellScores:
        """Make the means of items that come block by block; only the cells' sums and one block are held.

        Parameters
        ----------
        blocks : iterable of (codes, level_scores)
            At least one; arrays as the class takes them.

        Returns
        -------
        CellScores
            As of all items at once, up to rounding.
        """
        total: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        for codes, level_scores in blocks:
            part = _cell_sums(codes, level_scores)
            total = part if total is None else _merged(total, part)
        if total is None:
            raise ValueError("Expected at least one block of items.")
        cells = cls.__new__(cls)
        cells._set(*total)
        return cells

    def _set(self, cells: np.ndarray, counts: np.ndarray, sums: np.ndarray) -> None:
        # No quotients of twice the size in between: many cells of many buckets fill gigabytes with them.
        means = np.empty(sums.shape, dtype=np.float32)
        np.divide(sums, counts[:, None, None], out=means, casting="same_kind")
        self._scores = means
        self._codes = _best_first(cells, means)
        self._n_cells = len(cells)
        self._row_of: dict[tuple[int, ...], int] | None = None

    @property
    def _rows(self) -> dict[tuple[int, ...], int]:
        """Row of each cell. Made by whoever asks first, once: what `add` puts in must not be lost."""
        if self._row_of is None:
            with _making_rows:
                if self._row_of is None:
                    cells = np.sort(self._codes[: self._n_cells], 1).tolist()
                    self._row_of = {tuple(cell): row for row, cell in enumerate(cells)}
        return self._row_of

    def of(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up cells.

        Parameters
        ----------
        codes : ndarray of shape (n_items, sparsity), dtype int64
            Codes that were given before, in any order within a row.

        Returns
        -------
        level_scores : ndarray of shape (n_items, n_levels, branching_factor), dtype float32
            Mean scores of each item's cell.
        codes : ndarray of shape (n_items, sparsity), dtype int64
            The codes, best first by these scores.
        """
        cells, cell_of = np.unique(np.sort(codes, 1), axis=0, return_inverse=True)
        rows = np.array([self._rows[tuple(cell)] for cell in cells.tolist()], dtype=np.int64)
        rows = rows[cell_of.ravel()]
        return self._scores[rows], self._codes[rows]

    def add(self, codes: np.ndarray, level_scores: np.ndarray) -> None:
        """Add the cells of further items; those that are there already keep their means.

        One thread at a time may add.
        """
        known = self._rows
        new = [tuple(cell) not in known for cell in np.sort(codes, 1).tolist()]
        if not any(new):
            return
        more = CellScores(codes[new], level_scores[new])
        first, n_cells = self._n_cells, self._n_cells + more._n_cells
        if n_cells > len(self._codes):
            # Half as much room again, so that one cell at a time stays cheap.
            room = n_cells + n_cells // 2
            self._scores, self._codes = (
                np.concatenate([old[:first], np.zeros((room - first, *old.shape[1:]), old.dtype)])
                for old in (self._scores, self._codes)
            )
        self._scores[first:n_cells] = more._scores
        self._codes[first:n_cells] = more._codes
        self._n_cells = n_cells
        # Last of all: a reader finds a cell here first.
        known.update({cell: first + row for cell, row in more._rows.items()})

    def __getstate__(self) -> dict[str, Any]:
        n = self._n_cells
        return {"_scores": self._scores[:n], "_codes": self._codes[:n], "_n_cells": n, "_row_of": None}


def _cell_sums(codes: np.ndarray, level_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells in ascending order, (n_cells, sparsity); their items' number, and sum of scores in float64."""
    cells, cell_of = np.unique(np.sort(codes, 1), axis=0, return_inverse=True)
    counts = np.bincount(cell_of.ravel(), minlength=len(cells))
    sums = np.zeros((len(cells), *level_scores.shape[1:]))
    if len(codes):
        # A product with the matrix that has a one where an item is in a cell; `np.add.reduceat` takes ten
        # times as long.
        order = np.argsort(cell_of.ravel(), kind="stable")
        indptr = np.concatenate([[0], np.cumsum(counts)])
        is_in = sp.csr_matrix((np.ones(len(order)), order, indptr), shape=(len(cells), len(order)))
        flat, flat_sums = level_scores.reshape(len(codes), -1), sums.reshape(len(cells), -1)
        for start in range(0, flat.shape[1], _COLUMNS):
            part = slice(start, start + _COLUMNS)
            flat_sums[:, part] = is_in @ flat[:, part]
    return cells, counts, sums


def _merged(
    first: tuple[np.ndarray, np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells, counts and sums of both."""
    both = np.concatenate([first[0], second[0]])
    cells, rows = np.unique(both, axis=0, return_inverse=True)
    rows = rows.ravel()
    counts = np.zeros(len(cells), dtype=np.int64)
    sums = np.zeros((len(cells), *first[2].shape[1:]))
    n_first = len(first[0])
    # Within either part no cell comes twice.
    for part, at in ((first, rows[:n_first]), (second, rows[n_first:])):
        counts[at] += part[1]
        sums[at] += part[2]
    return cells, counts, sums


def _best_first(cells: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Order the leaves of each cell by their scores; equal ones by ascending id."""
    n_levels, branching_factor = scores.shape[1:]
    leaf_scores = np.zeros(cells.shape, dtype=np.float64)
    for level in range(n_levels):
        digits = cells // branching_factor ** (n_levels - 1 - level) % branching_factor
        leaf_scores += np.take_along_axis(scores[:, level], digits, 1)
    return np.take_along_axis(cells, np.argsort(-leaf_scores, 1, kind="stable"), 1)
