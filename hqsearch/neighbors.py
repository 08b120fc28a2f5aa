"""Searching the fitted items of an index: neighbours, those within a radius, and graphs of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from numbers import Integral, Real
from operator import index as as_int
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.utils.validation import _num_samples, check_is_fitted

from hqsearch.gallery import Gallery
from hqsearch.items import Described, FittedItems, IndexState
from hqsearch.search import SearchStats


class NeighborsMixin:
    """Searches of an index, which describes items and queries, and holds the items."""

    n_neighbors: int
    n_probes: int | None
    # Pickles of before there was an epsilon.
    epsilon: float | str = 0.0
    probing: str
    radius: float
    n_jobs: int | None
    gallery_: Gallery | None
    _items: FittedItems
    _state: IndexState
    _describe: Callable[[Any], Described]
    _epsilon_of_encoder: Callable[[], float]

    def kneighbors(
        self,
        X: Any = None,
        n_neighbors: int | None = None,
        return_distance: bool = True,
        *,
        n_probes: int | None = None,
        epsilon: float | str | None = None,
        allowed: np.ndarray | None = None,
        return_stats: bool = False,
    ) -> Any:
        """Nearest neighbours among the candidates of each query.

        Parameters
        ----------
        X : array-like of shape (n_queries, ...), default=None
            Queries. None means the fitted items that are not removed, each without itself.
        n_neighbors : int, default=None
            Neighbours of each query; None takes the index's.
        return_distance : bool, default=True
            Whether to return distances too.
        n_probes : int, default=None
            Leaves to open at least; None takes the index's.
        epsilon : float or "auto", default=None
            How much farther than the nearest leaf others may be that are opened too; None takes the index's.
        allowed : ndarray of shape (n_positions_,), dtype bool, default=None
            Items that may be returned. The others are left out before anything is scored.
        return_stats : bool, default=False
            Whether to return the counts of this call's work too.

        Returns
        -------
        distances : ndarray of shape (n_queries, n_neighbors), dtype float32
            Euclidean distances (not squared) of embeddings, ascending. Only with `return_distance=True`.
        positions : ndarray of shape (n_queries, n_neighbors), dtype int64
            Positions of the neighbours among the fitted items; those of equal squared distances, in float32,
            by ascending position.
        stats : SearchStats
            `n_queries`, `leaves_opened`, `empty_leaves`, `candidates`, `distances`, and `suf()`. Only with
            `return_stats=True`.

        Raises
        ------
        ValueError
            If `n_neighbors` exceeds the number of items, or of allowed ones, or X does not fit the encoder.

        Notes
        -----
        With `X=None`, the mean level scores of the items that share an item's leaves stand for its own.
        """
        check_is_fitted(self)
        options = self._search_options(n_probes, epsilon, allowed)
        distances, positions, stats = self._search(self._items, X, n_neighbors, options)
        return _choose((distances, return_distance), (positions, True), (stats, return_stats))

    def _search(
        self,
        items: FittedItems,
        X: Any,
        n_neighbors: int | None,
        options: dict[str, Any],
    ) -> tuple[np.ndarray, np.ndarray, SearchStats]:
        """Search one snapshot, which whoever asks for more than neighbours must hold on to."""
        n_neighbors = check_n_neighbors(self.n_neighbors if n_neighbors is None else n_neighbors)
        _check_enough_items(X, n_neighbors, items.table.n_live_items)
        found = [
            items.search(queries, n_neighbors, exclude=own, **options)
            for queries, own in self._queries(X, items)
        ]
        n_found = min((part.n_found for part in found), default=n_neighbors)
        if n_found < n_neighbors:
            raise ValueError(
                "Expected n_neighbors <= number of allowed items, but "
                f"n_neighbors = {n_neighbors}, and a query has only {n_found}."
            )
        stats = self._count(found)
        distances, positions = (
            getattr(found[0], name)
            if len(found) == 1
            else np.concatenate([getattr(part, name) for part in found])
            for name in ("distances", "positions")
        )
        return distances, positions, stats

    def _queries(self, X: Any, items: FittedItems) -> Iterator[tuple[Described, np.ndarray | None]]:
        """Embedding, level scores and codes of the queries, and for fitted items their own positions."""
        if X is not None:
            yield self._describe(X), None
            return
        for own, described in items.own_queries():
            yield described, own

    def _search_options(
        self,
        n_probes: int | None = None,
        epsilon: float | str | None = None,
        allowed: np.ndarray | None = None,
    ) -> dict[str, Any]:
        n_probes = self.n_probes if n_probes is None else n_probes
        return {
            "n_probes": n_probes,
            "epsilon": self._resolve_epsilon(self.epsilon if epsilon is None else epsilon, n_probes),
            "probing": self.probing,
            "allowed": allowed,
            "n_jobs": self.n_jobs,
        }

    def _resolve_epsilon(self, epsilon: Any, n_probes: int | None) -> float:
        """Turn `epsilon` into a number: "auto" asks gallery and encoder, unless the probes are counted."""
        if isinstance(epsilon, str) and epsilon == "auto":
            if n_probes is not None or self.probing != "centroids":
                return 0.0
            gallery: Gallery | None = getattr(self, "gallery_", None)
            of_gallery = 0.0 if gallery is None else gallery.epsilon
            # The encoder's is of items that are listed by centroids.
            listed = self._items.listing == "centroids"
            return max(of_gallery, self._epsilon_of_encoder() if listed else 0.0)
        if not isinstance(epsilon, Real) or not 0 <= float(epsilon) < math.inf:
            raise ValueError(f"Expected epsilon to be 'auto' or a finite number >= 0, got {epsilon!r}.")
        return float(epsilon)

    def _count(self, found: list) -> SearchStats:
        stats = sum((part.stats for part in found), SearchStats())
        self._state.count(stats)
        return stats

    def radius_neighbors(
        self,
        X: Any = None,
        radius: float | None = None,
        return_distance: bool = True,
        *,
        n_probes: int | None = None,
        epsilon: float | str | None = None,
        allowed: np.ndarray | None = None,
        return_stats: bool = False,
    ) -> Any:
        """Neighbours within a radius, among the items of the leaves that each query opens.

        Parameters
        ----------
        X : array-like of shape (n_queries, ...), default=None
            Queries. None means the fitted items that are not removed, each without itself.
        radius : float, default=None
            Euclidean distance (not squared) of embeddings up to which items are returned; None takes the
            index's.
        return_distance : bool, default=True
            Whether to return distances too.
        n_probes : int, default=None
            Leaves to open; None takes the index's. Only `epsilon` opens further ones, however few items are
            found.
        epsilon : float or "auto", default=None
            How much farther than the nearest leaf others may be that are opened too; None takes the index's.
        allowed : ndarray of shape (n_positions_,), dtype bool, default=None
            Items that may be returned.
        return_stats : bool, default=False
            Whether to return the counts of this call's work too.

        Returns
        -------
        distances : ndarray of shape (n_queries,), dtype object
            An array of float32 distances for each query, ascending. Only with `return_distance=True`.
        positions : ndarray of shape (n_queries,), dtype object
            An array of int64 positions for each query.
        stats : SearchStats
            Counts of this call. Only with `return_stats=True`.

        Raises
        ------
        ValueError
            If `radius` is negative, or X does not fit the encoder.
        """
        check_is_fitted(self)
        items = self._items
        options = self._search_options(n_probes, epsilon, allowed)
        found = [
            items.radius_search(
                queries,
                self.radius if radius is None else radius,
                exclude=own,
                **options,
            )
            for queries, own in self._queries(X, items)
        ]
        stats = self._count(found)
        distances, positions = (
            _array_of_arrays(
                [
                    getattr(part, name)[start:stop]
                    for part in found
                    for start, stop in pairwise(part.indptr.tolist())
                ]
            )
            for name in ("distances", "positions")
        )
        return _choose((distances, return_distance), (positions, True), (stats, return_stats))

    def kneighbors_graph(
        self,
        X: Any = None,
        n_neighbors: int | None = None,
        mode: str = "connectivity",
        *,
        n_probes: int | None = None,
        epsilon: float | str | None = None,
        allowed: np.ndarray | None = None,
    ) -> sp.csr_matrix:
        """Nearest neighbours as a sparse graph.

        Parameters
        ----------
        X : array-like of shape (n_queries, ...), default=None
            Queries. None means the fitted items, each without itself.
        n_neighbors : int, default=None
            Neighbours of each query; None takes the index's.
        mode : {"connectivity", "distance"}, default="connectivity"
            Entries: ones, or Euclidean distances of embeddings.
        n_probes : int, default=None
            Leaves to open at least; None takes the index's.
        epsilon : float or "auto", default=None
            How much farther than the nearest leaf others may be that are opened too; None takes the index's.
        allowed : ndarray of shape (n_positions_,), dtype bool, default=None
            Items that may be returned.

        Returns
        -------
        csr_matrix of shape (n_queries, n_positions_), dtype float64
            `n_neighbors` entries per row, by ascending distance.

        Raises
        ------
        ValueError
            As `kneighbors`, and if `mode` is unknown.
        """
        if mode not in ("connectivity", "distance"):
            raise ValueError(f"Expected mode to be 'connectivity' or 'distance', got {mode!r}.")
        check_is_fitted(self)
        items = self._items
        options = self._search_options(n_probes, epsilon, allowed)
        distances, positions, _ = self._search(items, X, n_neighbors, options)
        values = distances.astype(np.float64) if mode == "distance" else np.ones(distances.shape)
        indptr = np.arange(len(positions) + 1) * positions.shape[1]
        return sp.csr_matrix(
            (values.ravel(), positions.ravel(), indptr), shape=(len(positions), items.table.n_items)
        )

    def to_faiss(self) -> Any:
        """Copy the items into a faiss IVF index whose lists are our leaves (extra `faiss`).

        Returns
        -------
        faiss.IndexIVFFlat
            Its ids are our positions. Search it with `search_preassigned` and the lists of
            `faiss_lists`: the neighbours are the same, until this index changes: then copy it anew.

        Raises
        ------
        ImportError
            If faiss is not installed.
        """
        check_is_fitted(self)
        return self._items.table.to_faiss()

    def faiss_lists(
        self,
        X: Any,
        n_neighbors: int | None = None,
        *,
        n_probes: int | None = None,
        epsilon: float | str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prepare queries for the index of `to_faiss`: what its `search_preassigned` wants to know.

        Parameters
        ----------
        X : array-like of shape (n_queries, ...)
            Queries.
        n_neighbors : int, default=None
            Neighbours that will be asked for; None takes the index's.
        n_probes : int, default=None
            Leaves to open; None takes the index's.
        epsilon : float or "auto", default=None
            How much farther than the nearest leaf others may be that are opened too; None takes the index's.

        Returns
        -------
        embedding : ndarray of shape (n_queries, embedding_dim), dtype float32
            The query vectors.
        lists : ndarray of shape (n_queries, n_lists), dtype int64
            Lists to open, -1 past a query's last.
        """
        check_is_fitted(self)
        n_neighbors = check_n_neighbors(self.n_neighbors if n_neighbors is None else n_neighbors)
        items = self._items
        options = self._search_options(n_probes, epsilon)
        opened, options = items.leaves_to_open(self._describe(X), n_neighbors, **options)
        embedding, level_scores, codes = opened
        return embedding, items.table.cells_to_probe(level_scores, codes, n_neighbors, **options)

    @property
    def search_stats_(self) -> SearchStats:
        """Counts of all searches since `fit`: queries, leaves opened, empty leaves, candidates, distances."""
        check_is_fitted(self)
        return self._state.total()

    def suf(self) -> float:
        """Search speed-up factor of all searches since `fit`.

        Returns
        -------
        float
            Distances that exhaustive search would have computed, over those computed between queries and
            items. The comparisons of queries with centroids of leaves don't count, as those with the lists of
            an inverted file don't.
        """
        return self.search_stats_.suf()


def check_n_neighbors(n_neighbors: Any) -> int:
    """Validate a number of neighbours; TypeError and ValueError as scikit-learn has them."""
    if not isinstance(n_neighbors, Integral):
        raise TypeError(f"n_neighbors does not take {type(n_neighbors)} value, enter integer value.")
    n_neighbors = as_int(n_neighbors)
    if n_neighbors <= 0:
        raise ValueError(f"Expected n_neighbors > 0, but n_neighbors = {n_neighbors}.")
    return n_neighbors


def _check_enough_items(X: Any, n_neighbors: int, n_items: int) -> None:
    if n_neighbors > n_items - (X is None):
        bound, n_queries = ("<", n_items) if X is None else ("<=", _num_samples(X))
        raise ValueError(
            f"Expected n_neighbors {bound} n_samples_fit, but n_neighbors = {n_neighbors}, "
            f"n_samples_fit = {n_items}, n_samples = {n_queries}."
        )


def _array_of_arrays(rows: list[np.ndarray]) -> np.ndarray:
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


def _choose(*parts: tuple[Any, bool]) -> Any:
    """Return the wanted parts: one by itself, several as a tuple."""
    wanted = tuple(part for part, want in parts if want)
    return wanted[0] if len(wanted) == 1 else wanted
