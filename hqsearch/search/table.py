"""Leaves -> item lists: the table that an index searches. A change gives a new table and spares the old."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hqsearch.search.results import SearchResult, SearchStats

if TYPE_CHECKING:
    from hqsearch.search.probing import PrefixTree
    from hqsearch.search.segments import Segment

STORAGES = ("float32", "float16", "int8")
PROBINGS = ("best_first", "lexicographic")

# Items added wait here in order of arrival; a fuller tail is sorted into a segment.
_TAIL_CAPACITY = 1024
# A segment is merged into the one before it unless that one is this many times larger.
_MERGE_RATIO = 8
# Keys hold a position in 31 bits.
_MAX_ITEMS = 2**31 - 2
# Queries of one task: enough to share leaves, few enough to stay in the caches and to spread over threads.
_SLICE = 2048


class _Directory(NamedTuple):
    """The leaves of all segments together, with cells numbered through from the first segment to the last."""

    segments: tuple[Segment, ...]
    first_cell: tuple[int, ...]
    leaf_ids: np.ndarray
    leaf_start: np.ndarray
    leaf_cells: np.ndarray
    cell_live: np.ndarray


class _Tail:
    """Room for items in order of arrival; each table sees the first few, and only unseen room is written."""

    def __init__(self, embedding_dim: int, sparsity: int) -> None:
        self.vectors = np.empty((_TAIL_CAPACITY, embedding_dim), dtype=np.float32)
        self.codes = np.empty((_TAIL_CAPACITY, sparsity), dtype=np.int64)
        self.used = 0
        self.lock = threading.Lock()

    def append(self, seen: int, vectors: np.ndarray, codes: np.ndarray) -> _Tail:
        """Write items after the first `seen` ones: here, or in a copy when another table wrote there."""
        with self.lock:
            if self.used == seen:
                self.vectors[seen : seen + len(vectors)] = vectors
                self.codes[seen : seen + len(codes)] = codes
                self.used = seen + len(vectors)
                return self
        fork = _Tail(self.vectors.shape[1], self.codes.shape[1])
        fork.vectors[:seen] = self.vectors[:seen]
        fork.codes[:seen] = self.codes[:seen]
        fork.used = seen
        return fork.append(seen, vectors, codes)


class LeafTable:
    """Items listed by the leaves of their codes, ready to be searched by many threads at once.

    A table never changes: `add`, `remove` and `compact` return a new one that shares what it can, so
    whoever holds a table may go on searching it. Make one with `build`.

    Attributes
    ----------
    n_items : int
        Positions ever given, the removed ones among them.
    n_live_items : int
        Items that a search can return.
    branching_factor, n_levels, sparsity, embedding_dim : int
        Shape of the codes and of the vectors.
    storage : {"float32", "float16", "int8"}
        How vectors are kept.

    Notes
    -----
    Memory in bytes, for `n` rows stored, `c` cells (different sets of leaves; with ``sparsity=1`` the
    occupied leaves) and `l` occupied leaves::

        n * (embedding_dim * b + 4) + n_items + c * (8 * sparsity + 4 * sparsity + 12) + l * 16

    plus at most ``embedding_dim * 8 + 128`` for each of the few segments, with b = 4, 2, 1 bytes for float32,
    float16 and int8 storage. Each vector is stored once whatever the sparsity. Leaving items out (`exclude`,
    `remove`) builds an inverse of 4 bytes an item; opening leaves beyond a query's own builds a tree of
    at most ``16 * n_levels`` bytes an occupied leaf. `nbytes` counts what exists now.

    Distances are computed in float32 whatever the storage; with "float16" and "int8" they are distances
    to the rounded vectors, and "int8" spreads 256 levels over the range of each dimension.

    Examples
    --------
    >>> import numpy as np
    >>> from hqsearch.search import LeafTable
    >>> vectors = np.array([[0, 0], [1, 0], [5, 5]], dtype=np.float32)
    >>> table = LeafTable.build(vectors, np.array([[0], [0], [3]]), branching_factor=2, n_levels=2)
    >>> scores = np.array([[[1, 0], [1, 0]]], dtype=np.float32)
    >>> result = table.search(vectors[:1], scores, np.array([[0]]), 2)
    >>> result.positions, result.distances, result.stats.distances
    (array([[0, 1]]), array([[0., 1.]], dtype=float32), 2)
    """

    n_items: int
    branching_factor: int
    n_levels: int
    sparsity: int
    embedding_dim: int
    storage: str

    def __init__(self) -> None:
        raise TypeError("LeafTable has no public constructor: use LeafTable.build")

    @classmethod
    def _make(cls, template: LeafTable | None = None, **changes) -> LeafTable:
        """Make a table from the fields of another one (not its cached views) and some changes."""
        table = object.__new__(cls)
        if template is not None:
            for name in cls._FIELDS:
                setattr(table, name, getattr(template, name))
        for name, value in changes.items():
            setattr(table, name, value)
        return table

    _FIELDS = (
        "n_items", "n_live_items", "branching_factor", "n_levels", "sparsity", "embedding_dim", "storage",
        "_segments", "_tail", "_n_tail", "_live_flags",
    )  # fmt: skip
    n_live_items: int
    _segments: tuple[Segment, ...]
    _tail: _Tail
    _n_tail: int
    # One byte for each position and some to come; 1 says not removed. Shared until something is removed.
    _live_flags: np.ndarray

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        codes: np.ndarray,
        *,
        branching_factor: int,
        n_levels: int,
        storage: str = "float32",
    ) -> LeafTable:
        """Sort items into leaves.

        Parameters
        ----------
        vectors : array-like of shape (n_items, embedding_dim), dtype float32
            What candidates are ranked by.
        codes : array-like of shape (n_items, sparsity), dtype int64
            Leaf ids of each item, in ``[0, branching_factor ** n_levels)``, different within a row.
        branching_factor : int
            Buckets of a level.
        n_levels : int
            Levels of a code.
        storage : {"float32", "float16", "int8"}, default="float32"
            How vectors are kept; 4, 2 or 1 bytes for each dimension.

        Returns
        -------
        table : LeafTable
            The table; positions are the rows of `vectors`.

        Raises
        ------
        ValueError
            If a shape, a leaf id, a vector or the storage is not as described.
        """
        from hqsearch.search import blocks
        from hqsearch.search.segments import Segment

        if storage not in STORAGES:
            raise ValueError(f"Expected storage to be one of {STORAGES}, got {storage!r}")
        if branching_factor < 1 or n_levels < 1 or int(branching_factor) ** int(n_levels) > 2**62:
            raise ValueError(
                "Expected branching_factor >= 1, n_levels >= 1 and branching_factor ** n_levels <= 2 ** 62, "
                f"but branching_factor = {branching_factor}, n_levels = {n_levels}"
            )
        table = cls._make(
            branching_factor=int(branching_factor), n_levels=int(n_levels), storage=storage,
            embedding_dim=-1, sparsity=-1, n_items=0, n_live_items=0, _segments=(), _n_tail=0,
        )  # fmt: skip
        vectors, codes = table._check_items(vectors, codes)
        table.embedding_dim, table.sparsity = vectors.shape[1], codes.shape[1]
        table.n_items = table.n_live_items = len(vectors)
        table._tail = _Tail(table.embedding_dim, table.sparsity)
        table._live_flags = np.ones(table.n_items, dtype=np.uint8)
        if table.n_items:
            kind = blocks.STORAGE_KINDS[storage]
            low = step = np.zeros(table.embedding_dim, dtype=np.float32)
            if kind == blocks.INT8:
                low, step = blocks.byte_scale(vectors)
            raw = blocks.encode(vectors, kind, low, step)
            positions = np.arange(table.n_items, dtype=np.int32)
            table._segments = (Segment.build(raw, codes, positions, low, step),)
        return table

    def _check_items(self, vectors, codes) -> tuple[np.ndarray, np.ndarray]:
        """Validate items to be stored; return them as contiguous float32 and int64 arrays."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        codes = np.asarray(codes)
        if codes.dtype.kind not in "iu":
            raise ValueError(f"Expected codes of an integer dtype, got {codes.dtype}")
        codes = np.ascontiguousarray(codes, dtype=np.int64)
        if vectors.ndim != 2 or vectors.shape[1] == 0 or self.embedding_dim not in (-1, vectors.shape[1]):
            wanted = "embedding_dim >= 1" if self.embedding_dim == -1 else str(self.embedding_dim)
            raise ValueError(f"Expected vectors of shape (n_items, {wanted}), got {vectors.shape}")
        if (
            codes.ndim != 2
            or len(codes) != len(vectors)
            or codes.shape[1] == 0
            or self.sparsity not in (-1, codes.shape[1])
        ):
            wanted = "sparsity >= 1" if self.sparsity == -1 else str(self.sparsity)
            raise ValueError(f"Expected codes of shape ({len(vectors)}, {wanted}), got {codes.shape}")
        if self.n_items + len(vectors) > _MAX_ITEMS:
            raise ValueError(f"Expected n_items <= {_MAX_ITEMS}, got {self.n_items + len(vectors)}")
        if len(vectors) == 0:
            return vectors, codes
        if not np.isfinite(vectors).all():
            raise ValueError("Input vectors contains NaN or infinity.")
        if self.storage == "float16" and np.abs(vectors).max() > np.finfo(np.float16).max:
            raise ValueError(
                f"Expected vectors within ±65504 for storage='float16', got {np.abs(vectors).max()}"
            )
        n_leaves = self.branching_factor**self.n_levels
        if codes.min() < 0 or codes.max() >= n_leaves:
            raise ValueError(f"Expected codes in [0, {n_leaves}), got {codes.min()} to {codes.max()}")
        if codes.shape[1] > 1:
            ascending = np.sort(codes, axis=1)
            if (ascending[:, 1:] == ascending[:, :-1]).any():
                raise ValueError("Expected different leaves within each row of codes, got a leaf twice")
        return vectors, codes

    # Views of the snapshot, made on first use. Two threads may make one twice; both results are the same.

    @cached_property
    def _directory(self) -> _Directory:
        segments = self._segments
        if self._n_tail:
            tail = self._tail_segment()
            segments = (*segments, tail) if tail is not None else segments
        if not segments:
            none, none32 = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
            return _Directory((), (), none, np.zeros(1, dtype=np.int64), none32, none32)
        if len(segments) == 1:
            only = segments[0]
            return _Directory(segments, (0,), only.leaf_ids, only.leaf_start, only.leaf_cells, only.cell_live)
        first_cell = np.concatenate([[0], np.cumsum([piece.n_cells for piece in segments])])
        leaf_of_entry = np.concatenate([np.repeat(p.leaf_ids, np.diff(p.leaf_start)) for p in segments])
        cells = np.concatenate([p.leaf_cells + f for p, f in zip(segments, first_cell[:-1], strict=True)])
        by_leaf = np.argsort(leaf_of_entry, kind="stable")
        leaf_ids, starts = np.unique(leaf_of_entry[by_leaf], return_index=True)
        return _Directory(
            segments,
            tuple(int(first) for first in first_cell[:-1]),
            leaf_ids,
            np.append(starts, by_leaf.size).astype(np.int64),
            cells[by_leaf].astype(np.int32),
            np.concatenate([piece.cell_live for piece in segments]),
        )

    def _tail_segment(self) -> Segment | None:
        from hqsearch.search import blocks
        from hqsearch.search.segments import Segment

        first = self.n_items - self._n_tail
        rows = np.flatnonzero(self._live_flags[first : self.n_items])
        if rows.size == 0:
            return None
        vectors = self._tail.vectors[rows]
        kind = blocks.STORAGE_KINDS[self.storage]
        low = step = np.zeros(self.embedding_dim, dtype=np.float32)
        if kind == blocks.INT8:
            low, step = self._scale_for(vectors)
        raw = blocks.encode(vectors, kind, low, step)
        return Segment.build(raw, self._tail.codes[rows], (first + rows).astype(np.int32), low, step)

    def _scale_for(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the table's 8-bit scale when it spans the vectors, else one of their own."""
        from hqsearch.search import blocks

        if self._segments:
            low, step = self._segments[0].low, self._segments[0].step
            if (vectors >= low - step / 2).all() and (vectors <= low + step * 255.5).all():
                return low, step
        return blocks.byte_scale(vectors)

    @cached_property
    def _tree(self) -> PrefixTree:
        from hqsearch.search.probing import PrefixTree

        return PrefixTree.build(self._directory.leaf_ids, self.branching_factor, self.n_levels)

    @property
    def _has_removed(self) -> bool:
        return self.n_live_items < self.n_items

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
        return total + sum(s.__dict__["_row_of"].nbytes for s in self._segments if "_row_of" in s.__dict__)

    def occupied_leaves(self) -> np.ndarray:
        """Leaves that hold a live item, ascending.

        Returns
        -------
        leaf_ids : ndarray of shape (n_leaves_,), dtype int64
            Their ids.
        """
        return self._directory.leaf_ids[self._live_by_leaf() > 0]

    def leaf_sizes(self) -> np.ndarray:
        """Live items of each of the `occupied_leaves`; an item counts in each of its leaves.

        Returns
        -------
        sizes : ndarray of shape (n_leaves_,), dtype int64
            Items.
        """
        sizes = self._live_by_leaf()
        return sizes[sizes > 0]

    def _live_by_leaf(self) -> np.ndarray:
        directory = self._directory
        if not directory.leaf_ids.size:
            return np.empty(0, dtype=np.int64)
        live = directory.cell_live[directory.leaf_cells].astype(np.int64)
        return np.add.reduceat(live, directory.leaf_start[:-1])

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
        """Positions that are not removed, ascending (int64); `compact` renumbers them 0, 1, 2, ..."""
        return np.flatnonzero(self._live_flags[: self.n_items])

    # Searching

    def stored_vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Live items and their vectors as stored, decoded to float32.

        Returns
        -------
        positions : ndarray of shape (n_live_items,), dtype int64
            Ascending.
        vectors : ndarray of shape (n_live_items, embedding_dim), dtype float32
            Their vectors; rounded as the storage rounds them.
        """
        from hqsearch.search import blocks

        vectors = np.empty((self.n_items, self.embedding_dim), dtype=np.float32)
        for segment in self._directory.segments:
            vectors[segment.positions] = blocks.decode(segment.raw_rows(), segment.low, segment.step)
        positions = self.live_positions()
        return positions, vectors if len(positions) == self.n_items else vectors[positions]

    def search(
        self,
        queries: np.ndarray,
        level_scores: np.ndarray,
        codes: np.ndarray,
        n_neighbors: int,
        *,
        n_probes: int | None = None,
        probing: str = "best_first",
        exclude: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
        n_jobs: int | None = None,
    ) -> SearchResult:
        """Find the nearest items of the leaves that each query opens.

        A query opens its own leaves in the order of its code, then the other occupied leaves, best
        first. Equal leaves come by ascending id.

        Parameters
        ----------
        queries : ndarray of shape (n_queries, embedding_dim), dtype float32
            Embedded queries.
        level_scores : ndarray of shape (n_queries, n_levels, branching_factor), dtype float32
            Scores of the buckets; read for queries that open leaves beyond their own.
        codes : ndarray of shape (n_queries, sparsity), dtype int64
            Each query's own leaves, best first.
        n_neighbors : int
            Neighbours wanted, at least 1.
        n_probes : int or None, default=None
            Leaves to open, the query's own ones included; None stands for these alone. Either
            way further leaves are opened while fewer than `n_neighbors` candidates are there.
        probing : {"best_first", "lexicographic"}, default="best_first"
            Order of further leaves: by the sum of level scores, or parent by parent in the
            order of their scores.
        exclude : ndarray of shape (n_queries,), dtype int64, default=None
            A position to leave out for each query, -1 for none.
        allowed : ndarray of shape (n_items,), dtype bool, default=None
            Items that may be returned. The others count as removed for this call, in every respect.
        n_jobs : int or None, default=None
            Threads; None stands for 1 unless in a :func:`joblib.parallel_config` context.
            Results don't depend on it.

        Returns
        -------
        result : SearchResult
            Distances, positions, stats. Rows are full when as many items exist and are allowed.

        Raises
        ------
        ValueError
            If an argument has the wrong shape, type or range, or is NaN or infinite.
        """
        queries, level_scores, codes = self._check_queries(queries, level_scores, codes)
        n_neighbors = _check_count("n_neighbors", n_neighbors)
        probes = -1 if n_probes is None else _check_count("n_probes", n_probes)
        if probing not in PROBINGS:
            raise ValueError(f"Expected probing to be one of {PROBINGS}, got {probing!r}")
        directory = self._directory
        n_queries = len(queries)
        keep, cell_live, n_items = self._check_allowed(allowed)
        n_total = n_items * n_queries
        if exclude is None:
            skipped = own_cell = np.full(n_queries, -1, dtype=np.int64)
        else:
            skipped = self._check_exclude(exclude, n_queries)
            own_cell = self._cells_of(skipped)
            gone = self._live_flags if allowed is None else keep
            n_total -= int(((skipped >= 0) & (gone[skipped] != 0)).sum())
        out_distances = np.empty((n_queries, n_neighbors), dtype=np.float32)
        out_positions = np.empty((n_queries, n_neighbors), dtype=np.int64)
        tree = self._tree
        plan = (
            codes, level_scores, own_cell, n_neighbors, probes, probing == "lexicographic",
            directory.leaf_ids, directory.leaf_start, directory.leaf_cells, cell_live,
            tree.child_start, tree.digit, tree.level_start, self.sparsity > 1 or codes.shape[1] > 1,
        )  # fmt: skip

        def run(order):
            return self._search_slice(
                queries, order, plan, directory, keep, skipped, out_distances, out_positions
            )

        outcomes = _over_slices(run, codes, n_jobs)
        totals = (
            np.sum([outcome[0] for outcome in outcomes], axis=0) if outcomes else np.zeros(4, dtype=np.int64)
        )
        if totals[3]:
            raise ValueError("Input level_scores contains NaN or infinity.")
        opened, empty, candidates = (int(total) for total in totals[:3])
        return SearchResult(
            out_distances,
            out_positions,
            SearchStats(n_queries, opened, empty, candidates, candidates, n_total),
            min((outcome[1] for outcome in outcomes), default=n_neighbors),
        )

    def _search_slice(self, queries, order, plan, directory, keep, skipped, out_distances, out_positions):
        """Answer the queries named by `order`; return the plan's totals and the least number found."""
        from hqsearch.search import engine

        codes, level_scores, own_cell, n_neighbors, n_probes, lexicographic, *leaves = plan
        if len(directory.segments) == 1:
            only = directory.segments[0]
            return engine.search_slice(  # type: ignore[call-arg]
                queries, order, codes, level_scores, n_neighbors, n_probes, lexicographic, skipped, own_cell,
                *leaves, only.plain, only.encoded, only.kind, only.low, only.step,
                only.cell_start, only.positions, keep, out_distances, out_positions,
            )  # fmt: skip
        pair_query, pair_cell, totals = engine.plan_search(order, *plan)
        if totals[3]:
            return totals, 0
        pair_query, pair_cell = engine.sort_pairs(pair_query, pair_cell, directory.cell_live.size)
        taken, taken_skipped = engine.take_rows(queries, skipped, order)
        keys = np.full(order.size * n_neighbors, engine.EMPTY_KEY, dtype=np.int64)
        for first, segment in zip(directory.first_cell, directory.segments, strict=True):
            lo, hi = np.searchsorted(pair_cell, (first, first + segment.n_cells))
            engine.score_pairs(
                taken, taken_skipped, pair_query, pair_cell, lo, hi, first,
                segment.plain, segment.encoded, segment.kind, segment.low, segment.step,
                segment.cell_start, segment.positions, keep, keys, n_neighbors,
            )  # fmt: skip
        return totals, engine.finish_rows(keys, order, n_neighbors, out_distances, out_positions)

    def _check_queries(self, queries, level_scores, codes):
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.embedding_dim:
            raise ValueError(
                f"Expected queries of shape (n_queries, {self.embedding_dim}), got {queries.shape}"
            )
        level_scores = np.ascontiguousarray(level_scores, dtype=np.float32)
        wanted = (len(queries), self.n_levels, self.branching_factor)
        if level_scores.shape != wanted:
            raise ValueError(f"Expected level_scores of shape {wanted}, got {level_scores.shape}")
        codes = np.ascontiguousarray(codes, dtype=np.int64)
        if codes.ndim != 2 or len(codes) != len(queries) or codes.shape[1] == 0:
            raise ValueError(f"Expected codes of shape ({len(queries)}, sparsity >= 1), got {codes.shape}")
        if not np.isfinite(queries).all():
            raise ValueError("Input queries contains NaN or infinity.")
        return queries, level_scores, codes

    def _check_allowed(self, allowed) -> tuple[np.ndarray, np.ndarray, int]:
        """Return flags of the items to keep (empty: all), live items of each cell, and their number."""
        directory = self._directory
        if allowed is None:
            keep = self._live_flags if self._has_removed else _NO_MASK
            return keep, directory.cell_live, self.n_live_items
        allowed = np.asarray(allowed)
        if allowed.dtype != np.bool_ or allowed.shape != (self.n_items,):
            raise ValueError(
                f"Expected allowed of shape ({self.n_items},) and dtype bool, "
                f"got {allowed.shape} and {allowed.dtype}"
            )
        keep = allowed.view(np.uint8) & self._live_flags[: self.n_items]
        counts = [np.empty(0, dtype=np.int32)]
        for segment in directory.segments:
            kept = np.concatenate([[0], np.cumsum(keep[segment.positions], dtype=np.int64)])
            counts.append(np.diff(kept[segment.cell_start]).astype(np.int32))
        return keep, np.concatenate(counts), int(keep.sum())

    def _check_exclude(self, exclude, n_queries: int) -> np.ndarray:
        exclude = np.ascontiguousarray(exclude, dtype=np.int64)
        if exclude.shape != (n_queries,):
            raise ValueError(f"Expected exclude of shape ({n_queries},), got {exclude.shape}")
        if n_queries and (exclude.min() < -1 or exclude.max() >= self.n_items):
            raise ValueError(
                f"Expected exclude in [-1, {self.n_items}), got {exclude.min()} to {exclude.max()}"
            )
        return exclude

    def _cells_of(self, positions: np.ndarray) -> np.ndarray:
        """Cell of each position over all segments, -1 for none."""
        directory = self._directory
        cells = np.full(len(positions), -1, dtype=np.int64)
        for first, segment in zip(directory.first_cell, directory.segments, strict=True):
            here = segment.cells_of(positions)
            cells = np.where(here >= 0, here + first, cells)
        return cells


_NO_MASK = np.empty(0, dtype=np.uint8)


def _check_count(name: str, value) -> int:
    """Validate a number that must be an integer of at least 1."""
    try:
        count = value.__index__()
    except AttributeError:
        raise ValueError(f"Expected {name} to be an integer >= 1, got {value!r}") from None
    if isinstance(value, bool) or count < 1:
        raise ValueError(f"Expected {name} to be an integer >= 1, got {value!r}")
    return count


def _over_slices(run, codes: np.ndarray, n_jobs: int | None) -> list:
    """Call `run` on slices of the queries, ordered by their first leaf so that a slice shares leaves."""
    n_queries = len(codes)
    if n_queries <= 1:
        return [run(np.arange(n_queries))] if n_queries else []
    order = np.argsort(codes[:, 0], kind="stable")
    slices = [order[i : i + _SLICE] for i in range(0, n_queries, _SLICE)]
    from joblib import Parallel, delayed, effective_n_jobs

    if len(slices) == 1 or effective_n_jobs(n_jobs) == 1:
        return [run(piece) for piece in slices]
    return Parallel(n_jobs=n_jobs, prefer="threads")(delayed(run)(piece) for piece in slices)
