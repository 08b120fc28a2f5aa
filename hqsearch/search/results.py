"""What a search gives back: neighbours, and the counts of the work that found them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


# Not frozen: a frozen one takes a single query, which takes ten, half a microsecond longer to make.
@dataclass(slots=True, unsafe_hash=True)
class SearchStats:
    """Counts of the work of one or more searches; two of them add up with ``+``.

    Attributes
    ----------
    n_queries : int
        Queries answered.
    leaves_opened : int
        Leaves looked up over all queries, the empty ones among them.
    empty_leaves : int
        Leaves of a query's own code that held no item. Other empty leaves are never visited.
    candidates : int
        Different items of the opened leaves that a query could have returned, summed over queries.
    distances : int
        (query, item) pairs whose distance was computed. An item in several opened leaves counts once.
    items : int
        Items that an exhaustive search would have scored, summed over queries.

    Examples
    --------
    >>> from hqsearch.search import SearchStats
    >>> first = SearchStats(n_queries=1, leaves_opened=1, candidates=5, distances=5, items=100)
    >>> total = first + SearchStats(n_queries=1, leaves_opened=2, candidates=15, distances=15, items=100)
    >>> total.suf()
    10.0
    """

    n_queries: int = 0
    leaves_opened: int = 0
    empty_leaves: int = 0
    candidates: int = 0
    distances: int = 0
    items: int = 0

    def __add__(self, other: SearchStats) -> SearchStats:
        if not isinstance(other, SearchStats):
            return NotImplemented
        return SearchStats(
            self.n_queries + other.n_queries,
            self.leaves_opened + other.leaves_opened,
            self.empty_leaves + other.empty_leaves,
            self.candidates + other.candidates,
            self.distances + other.distances,
            self.items + other.items,
        )

    def suf(self) -> float:
        """Search speed-up factor: distances of an exhaustive search over distances computed.

        Returns
        -------
        suf : float
            ``items / distances``; infinity when no distance was needed, NaN when nothing was searched.
        """
        if self.distances == 0:
            return float("inf") if self.items else float("nan")
        return self.items / self.distances


@dataclass(slots=True)
class SearchResult:
    """Nearest neighbours of a batch of queries.

    Attributes
    ----------
    distances : ndarray of shape (n_queries, n_neighbors), dtype float32
        Euclidean distances (not squared), ascending; infinity where fewer items exist or are allowed.
    positions : ndarray of shape (n_queries, n_neighbors), dtype int64
        Positions of the items; equal distances are listed by ascending position; -1 where the row ends early.
    stats : SearchStats
        The work of this search.
    n_found : int
        The least number of neighbours found for any query: ``n_neighbors`` when every row is full.
    """

    distances: np.ndarray
    positions: np.ndarray
    stats: SearchStats = field(default_factory=SearchStats)
    n_found: int = 0


@dataclass(slots=True)
class RadiusResult:
    """All items within a radius of each query, as rows of a CSR structure.

    Attributes
    ----------
    indptr : ndarray of shape (n_queries + 1,), dtype int64
        Query ``i`` owns the entries ``indptr[i]:indptr[i + 1]`` of the other two arrays.
    distances : ndarray of shape (n_found,), dtype float32
        Euclidean distances (not squared), ascending within a query.
    positions : ndarray of shape (n_found,), dtype int64
        Positions of the items; equal distances are listed by ascending position.
    stats : SearchStats
        The work of this search.
    """

    indptr: np.ndarray
    distances: np.ndarray
    positions: np.ndarray
    stats: SearchStats = field(default_factory=SearchStats)
