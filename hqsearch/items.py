"""The fitted items of an index: an immutable snapshot, and the lock and counts around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from hqsearch.centroids import CentroidSums, LeafCentroids
from hqsearch.codes import CellScores
from hqsearch.listing import list_by_centroids, wanted_leaves
from hqsearch.search import LeafTable, RadiusResult, SearchResult, SearchStats, check_count

# Embedding, level scores and codes of some items or queries.
Described = tuple[np.ndarray, np.ndarray, np.ndarray]

PROBINGS = ("centroids", "best_first", "lexicographic")
LISTINGS = ("codes", "centroids")
# Level scores of larger trees would make the centroids larger than the items.
MOST_BUCKETS = 1024
# Leaves that are ranked in search of enough candidates; the table opens further ones by their scores.
_FEW_RANKED, _MOST_RANKED = 4, 64
_BLOCK = 16384
# In the place of a leaf, where there is none.
_NOWHERE = np.int64(2**63 - 1)


@dataclass(frozen=True)
class FittedItems:
    """All that is known of the items in an index. A change gives a new one; readers keep the one they hold.

    Attributes
    ----------
    table : LeafTable
        Their vectors and leaves; where leaves are parted, of a tree of more levels than the codes have.
    cell_scores : CellScores
        Mean level scores of the items that share their leaves; shared by all snapshots.
    centroids : LeafCentroids or None
        Where the leaves are; None for a tree of more than `MOST_BUCKETS` buckets in all its levels, more than
        `MOST_LEAVES` leaves, or level scores that are not finite.
    label_parts : tuple of ndarray, or None
        Labels by position, in a few parts, the earlier ones the larger; None when some item came without.
    listing : {"codes", "centroids"}
        Which leaves items are listed in: those of their codes, or those of the nearest centroids.
    """

    table: LeafTable
    cell_scores: CellScores
    centroids: LeafCentroids | None
    label_parts: tuple[np.ndarray, ...] | None
    listing: str = "codes"

    @classmethod
    def from_blocks(
        cls,
        blocks: Iterable[Described],
        *,
        branching_factor: int,
        n_levels: int,
        storage: str = "float32",
        labels: np.ndarray | None = None,
        listing: str = "codes",
        embedding_weight: float = 1.0,
        n_jobs: int | None = None,
    ) -> FittedItems:
        """List items that come block by block, because level scores of a million of them are gigabytes.

        Parameters
        ----------
        blocks : iterable of (embedding, level_scores, codes)
            At least one block; arrays as an encoder gives them.
        branching_factor, n_levels, storage
            As in `LeafTable.build`.
        labels : ndarray of shape (n_items,), default=None
            Their labels.
        listing : {"codes", "centroids"}, default="codes"
            Which leaves items are listed in. "centroids" starts with those of the codes, see
            `list_by_centroids`; where there are no centroids it is "codes".
        embedding_weight : float, default=1.0
            How much the embedding counts beside the level scores, see `CentroidSums`.
        n_jobs : int or None, default=None
            Threads that look for the nearest centroids, as in joblib.

        Returns
        -------
        FittedItems
        """
        # Python's numbers: products of numpy's overflow.
        branching_factor, n_levels = int(branching_factor), int(n_levels)
        shape = {"branching_factor": branching_factor, "n_levels": n_levels}
        has_centroids = branching_factor * n_levels <= MOST_BUCKETS
        sums = None
        if has_centroids:
            sums = CentroidSums(**shape, embedding_weight=embedding_weight, keep=listing == "centroids")
        parts: list[tuple[np.ndarray, np.ndarray]] = []

        def pass_on() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for embedding, level_scores, code in blocks:
                parts.append((embedding, code))
                if sums is not None:
                    sums.add(embedding, level_scores, code)
                yield code, level_scores

        cell_scores = CellScores.from_blocks(pass_on())
        embedding, codes = (np.concatenate(column) for column in zip(*parts, strict=True))
        centroids = sums.finish() if sums is not None and sums.usable else None
        listing = "codes" if centroids is None else listing
        if listing == "centroids" and len(codes):
            assert sums is not None
            assert centroids is not None
            directions = sums.directions()
            centroids, codes = list_by_centroids(centroids, embedding, directions, codes, n_jobs)
            level_scores = directions.reshape(-1, n_levels, branching_factor)
            rows = (slice(start, start + _BLOCK) for start in range(0, len(codes), _BLOCK))
            cell_scores = CellScores.from_blocks((codes[part], level_scores[part]) for part in rows)
        if centroids is not None:
            shape["n_levels"] += centroids.n_part_levels
        table = LeafTable.build(embedding, codes, **shape, storage=storage)
        return cls(table, cell_scores, centroids, None if labels is None else (labels,), listing)

    @property
    def branching_factor(self) -> int:
        """Of the codes."""
        return self.table.branching_factor

    @property
    def n_levels(self) -> int:
        """Of the codes; the table has more where leaves are parted."""
        n_part_levels = 0 if self.centroids is None else self.centroids.n_part_levels
        return self.table.n_levels - n_part_levels

    @property
    def labels(self) -> np.ndarray | None:
        """Label of each position, of shape (table.n_items,), or None."""
        if self.label_parts is None:
            return None
        return self.label_parts[0] if len(self.label_parts) == 1 else np.concatenate(self.label_parts)

    def __getstate__(self) -> dict[str, Any]:
        names = ("table", "cell_scores", "centroids", "labels", "listing")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        labels = state["labels"]
        parts = None if labels is None else (labels,)
        vars(self).update(table=state["table"], cell_scores=state["cell_scores"], label_parts=parts)
        # Written before there were centroids: made anew.
        centroids = state["centroids"] if "centroids" in state else self._make_centroids()
        vars(self).update(centroids=centroids, listing=state.get("listing", "codes"))

    def _make_centroids(self) -> LeafCentroids | None:
        table = self.table
        # Of an earlier version, whose tables have the levels of the codes.
        if table.branching_factor * table.n_levels > MOST_BUCKETS:
            return None
        sums = CentroidSums(branching_factor=table.branching_factor, n_levels=table.n_levels)
        for _, described in self.own_queries():
            sums.add(*described)
        return sums.finish() if sums.usable else None

    def own_queries(self) -> Iterator[tuple[np.ndarray, Described]]:
        """Positions of the live items, block by block, and what is known of them as queries."""
        own, embedding = self.table.stored_vectors()
        codes = self.table.stored_codes()
        for start in range(0, len(own), _BLOCK):
            block = slice(start, start + _BLOCK)
            level_scores, ordered = self.cell_scores.of(codes[block])
            yield own[block], (embedding[block], level_scores, ordered)

    # Searching

    def search(
        self,
        described: Described,
        n_neighbors: int,
        *,
        n_probes: int | None = None,
        epsilon: float = 0.0,
        probing: str = "centroids",
        exclude: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
        n_jobs: int | None = None,
    ) -> SearchResult:
        """Find neighbours; see `LeafTable.search`, and `leaves_to_open` for `probing="centroids"`."""
        opened, options = self.leaves_to_open(
            described,
            n_neighbors + (exclude is not None),
            n_probes=n_probes,
            epsilon=epsilon,
            probing=probing,
            allowed=allowed,
            n_jobs=n_jobs,
        )
        return self.table.search(
            *opened, n_neighbors, exclude=exclude, allowed=allowed, n_jobs=n_jobs, **options
        )

    def radius_search(
        self,
        described: Described,
        radius: float,
        *,
        n_probes: int | None = None,
        epsilon: float = 0.0,
        probing: str = "centroids",
        exclude: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
        n_jobs: int | None = None,
    ) -> RadiusResult:
        """Find all within a radius; see `LeafTable.radius_search`."""
        opened, options = self.leaves_to_open(
            described,
            0,
            n_probes=n_probes,
            epsilon=epsilon,
            probing=probing,
            allowed=allowed,
            n_jobs=n_jobs,
        )
        return self.table.radius_search(
            *opened, radius, exclude=exclude, allowed=allowed, n_jobs=n_jobs, **options
        )

    def leaves_to_open(
        self,
        described: Described,
        n_wanted: int,
        *,
        n_probes: int | None,
        probing: str,
        epsilon: float = 0.0,
        allowed: np.ndarray | None = None,
        n_jobs: int | None = None,
    ) -> tuple[Described, dict[str, Any]]:
        """Put the leaves that queries open in the place of their codes.

        Parameters
        ----------
        described : tuple of ndarray
            Queries.
        n_wanted : int
            Candidates that are wanted of each query.
        n_probes : int or None
            Leaves to open; None stands for as many as the queries' codes have.
        probing : {"centroids", "best_first", "lexicographic"}
            "centroids" names the leaves whose centroids are nearest, of those that hold items, and further
            ones while the first hold fewer than `n_wanted`. With the others the codes stay.
        epsilon : float, default=0.0
            Of the 64 nearest leaves, those at most `1 + epsilon` times as far as the nearest are opened too.
        allowed : ndarray of shape (table.n_items,), dtype bool, default=None
            Items that count.
        n_jobs : int or None, default=None
            Threads.

        Returns
        -------
        described : tuple of ndarray
            Queries whose codes are these leaves, nearest first; with `epsilon` the further ones in reserve.
        options : dict
            `n_probes` and `probing` for the table.
        """
        if probing != "centroids" and self.listing == "centroids":
            raise ValueError(
                f"Expected probing='centroids' for items that are listed by centroids, got {probing!r}; "
                "fit with listing='codes' for leaves by codes."
            )
        if probing != "centroids" and epsilon > 0:
            raise ValueError(f"Expected epsilon=0 with probing={probing!r}, got {epsilon!r}.")
        if probing != "centroids" or self.centroids is None:
            fallback = "best_first" if probing == "centroids" else probing
            return described, {"n_probes": n_probes, "probing": fallback}
        embedding, level_scores, codes = described
        n_opened = codes.shape[1] if n_probes is None else check_count("n_probes", n_probes)
        options = {"n_probes": n_opened, "probing": "best_first"}
        sizes = self._leaf_sizes if allowed is None else self._count_leaves(allowed)
        holds_items = sizes > 0
        n_leaves = int(np.count_nonzero(holds_items))
        shapes = embedding.shape[1:], level_scores.shape[1:]
        expected = (self.table.embedding_dim,), (self.n_levels, self.branching_factor)
        if shapes != expected:
            # The table says what is wrong.
            return described, options
        if n_leaves == 0 or len(embedding) == 0:
            return (embedding, self._for_table(level_scores), codes), options
        there = None if n_leaves == len(sizes) else holds_items
        most = min(max(n_opened, _MOST_RANKED), n_leaves)
        # An item in several of the leaves counts in each; with enough even so, what a query gets does not
        # depend on how many leaves are ranked, or on the other queries.
        enough = n_wanted * self.table.sparsity
        # Ranking a few takes hardly longer than ranking one, and twice as long where one is not enough.
        one_is_enough = epsilon == 0 and sizes[holds_items].min() >= enough
        width = min(n_opened if one_is_enough else max(n_opened, _FEW_RANKED), n_leaves)
        if epsilon > 0:
            rank = partial(self.centroids.rank, allowed=there, n_jobs=n_jobs)
            rows, n_certain = _rank_near(
                rank, embedding, level_scores, sizes, (n_opened, width, most), enough, epsilon
            )
            leaf_ids = np.append(self.centroids.leaf_ids, _NOWHERE)[rows]
            in_reserve = np.arange(rows.shape[1]) >= n_certain[:, None]
            np.invert(leaf_ids, out=leaf_ids, where=in_reserve)
            return (embedding, self._for_table(level_scores), leaf_ids), options | {"n_probes": None}
        while True:
            rows = self.centroids.nearest(embedding, level_scores, width, allowed=there, n_jobs=n_jobs)
            if width >= most or sizes[rows].sum(1).min() >= enough:
                break
            width = min(4 * width, most)
        return (embedding, self._for_table(level_scores), self.centroids.leaf_ids[rows]), options

    def _for_table(self, level_scores: np.ndarray) -> np.ndarray:
        """Level scores with those of the levels of parts below, which are all alike."""
        n_levels, d = level_scores.shape[1:]
        if n_levels == self.table.n_levels:
            return level_scores
        padded = np.zeros((len(level_scores), self.table.n_levels, d), dtype=np.float32)
        padded[:, :n_levels] = level_scores
        return padded

    @cached_property
    def _leaf_sizes(self) -> np.ndarray:
        return self._count_leaves(None)

    def _count_leaves(self, allowed: np.ndarray | None) -> np.ndarray:
        """Items in the leaf of each centroid that may be returned (int64)."""
        assert self.centroids is not None
        leaf_ids, counts = self.table.count_in_leaves(allowed)
        sizes = np.zeros(len(self.centroids.leaf_ids), dtype=np.int64)
        rows = self.centroids.rows_of(leaf_ids)
        sizes[rows[rows >= 0]] = counts[rows >= 0]
        return sizes

    # Changing

    def add(
        self, embedding: np.ndarray, level_scores: np.ndarray, codes: np.ndarray, labels: np.ndarray | None
    ) -> FittedItems:
        """Append items; see `LeafTable.add`."""
        parts = None
        if self.label_parts is not None and labels is not None:
            _check_same_kind(self.label_parts[0], labels)
            parts = (*self.label_parts, labels)
            # As a binary counter carries, so that an item is copied a few times, however singly items come.
            while len(parts) > 1 and len(parts[-2]) <= 2 * len(parts[-1]):
                parts = (*parts[:-2], np.concatenate(parts[-2:]))
        centroids = self.centroids
        if centroids is not None:
            # By centroids, no more leaves come than a fit would ask for.
            n_items = self.table.n_items + len(codes)
            most = wanted_leaves(n_items) if self.listing == "centroids" else None
            centroids = centroids.add(embedding, level_scores, codes, most)
            if self.listing == "centroids" and len(codes):
                codes, _ = centroids.list_items(embedding, level_scores, codes.shape[1])
        table = self.table.add(embedding, codes)
        self.cell_scores.add(codes, level_scores)
        return replace(self, table=table, centroids=centroids, label_parts=parts)

    def remove(self, positions: np.ndarray) -> FittedItems:
        """Take items out; their positions stay vacant."""
        return replace(self, table=self.table.remove(positions))

    def compact(self) -> FittedItems:
        """Renumber the items that are left 0, 1, 2, ... in the order of their positions."""
        left = self.table.live_positions()
        labels = self.labels
        parts = None if labels is None else (labels[left],)
        return replace(self, table=self.table.compact(), label_parts=parts)


class IndexState:
    """What the threads that use an index share besides its items: a lock for changes, and counts.

    It is neither pickled nor copied with its values: a copy has locks of its own and counts from zero.
    """

    def __init__(self) -> None:
        self.changing = threading.Lock()
        self._counting = threading.Lock()
        self._total = SearchStats()

    def count(self, stats: SearchStats) -> None:
        """Add the counts of one search."""
        with self._counting:
            self._total = self._total + stats

    def total(self) -> SearchStats:
        """Return the counts so far."""
        return self._total

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def _rank_near(
    rank: Callable[..., tuple[np.ndarray, np.ndarray]],
    embedding: np.ndarray,
    level_scores: np.ndarray,
    sizes: np.ndarray,
    widths: tuple[int, int, int],
    enough: int,
    epsilon: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the leaves that queries open, and those that they open if these hold too little.

    Parameters
    ----------
    rank : callable
        Names the nearest leaves of queries, and their distances; see `LeafCentroids.rank`.
    embedding, level_scores : ndarray
        The queries.
    sizes : ndarray of shape (n_leaves,), dtype int64
        Items of each leaf.
    widths : tuple of int
        Leaves to open at least, to rank at first, and to rank at most.
    enough : int
        Entries that the leaves named should hold, an item counting in each of them.
    epsilon : float
        A leaf at most `1 + epsilon` times as far as the nearest one is opened.

    Returns
    -------
    rows : ndarray of shape (n_queries, n_ranked), dtype int64
        Leaves, nearest first, filled up with -1.
    n_certain : ndarray of shape (n_queries,), dtype int64
        How many of them to open in any case.
    """
    n_opened, width, most = widths
    n_certain, n_used = (np.empty(len(embedding), dtype=np.int64) for _ in range(2))
    todo, done = np.arange(len(embedding)), []
    while True:
        rows, distances = rank(embedding[todo], level_scores[todo], width)
        n_near = (distances <= (1 + epsilon) * distances[:, :1]).sum(1)
        n_short = (np.cumsum(sizes[rows], axis=1) < enough).sum(1)
        n_certain[todo] = np.maximum(n_near, n_opened)
        n_used[todo] = np.minimum(np.maximum(n_certain[todo], n_short + 1), width)
        further = (n_near == width) | (n_short == width) if width < most else np.zeros(len(todo), dtype=bool)
        done.append((todo[~further], rows[~further]))
        todo = todo[further]
        if len(todo) == 0:
            break
        width = min(4 * width, most)
    named = np.full((len(embedding), n_used.max()), -1, dtype=np.int64)
    for queries, rows in done:
        n_columns = min(rows.shape[1], named.shape[1])
        named[queries, :n_columns] = rows[:, :n_columns]
    named[np.arange(named.shape[1]) >= n_used[:, None]] = -1
    return named, n_certain


def _check_same_kind(first: np.ndarray, second: np.ndarray) -> None:
    """Refuse to mix strings and numbers, which numpy would turn into strings without a word."""
    text = [labels.dtype.kind in "USO" for labels in (first, second)]
    if text[0] != text[1]:
        raise ValueError(
            f"Expected labels of the same kind as the fitted ones, {first.dtype}, got {second.dtype}."
        )
