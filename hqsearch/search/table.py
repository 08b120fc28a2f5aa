"""Leaves -> item lists: the table that an index searches. A change gives a new table and spares the old."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from hqsearch.search.batches import radius_batch, search_batch
from hqsearch.search.checks import check_count, check_items, check_removal, check_shape
from hqsearch.search.contents import TableContents
from hqsearch.search.interchange import export_faiss, list_cells
from hqsearch.search.snapshot import Tail

if TYPE_CHECKING:
    from hqsearch.search.results import RadiusResult, SearchResult
    from hqsearch.search.segments import Segment

# A segment is merged into the one before it unless that one is this many times larger.
_MERGE_RATIO = 8


class LeafTable(TableContents):
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

    plus at most ``embedding_dim * 8 + 128`` for each of the few segments, with b = 4, 2, 1 bytes for
    float32, float16 and int8 storage. Each vector is stored once whatever the sparsity. The first search
    builds a tree of at most ``16 * n_levels`` bytes an occupied leaf, leaving items out (`exclude`,
    `remove`) an inverse of 4 bytes an item, and adding items a tail of
    ``1024 * (4 * embedding_dim + 8 * sparsity)`` bytes. `nbytes` counts what exists now.

    Distances are computed in float32 whatever the storage; with "float16" and "int8" they are distances
    to the rounded vectors, and "int8" spreads 256 levels over the range of each dimension. On learned
    embeddings of digits (three seeds) and of glyphs of 100 characters, precision@1, 4 and 16 changed by
    less than 0.0001 with "float16" and by at most 0.0003 with "int8" (`benchmarks/bench_search.py`).

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

    def __init__(self) -> None:
        raise TypeError("LeafTable has no public constructor: use LeafTable.build")

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
        check_shape(branching_factor, n_levels, storage)
        table = object.__new__(cls)
        table.branching_factor, table.n_levels, table.storage = int(branching_factor), int(n_levels), storage
        table.n_items = table.n_live_items = table._n_tail = 0
        table.embedding_dim = table.sparsity = -1
        table._segments = ()
        vectors, codes = check_items(vectors, codes, table)
        table.embedding_dim, table.sparsity = vectors.shape[1], codes.shape[1]
        table._tail = Tail(table.embedding_dim, table.sparsity)
        if len(vectors):
            table._segments = (table._sort_items(vectors, codes, np.arange(len(vectors), dtype=np.int32)),)
        table.n_items = table.n_live_items = len(vectors)
        table._live_flags = np.ones(table.n_items, dtype=np.uint8)
        return table

    # Searching

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
            Each query's own leaves, best first. Behind these there may be leaves in reserve, as ``~leaf``, a
            negative number: they don't count as own ones, but come before all others.
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
        n_neighbors = check_count("n_neighbors", n_neighbors)
        n_probes = None if n_probes is None else check_count("n_probes", n_probes)
        return search_batch(
            self, queries, level_scores, codes, n_neighbors, n_probes, probing, exclude, allowed, n_jobs
        )

    def radius_search(
        self,
        queries: np.ndarray,
        level_scores: np.ndarray,
        codes: np.ndarray,
        radius: float,
        *,
        n_probes: int | None = None,
        probing: str = "best_first",
        exclude: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
        n_jobs: int | None = None,
    ) -> RadiusResult:
        """Find all items within a radius, among those of the leaves that each query opens.

        Parameters
        ----------
        radius : float
            Euclidean distance (not squared), at least 0; items at this very distance are found.
        n_probes : int or None, default=None
            Leaves to open, the query's own ones included; None stands for these alone. No further leaf is
            opened, however few items are found; ``n_probes=table.n_leaves_ + table.sparsity`` opens all.
        queries, level_scores, codes, probing, exclude, allowed, n_jobs
            As in `search`.

        Returns
        -------
        result : RadiusResult
            Distances and positions as a CSR structure, and stats.

        Raises
        ------
        ValueError
            If an argument has the wrong shape, type or range, or is NaN or infinite.
        """
        if not isinstance(radius, Real) or not radius >= 0:
            raise ValueError(f"Expected radius >= 0, got {radius!r}")
        n_probes = None if n_probes is None else check_count("n_probes", n_probes)
        return radius_batch(
            self, queries, level_scores, codes, radius, n_probes, probing, exclude, allowed, n_jobs
        )

    # Changing

    def add(self, vectors: np.ndarray, codes: np.ndarray) -> LeafTable:
        """Append items.

        Adding one item costs microseconds: it waits in a tail that the next search sorts, and a full tail is
        sorted into a segment that is merged into larger ones as a binary counter carries.

        Parameters
        ----------
        vectors : array-like of shape (n_added, embedding_dim), dtype float32
            Vectors.
        codes : array-like of shape (n_added, sparsity), dtype int64
            Their leaves, as in `build`.

        Returns
        -------
        table : LeafTable
            A table that holds them too, at positions ``self.n_items`` and following. This one stays as it is.

        Raises
        ------
        ValueError
            If a shape, a leaf id or a vector is not as in `build`.
        """
        vectors, codes = check_items(vectors, codes, self)
        n_items = self.n_items + len(vectors)
        flags = self._live_flags
        if n_items > flags.size:
            flags = np.ones(max(Tail.CAPACITY, n_items + n_items // 8), dtype=np.uint8)
            flags[: self.n_items] = self._live_flags[: self.n_items]
        changes = {
            "n_items": n_items, "n_live_items": self.n_live_items + len(vectors), "_live_flags": flags,
        }  # fmt: skip
        n_tail = self._n_tail + len(vectors)
        if n_tail <= Tail.CAPACITY:
            tail = self._tail.append(self._n_tail, vectors, codes)
            return self._changed(**changes, _tail=tail, _n_tail=n_tail)
        vectors = np.concatenate([self._tail.vectors[: self._n_tail], vectors])
        codes = np.concatenate([self._tail.codes[: self._n_tail], codes])
        positions = np.arange(n_items - n_tail, n_items, dtype=np.int32)
        live = flags[positions] != 0
        latest = self._sort_items(vectors[live], codes[live], positions[live])
        segments = self._merge_into((*self._segments, latest), flags)
        tail = Tail(self.embedding_dim, self.sparsity)
        return self._changed(**changes, _segments=segments, _tail=tail, _n_tail=0)

    @staticmethod
    def _merge_into(segments: tuple[Segment, ...], flags: np.ndarray) -> tuple[Segment, ...]:
        """Merge the last segments as long as the one before is not much larger than they are."""
        from hqsearch.search.segments import Segment

        first = len(segments) - 1
        n_rows = segments[first].n_rows
        while first > 0 and segments[first - 1].n_rows < _MERGE_RATIO * n_rows:
            first -= 1
            n_rows += segments[first].n_rows
        if first == len(segments) - 1:
            return segments
        merged = Segment.merge(segments[first:], flags)
        return segments[:first] if merged is None else (*segments[:first], merged)

    def remove(self, positions: np.ndarray) -> LeafTable:
        """Take items out; their positions stay vacant, and no other item is renumbered.

        Parameters
        ----------
        positions : array-like of shape (n_removed,), dtype int64
            Positions of live items; one that is listed twice is removed once.

        Returns
        -------
        table : LeafTable
            A table without them. This one stays as it is.

        Raises
        ------
        ValueError
            If a position was never given or is removed already.
        """
        from hqsearch.search.segments import Segment

        positions = check_removal(positions, self._live_flags, self.n_items)
        flags = self._live_flags.copy()
        flags[positions] = 0
        segments = []
        for segment in self._segments:
            rest = segment.without(positions)
            # A segment that is mostly holes is written anew: searches need not skip them for ever.
            mostly_holes = rest is not segment and 2 * rest.n_live < rest.n_rows
            packed = Segment.merge((rest,), flags) if mostly_holes else rest
            if packed is not None:
                segments.append(packed)
        return self._changed(
            n_live_items=self.n_live_items - positions.size, _live_flags=flags, _segments=tuple(segments)
        )

    def compact(self) -> LeafTable:
        """Store the live items in one piece and renumber them 0, 1, 2, ... in the order of `live_positions`.

        Returns
        -------
        table : LeafTable
            A table without vacant positions. This one stays as it is.
        """
        from hqsearch.search.segments import Segment

        segments = self._directory.segments
        merged = Segment.merge(segments, self._live_flags) if segments else None
        if merged is not None:
            new_position = np.cumsum(self._live_flags[: self.n_items], dtype=np.int32) - 1
            merged = replace(merged, positions=new_position[merged.positions])
        return self._changed(
            n_items=self.n_live_items,
            _segments=() if merged is None else (merged,),
            _tail=Tail(self.embedding_dim, self.sparsity),
            _n_tail=0,
            _live_flags=np.ones(self.n_live_items, dtype=np.uint8),
        )

    # Serving from elsewhere

    def to_faiss(self) -> Any:
        """Make a faiss index whose inverted lists are this table's cells.

        With ``sparsity=1`` a cell is a leaf. Above, cells are the different sets of leaves, because
        lists that share items would return them twice; `cells_to_probe` names the lists that make
        up a query's leaves.

        Returns
        -------
        index : faiss.IndexIVFFlat
            Its ids are positions and its distances are squared. ``index.search`` probes the
            lists of the nearest means, as any IVF index does; ``index.search_preassigned`` with
            `cells_to_probe` returns what `search` returns (faiss breaks ties in another order).

        Raises
        ------
        ImportError
            If faiss is not installed.

        Examples
        --------
        >>> import numpy as np
        >>> from hqsearch.search import LeafTable
        >>> vectors = np.array([[0, 0], [1, 0], [5, 5]], dtype=np.float32)
        >>> table = LeafTable.build(vectors, np.array([[0], [0], [3]]), branching_factor=2, n_levels=2)
        >>> index = table.to_faiss()  # doctest: +SKIP
        >>> lists = table.cells_to_probe(np.zeros((1, 2, 2), np.float32), np.array([[0]]), 2)
        >>> lists
        array([[0]])
        >>> index.nprobe = lists.shape[1]  # doctest: +SKIP
        >>> unused = np.zeros(lists.shape, np.float32)
        >>> index.search_preassigned(vectors[:1], 2, lists, unused)  # doctest: +SKIP
        (array([[0., 1.]], dtype=float32), array([[0, 1]]))
        """
        return export_faiss(self)

    def cells_to_probe(
        self,
        level_scores: np.ndarray,
        codes: np.ndarray,
        n_neighbors: int,
        *,
        n_probes: int | None = None,
        probing: str = "best_first",
    ) -> np.ndarray:
        """Name the cells that a search would score: the lists of the index that `to_faiss` makes.

        Parameters
        ----------
        level_scores, codes, n_neighbors, n_probes, probing
            As in `search`.

        Returns
        -------
        lists : ndarray of shape (n_queries, most_cells), dtype int64
            Cells of each query, filled up with -1.

        Raises
        ------
        ValueError
            If an argument has the wrong shape, type or range, or is NaN or infinite.
        """
        n_neighbors = check_count("n_neighbors", n_neighbors)
        n_probes = None if n_probes is None else check_count("n_probes", n_probes)
        return list_cells(self, level_scores, codes, n_neighbors, n_probes, probing)
