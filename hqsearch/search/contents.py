"""What a table of leaves holds: its segments, the views of them that searches read, and its items."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hqsearch.search.checks import check_allowed, readable
from hqsearch.search.snapshot import Directory, Tail

if TYPE_CHECKING:
    from hqsearch.search.probing import PrefixTree
    from hqsearch.search.segments import Segment


class TableContents:
    """The fields of a `LeafTable`, and all that only reads them."""

    n_items: int
    n_live_items: int
    branching_factor: int
    n_levels: int
    sparsity: int
    embedding_dim: int
    storage: str
    _segments: tuple[Segment, ...]
    _tail: Tail
    _n_tail: int
    # One byte for each position, and some to come; 1 says not removed. Tables share it until one
    # removes items.
    _live_flags: np.ndarray

    def _changed(self, **changes) -> Self:
        """Make a table that differs in some fields; views made on first use are not handed on."""
        table = object.__new__(type(self))
        for name in TableContents.__annotations__:
            setattr(table, name, changes[name] if name in changes else getattr(self, name))
        return table

    def _sort_items(self, vectors: np.ndarray, codes: np.ndarray, positions: np.ndarray) -> Segment:
        """Encode items for this table's storage and sort them into cells."""
        from hqsearch.search import blocks
        from hqsearch.search.segments import Segment

        kind = blocks.STORAGE_KINDS[self.storage]
        low = step = np.zeros(self.embedding_dim, dtype=np.float32)
        if kind == blocks.INT8:
            low, step = blocks.byte_scale(vectors)
            if self._segments:
                # Keep the table's scale where it reaches: equal scales merge without rounding anew.
                first = self._segments[0]
                if (vectors >= first.low - first.step / 2).all() and (
                    vectors <= first.low + first.step * 255.5
                ).all():
                    low, step = first.low, first.step
        return Segment.build(blocks.encode(vectors, kind, low, step), codes, positions, low, step)

    # Views of the snapshot, made on first use. Two threads may make one twice; both results are the same.

    @cached_property
    def _directory(self) -> Directory:
        tail = self._tail_segment()
        return Directory.build(self._segments if tail is None else (*self._segments, tail))

    @cached_property
    def _tree(self) -> PrefixTree:
        from hqsearch.search.probing import PrefixTree

        return PrefixTree.build(self._directory.leaf_ids, self.branching_factor, self.n_levels)

    @cached_property
    def _leaf_arrays(self) -> tuple[np.ndarray, ...]:
        """What a plan reads of the leaves, in the order of its parameters."""
        leaves = self._directory
        arrays = (leaves.leaf_ids, leaves.leaf_start, leaves.leaf_cells, leaves.cell_live, *self._tree)
        return tuple(readable(array) for array in arrays)

    @cached_property
    def _places(self) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Address and size of each array of a table of one segment, in the order of `engine.search_alone`.

        The last row holds the kind of storage. The arrays come with it: whoever uses the addresses holds
        them. Copies and pickles of the table leave both behind.
        """
        plain, encoded, kind, *rest = self._directory.segments[0].kernel_arrays
        arrays = (*self._leaf_arrays, plain, encoded, *rest)
        places = [(array.ctypes.data, array.size) for array in arrays]
        return np.array([*places, (kind, 0)], dtype=np.int64), arrays

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in TableContents.__annotations__}

    def _tail_segment(self) -> Segment | None:
        """Sort the live items of the tail, if there are any."""
        first = self.n_items - self._n_tail
        rows = np.flatnonzero(self._live_flags[first : self.n_items])
        if rows.size == 0:
            return None
        return self._sort_items(
            self._tail.vectors[rows], self._tail.codes[rows], (first + rows).astype(np.int32)
        )

    # Reading

    @property
    def n_leaves_(self) -> int:
        """Leaves that hold a live item."""
        return self.occupied_leaves().size

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that exist now, the views made on first use among them."""
        total = sum(segment.nbytes for segment in self._segments) + self._live_flags.nbytes
        if self._n_tail:
            total += self._tail.vectors.nbytes + self._tail.codes.nbytes
        if "_tree" in self.__dict__:
            total += sum(array.nbytes for array in self._tree)
        return total

    def occupied_leaves(self) -> np.ndarray:
        """Leaves that hold a live item, ascending.

        Returns
        -------
        leaf_ids : ndarray of shape (n_leaves_,), dtype int64
            Their ids.
        """
        return self._directory.leaf_ids[self._directory.live_by_leaf() > 0]

    def leaf_sizes(self) -> np.ndarray:
        """Live items of each of the `occupied_leaves`; an item counts in each of its leaves.

        Returns
        -------
        sizes : ndarray of shape (n_leaves_,), dtype int64
            Items.
        """
        sizes = self._directory.live_by_leaf()
        return sizes[sizes > 0]

    def count_in_leaves(self, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Items of each leaf that a search may return.

        Parameters
        ----------
        allowed : ndarray of shape (n_items,), dtype bool, default=None
            As in `search`.

        Returns
        -------
        leaf_ids : ndarray of shape (n_leaves,), dtype int64
            Leaves that hold a live item, or did, ascending.
        counts : ndarray of shape (n_leaves,), dtype int64
            Live and allowed items; an item counts in each of its leaves.

        Raises
        ------
        ValueError
            If `allowed` has the wrong shape or type.
        """
        directory = self._directory
        if allowed is not None:
            flags = check_allowed(allowed, self.n_items) & self._live_flags[: self.n_items]
            directory = directory._replace(cell_live=directory.count_kept(flags))
        return directory.leaf_ids, directory.live_by_leaf()

    def items_in_leaf(self, leaf_id: int) -> np.ndarray:
        """Positions of the live items of one leaf, ascending.

        Parameters
        ----------
        leaf_id : int
            Any leaf id; an empty leaf gives an empty array.

        Returns
        -------
        positions : ndarray of shape (n_items_in_leaf,), dtype int64
            Positions.
        """
        found = [np.empty(0, dtype=np.int64)]
        for segment in self._directory.segments:
            found.append(segment.positions[segment.rows_in_leaf(leaf_id)].astype(np.int64))
        positions = np.sort(np.concatenate(found))
        return positions[self._live_flags[positions] != 0]

    def live_positions(self) -> np.ndarray:
        """Positions that are not removed, ascending.

        Returns
        -------
        positions : ndarray of shape (n_live_items,), dtype int64
            What `compact` renumbers 0, 1, 2, ...
        """
        return np.flatnonzero(self._live_flags[: self.n_items])

    def stored_vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Live items as they are stored.

        Returns
        -------
        positions : ndarray of shape (n_live_items,), dtype int64
            Their positions, ascending.
        vectors : ndarray of shape (n_live_items, embedding_dim), dtype float32
            Their vectors, as rounded by the storage.
        """
        positions = self.live_positions()
        vectors = np.empty((positions.size, self.embedding_dim), dtype=np.float32)
        for segment in self._directory.segments:
            live = self._live_flags[segment.positions] != 0
            vectors[np.searchsorted(positions, segment.positions[live])] = segment.vectors()[live]
        return positions, vectors

    def stored_codes(self) -> np.ndarray:
        """Codes of the live items, in the order of `live_positions`.

        Returns
        -------
        codes : ndarray of shape (n_live_items, sparsity), dtype int64
            Leaf ids, ascending within a row.
        """
        positions = self.live_positions()
        codes = np.empty((positions.size, self.sparsity), dtype=np.int64)
        for segment in self._directory.segments:
            live = self._live_flags[segment.positions] != 0
            codes[np.searchsorted(positions, segment.positions[live])] = segment.row_codes()[live]
        return codes
