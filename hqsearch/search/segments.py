"""Sorted runs of items: the immutable pieces that a leaf table is made of.

Items that share the same *set* of leaves form a cell. A cell's vectors are stored once and side by side,
and a leaf lists its cells; so sparsity > 1 neither multiplies the vectors nor makes a query score an item
twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from hqsearch.search import blocks
from hqsearch.search.checks import readable


@dataclass(frozen=True)
class Segment:
    """A run of items in cell order, with vectors laid out for the kernels.

    Attributes
    ----------
    packed : ndarray, dtype float32, uint16 or uint8
        Vectors in the layout of `blocks`, `SLACK` values longer than the items need.
    low, step : ndarray of shape (embedding_dim,), dtype float32
        The scale of 8-bit storage; unused otherwise.
    positions : ndarray of shape (n_rows,), dtype int32
        The position of each stored row; ascending within a cell.
    cell_start : ndarray of shape (n_cells + 1,), dtype int64
        First row of each cell.
    cell_codes : ndarray of shape (n_cells, sparsity), dtype int64
        The leaves of each cell, ascending.
    cell_live : ndarray of shape (n_cells,), dtype int32
        Rows of each cell that are not removed.
    leaf_ids : ndarray of shape (n_leaves,), dtype int64
        Leaves that hold a row, ascending.
    leaf_start : ndarray of shape (n_leaves + 1,), dtype int64
        First entry of each leaf in `leaf_cells`.
    leaf_cells : ndarray of shape (n_cells * sparsity,), dtype int32
        The cells of each leaf.
    """

    packed: np.ndarray
    low: np.ndarray
    step: np.ndarray
    positions: np.ndarray
    cell_start: np.ndarray
    cell_codes: np.ndarray
    cell_live: np.ndarray
    leaf_ids: np.ndarray
    leaf_start: np.ndarray
    leaf_cells: np.ndarray

    @classmethod
    def build(cls, raw, codes, positions, low, step) -> Segment:
        """Sort raw rows into cells.

        Parameters
        ----------
        raw : ndarray of shape (n_rows, embedding_dim), dtype float32, uint16 or uint8
            Vectors as `blocks.encode` gives them.
        codes : ndarray of shape (n_rows, sparsity), dtype int64
            Leaves of each row.
        positions : ndarray of shape (n_rows,), dtype int32
            Their positions, ascending.
        low, step : ndarray of shape (embedding_dim,), dtype float32
            The scale of 8-bit storage.

        Returns
        -------
        segment : Segment
            The sorted run.
        """
        n_rows, embedding_dim = raw.shape
        sparsity = codes.shape[1]
        if sparsity > 1:
            codes = np.sort(codes, axis=1)
            order = np.lexsort(codes.T[::-1])
        else:
            order = np.argsort(codes[:, 0], kind="stable")
        codes = codes[order]
        opens = np.ones(n_rows, dtype=bool)
        opens[1:] = (codes[1:] != codes[:-1]).any(axis=1)
        first = np.flatnonzero(opens)
        cell_codes = codes[first]
        cell_start = np.append(first, n_rows).astype(np.int64)
        by_leaf = np.argsort(cell_codes.ravel(), kind="stable")
        leaf_ids, leaf_first = np.unique(cell_codes.ravel()[by_leaf], return_index=True)
        packed = blocks.aligned_zeros(n_rows * embedding_dim + blocks.SLACK, raw.dtype.type)
        blocks.pack(np.ascontiguousarray(raw).ravel(), order, cell_start, embedding_dim, packed)
        return cls(
            packed=packed,
            low=low,
            step=step,
            positions=positions[order],
            cell_start=cell_start,
            cell_codes=cell_codes,
            cell_live=np.diff(cell_start).astype(np.int32),
            leaf_ids=leaf_ids,
            leaf_start=np.append(leaf_first, by_leaf.size).astype(np.int64),
            leaf_cells=(by_leaf // sparsity).astype(np.int32),
        )

    @classmethod
    def merge(cls, segments, live_flags) -> Segment | None:
        """Make one segment of the live rows of several, None when there are none.

        8-bit segments of different scales are decoded and given the scale that spans them all.
        """
        raws = [segment.raw_rows() for segment in segments]
        codes = np.concatenate([segment.row_codes() for segment in segments])
        positions = np.concatenate([segment.positions for segment in segments])
        low, step = segments[0].low, segments[0].step
        same = all(
            np.array_equal(low, other.low) and np.array_equal(step, other.step) for other in segments[1:]
        )
        if raws[0].dtype == np.uint8 and not same:
            vectors = np.concatenate(
                [blocks.decode(raw, piece.low, piece.step) for raw, piece in zip(raws, segments, strict=True)]
            )
            low, step = blocks.byte_scale(vectors)
            raws = [blocks.encode(vectors, blocks.INT8, low, step)]
        order = np.argsort(positions, kind="stable")
        order = order[live_flags[positions[order]] != 0]
        if order.size == 0:
            return None
        raw = raws[0] if len(raws) == 1 else np.concatenate(raws)
        return cls.build(raw[order], codes[order], positions[order], low, step)

    def __getstate__(self) -> dict[str, Any]:
        # What is derived from the arrays is not: read from a mapped file it would be of another type.
        return {name: getattr(self, name) for name in Segment.__annotations__}

    @property
    def n_rows(self) -> int:
        """Rows stored, the removed ones among them."""
        return self.positions.size

    @property
    def n_live(self) -> int:
        """Rows that are not removed."""
        return int(self.cell_live.sum())

    @property
    def n_cells(self) -> int:
        """Different sets of leaves."""
        return self.cell_start.size - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = [getattr(self, name) for name in Segment.__annotations__]
        inverse = self.__dict__.get("_row_of")
        return sum(array.nbytes for array in arrays) + (0 if inverse is None else inverse.nbytes)

    @cached_property
    def kernel_arrays(self) -> tuple:
        """What the scoring kernels read of a segment, in the order of their parameters.

        Kernels take one type for each parameter: float32 vectors come as such beside no bytes,
        encoded ones as bytes beside no floats, and the third entry says which (`blocks.PLAIN`,
        `FLOAT16` or `INT8`).
        """
        raw_dtypes: list[type] = list(blocks.RAW_DTYPES)
        kind = raw_dtypes.index(self.packed.dtype.type)
        plain, encoded = readable(self.packed), np.empty(0, dtype=np.uint8)
        if kind != blocks.PLAIN:
            plain, encoded = np.empty(0, dtype=np.float32), plain.view(np.uint8)
        rest = (self.low, self.step, self.cell_start, self.positions)
        return plain, encoded, kind, *(readable(array) for array in rest)

    @cached_property
    def _row_of(self) -> np.ndarray:
        """Row of each position from `positions.min()` on, -1 for positions that are not here."""
        rows = np.full(int(self.positions.max()) - self.first_position + 1, -1, dtype=np.int32)
        rows[self.positions - self.first_position] = np.arange(self.n_rows, dtype=np.int32)
        return rows

    @cached_property
    def first_position(self) -> int:
        """The lowest position stored."""
        return int(self.positions.min())

    def cells_of(self, positions) -> np.ndarray:
        """Cell of each of the given positions, -1 for those that are not here (int64)."""
        offsets = np.asarray(positions, dtype=np.int64) - self.first_position
        inside = (offsets >= 0) & (offsets < self._row_of.size)
        rows = np.where(inside, self._row_of[np.where(inside, offsets, 0)], -1)
        cells = np.searchsorted(self.cell_start, rows, side="right") - 1
        return np.where(rows >= 0, cells, -1)

    def without(self, positions) -> Segment:
        """Return the same segment, which now counts the given live positions as removed."""
        cells = self.cells_of(positions)
        gone = np.bincount(cells[cells >= 0], minlength=self.n_cells).astype(np.int32)
        if not gone.any():
            return self
        changed = replace(self, cell_live=self.cell_live - gone)
        # Views and inverses depend on the stored rows alone: share those that exist already.
        for name in ("kernel_arrays", "_row_of", "first_position"):
            if name in self.__dict__:
                changed.__dict__[name] = self.__dict__[name]
        return changed

    def raw_rows(self) -> np.ndarray:
        """Row-major copy of the stored values, (n_rows, embedding_dim), in cell order."""
        embedding_dim = self.low.size
        rows = np.empty(self.n_rows * embedding_dim, dtype=self.packed.dtype)
        blocks.unpack(readable(self.packed), readable(self.cell_start), embedding_dim, rows)
        return rows.reshape(self.n_rows, embedding_dim)

    def vectors(self) -> np.ndarray:
        """Row-major float32 copy of the vectors, (n_rows, embedding_dim), in cell order."""
        return blocks.decode(self.raw_rows(), self.low, self.step)

    def row_codes(self) -> np.ndarray:
        """Leaves of each row, (n_rows, sparsity), ascending within a row."""
        return np.repeat(self.cell_codes, np.diff(self.cell_start), axis=0)

    def rows_in_leaf(self, leaf_id: int) -> np.ndarray:
        """Rows of one leaf (int64), empty where the leaf is."""
        i = int(np.searchsorted(self.leaf_ids, leaf_id))
        if i == self.leaf_ids.size or self.leaf_ids[i] != leaf_id:
            return np.empty(0, dtype=np.int64)
        cells = self.leaf_cells[self.leaf_start[i] : self.leaf_start[i + 1]]
        return np.concatenate([np.arange(self.cell_start[c], self.cell_start[c + 1]) for c in cells])
