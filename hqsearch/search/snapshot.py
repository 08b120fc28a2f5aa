"""Pieces that successive tables share: the directory over all segments, and room for items just added."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from hqsearch.search.segments import Segment


class Directory(NamedTuple):
    """The leaves of several segments together, with cells numbered through from the first to the last.

    Attributes
    ----------
    segments : tuple of Segment
        Where the items are.
    first_cell : tuple of int
        Number of each segment's first cell.
    leaf_ids, leaf_start, leaf_cells, cell_live : ndarray
        As in a `Segment`, over all of them.
    """

    segments: tuple[Segment, ...]
    first_cell: tuple[int, ...]
    leaf_ids: np.ndarray
    leaf_start: np.ndarray
    leaf_cells: np.ndarray
    cell_live: np.ndarray

    @classmethod
    def build(cls, segments: tuple[Segment, ...]) -> Directory:
        """Join the leaves of segments; a single one is not copied."""
        if not segments:
            none, none32 = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
            return cls((), (), none, np.zeros(1, dtype=np.int64), none32, none32)
        if len(segments) == 1:
            only = segments[0]
            return cls(segments, (0,), only.leaf_ids, only.leaf_start, only.leaf_cells, only.cell_live)
        first_cell = np.concatenate([[0], np.cumsum([piece.n_cells for piece in segments])])
        leaf_of_entry = np.concatenate([np.repeat(p.leaf_ids, np.diff(p.leaf_start)) for p in segments])
        cells = np.concatenate([p.leaf_cells + f for p, f in zip(segments, first_cell[:-1], strict=True)])
        by_leaf = np.argsort(leaf_of_entry, kind="stable")
        leaf_ids, starts = np.unique(leaf_of_entry[by_leaf], return_index=True)
        return cls(
            segments,
            tuple(int(first) for first in first_cell[:-1]),
            leaf_ids,
            np.append(starts, by_leaf.size).astype(np.int64),
            cells[by_leaf].astype(np.int32),
            np.concatenate([piece.cell_live for piece in segments]),
        )

    def cells_of(self, positions: np.ndarray) -> np.ndarray:
        """Cell of each position over all segments, -1 for none (int64)."""
        cells = np.full(len(positions), -1, dtype=np.int64)
        for first, segment in zip(self.first_cell, self.segments, strict=True):
            here = segment.cells_of(positions)
            cells = np.where(here >= 0, here + first, cells)
        return cells

    def live_by_leaf(self) -> np.ndarray:
        """Live items of each leaf (int64)."""
        if not self.leaf_ids.size:
            return np.empty(0, dtype=np.int64)
        return np.add.reduceat(self.cell_live[self.leaf_cells].astype(np.int64), self.leaf_start[:-1])

    def count_kept(self, keep: np.ndarray) -> np.ndarray:
        """Items of each cell whose position is flagged in `keep` (int32)."""
        counts = [np.empty(0, dtype=np.int32)]
        for segment in self.segments:
            kept = np.concatenate([[0], np.cumsum(keep[segment.positions], dtype=np.int64)])
            counts.append(np.diff(kept[segment.cell_start]).astype(np.int32))
        return np.concatenate(counts)


class Tail:
    """Room for items in order of arrival; each table sees the first few, and only unseen room is written."""

    CAPACITY = 1024

    def __init__(self, embedding_dim: int, sparsity: int) -> None:
        self.vectors = np.empty((self.CAPACITY, embedding_dim), dtype=np.float32)
        self.codes = np.empty((self.CAPACITY, sparsity), dtype=np.int64)
        self.used = 0
        self.lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.lock = threading.Lock()

    def append(self, seen: int, vectors: np.ndarray, codes: np.ndarray) -> Tail:
        """Write items after the first `seen` ones: here, or in a copy when another table wrote there."""
        with self.lock:
            if self.used == seen:
                self.vectors[seen : seen + len(vectors)] = vectors
                self.codes[seen : seen + len(codes)] = codes
                self.used = seen + len(vectors)
                return self
        fork = Tail(self.vectors.shape[1], self.codes.shape[1])
        fork.vectors[:seen] = self.vectors[:seen]
        fork.codes[:seen] = self.codes[:seen]
        fork.used = seen
        return fork.append(seen, vectors, codes)
