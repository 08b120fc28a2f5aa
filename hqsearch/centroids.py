"""Centroids of the leaves that hold items: the leaves nearest to a query, by all that is known of both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from hqsearch.search import LeafTable, level_directions

# Weight of a leaf's size where items are listed by their codes: as the logarithm of its share in a mixture.
PRIOR = 0.2
# Weights of the level scores' distances, to the leaf's code and to its items' mean; their sum is always 2.
CODE_WEIGHT, REFINED_CODE_WEIGHT = 1.0, 0.5
# Ranking more of them for each query takes longer than it saves.
MOST_LEAVES = 16384
# What a table takes.
LARGEST_TREE = 2**62
_BLOCK = 16384


class LeafCentroids:
    """Where the items of each leaf lie, and how near a query is to each leaf.

    Two networks describe an item: by an embedding, and by level scores. A query's own code says what the
    second one makes of it; how near its scores and its embedding are to those of the items in a leaf says
    more, above all where the items are of classes that nobody trained on. The distance of a query to a leaf
    is the sum of three squared ones: of its level scores to the leaf's code, of its level scores to the mean
    ones of the leaf's items, and of its embedding to their mean embedding. Level scores are centred at each
    level and of unit length altogether, and embeddings are scaled by one factor to a mean squared distance of
    1 from their mean, so that no unit of either counts; or to a larger one, among classes that the level
    scores know little of (`embedding_weight` of `CentroidSums`).

    Where items are listed by their codes, small leaves are farther than large ones, by `PRIOR` times the
    logarithm of the largest leaf's size over theirs: a leaf of two items whose codes went wrong lies between
    classes, and would draw all queries that do.

    Where items are listed by the nearest centroids there is no such weight, the distance to the code counts
    half, and the one to the mean level scores one and a half times.

    A leaf may be parted: its parts are leaves one level or more below it, and have its code.

    The centroids of the items of a fit stay where they are, as those of an inverted file do. Leaves that come
    later grow with the items that are added to them.

    Notes
    -----
    Memory in bytes: `4 * (n_levels * branching_factor + embedding_dim + 1) + 12` for each leaf, three times
    as many for a later one. Ranking takes as many multiplications for each query and leaf as a centroid has
    numbers.
    """

    _fitted_ids: np.ndarray
    _vectors: LeafTable
    # Leaves that came later, ascending; their items' number, and sums of both descriptions.
    _later: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    _scale: float
    _n_levels: int
    _branching_factor: int
    _prior: float
    _largest: int
    _code_weight: float
    # Levels below those of the codes, where the parts of a leaf are; `leaf_ids` are leaves of them all.
    _n_part_levels: int

    @cached_property
    def leaf_ids(self) -> np.ndarray:
        """The leaves, int64 of shape (n_leaves,): those of the fit, then later ones."""
        return np.append(self._fitted_ids, self._later[0])

    @cached_property
    def _table(self) -> LeafTable:
        """All centroids, in the order of `leaf_ids`."""
        if not len(self._later[0]):
            return self._vectors
        vectors = self._place(*self._later)
        return self._vectors.add(vectors, np.zeros((len(vectors), 1), dtype=np.int64))

    def _place(
        self, leaf_ids: np.ndarray, counts: np.ndarray, embeddings: np.ndarray, directions: np.ndarray
    ) -> np.ndarray:
        """Turn sums of leaves into vectors whose distances to queries' vectors are those of the leaves."""
        directions = directions / counts[:, None]
        ideal = self._code_directions(leaf_ids // self._most_parts)
        # With weights v and w of sum 2, v |u - b|^2 + w |u - c|^2 = 2 |u - (v b + w c) / 2|^2 + v w / 2 *
        # |b - c|^2: a coordinate for the last term.
        for_code, for_mean = self._code_weight, 2 - self._code_weight
        middle = (for_code * ideal + for_mean * directions) / math.sqrt(2)
        apart = for_code * for_mean / 2 * np.square(ideal - directions).sum(1)
        apart += self._prior * np.log(np.maximum(self._largest / counts, 1))
        vectors = np.hstack([middle, embeddings / counts[:, None] * self._scale, np.sqrt(apart)[:, None]])
        return vectors.astype(np.float32)

    def levels_for(self, n_parts: int) -> int:
        """Levels below those of the codes that it takes to part a leaf, or as many as a tree can have."""
        d, n_levels = self._branching_factor, 0
        while d**n_levels < n_parts and 1 < d ** (self._n_levels + n_levels + 1) <= LARGEST_TREE:
            n_levels += 1
        return n_levels

    def part(
        self, n_part_levels: int, n_parts: np.ndarray, embedding: np.ndarray, directions: np.ndarray
    ) -> LeafCentroids:
        """Part leaves: put leaves of some levels further down in their place, which have the same codes.

        Parameters
        ----------
        n_part_levels : int
            Levels below those of the codes, see `levels_for`.
        n_parts : ndarray of shape (n_leaves,), dtype int64
            Parts of each leaf; one that gets 1 stays where it is.
        embedding, directions : ndarray
            Where the parts are, those of a leaf side by side: an item for each part.

        Returns
        -------
        LeafCentroids
            The leaves that stay, then the parts.
        """
        other = LeafCentroids.__new__(LeafCentroids)
        vars(other).update(self.__getstate__(), _n_part_levels=n_part_levels)
        whole, large = np.flatnonzero(n_parts == 1), np.flatnonzero(n_parts > 1)
        first = self.leaf_ids.astype(np.int64) * self._branching_factor**n_part_levels
        ids = np.concatenate([first[:0], *(first[row] + np.arange(n_parts[row]) for row in large)])
        sums = (part.astype(np.float64) for part in (embedding, directions))
        vectors = [self._vectors.stored_vectors()[1][whole], other._place(ids, np.ones(len(ids)), *sums)]
        return other._with(np.append(first[whole], ids), np.concatenate(vectors))

    @property
    def n_levels(self) -> int:
        """Levels of the codes."""
        return self._n_levels

    @property
    def branching_factor(self) -> int:
        """Buckets of each level."""
        return self._branching_factor

    @property
    def n_part_levels(self) -> int:
        """Levels below those of the codes, where leaves are parted; 0 where none is."""
        return self._n_part_levels

    @property
    def _most_parts(self) -> int:
        return self._branching_factor**self._n_part_levels

    def _code_directions(self, codes: np.ndarray) -> np.ndarray:
        """Level scores of an item that is of its code beyond doubt, (n_codes, n_levels * d)."""
        d = self._branching_factor
        scores = np.zeros((len(codes), self._n_levels, d))
        for level in range(self._n_levels):
            digits = codes // d ** (self._n_levels - 1 - level) % d
            scores[np.arange(len(codes)), level, digits] = 1
        return level_directions(scores)

    def add(
        self,
        embedding: np.ndarray,
        level_scores: np.ndarray,
        codes: np.ndarray,
        most_leaves: int | None = None,
    ) -> LeafCentroids:
        """Add items to the leaves that the fit did not have.

        Parameters
        ----------
        embedding, level_scores, codes : ndarray
            As in `CentroidSums.add`.
        most_leaves : int or None, default=None
            How many leaves there may be at most for further ones to come, those of the most items first.

        Returns
        -------
        LeafCentroids
            With their leaves. This one stays as it is.
        """
        later = ~np.isin(codes, self._fitted_ids // self._most_parts)
        if most_leaves is not None:
            known = self.leaf_ids // self._most_parts
            unknown, counts = np.unique(codes[~np.isin(codes, known)], return_counts=True)
            n_new = max(0, most_leaves - len(self.leaf_ids))
            left_out = unknown[np.argsort(-counts, kind="stable")[n_new:]]
            later &= ~np.isin(codes, left_out)
        if not later.any():
            return self
        rows, columns = np.nonzero(later)
        sums = _leaf_sums(
            embedding[rows],
            level_directions(level_scores[rows]),
            codes[rows, columns][:, None].astype(np.int64) * self._most_parts,
        )
        more = type(self).__new__(type(self))
        vars(more).update(self.__getstate__(), _later=_added(self._later, sums))
        return more

    def nearest(
        self,
        embedding: np.ndarray,
        level_scores: np.ndarray,
        n_leaves: int,
        *,
        allowed: np.ndarray | None = None,
        n_jobs: int | None = None,
    ) -> np.ndarray:
        """Leaves nearest to each query.

        Parameters
        ----------
        embedding, level_scores : ndarray
            Of the queries, as in `CentroidSums.add`.
        n_leaves : int
            How many, at most as many as there are and are allowed.
        allowed : ndarray of shape (n_leaves_there,), dtype bool, default=None
            Which leaves may be named.
        n_jobs : int or None, default=None
            Threads, as in joblib.

        Returns
        -------
        ndarray of shape (n_queries, n_leaves), dtype int64
            Rows of `leaf_ids`, nearest first; of equally near ones the earlier row first.

        Raises
        ------
        ValueError
            If a number is NaN or infinite.
        """
        return self.rank(embedding, level_scores, n_leaves, allowed=allowed, n_jobs=n_jobs)[0]

    def rank(
        self,
        embedding: np.ndarray,
        level_scores: np.ndarray,
        n_leaves: int,
        *,
        allowed: np.ndarray | None = None,
        n_jobs: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Leaves nearest to each query, as `nearest` names them, and their distances, not squared."""
        vectors = level_directions(level_scores, embedding, length=math.sqrt(2), scale=self._scale, n_more=1)
        no_scores = np.zeros((len(vectors), 1, 1), dtype=np.float32)
        root = np.zeros((len(vectors), 1), dtype=np.int64)
        found = self._table.search(vectors, no_scores, root, n_leaves, allowed=allowed, n_jobs=n_jobs)
        return found.positions, found.distances

    def of_items(self, embedding: np.ndarray, directions: np.ndarray, codes: np.ndarray) -> LeafCentroids:
        """Centroids of items that are listed by centroids in some of these leaves, in the same units.

        Parameters
        ----------
        embedding : ndarray of shape (n_items, embedding_dim), dtype float32
            The items.
        directions : ndarray of shape (n_items, n_levels * branching_factor)
            Their level scores, centred and of unit length.
        codes : ndarray of shape (n_items, sparsity), dtype int64
            Their leaves.

        Returns
        -------
        LeafCentroids
            Of the leaves that hold items.
        """
        sums: tuple[np.ndarray, ...] | None = None
        for block in _blocks(len(codes)):
            part = _leaf_sums(embedding[block], directions[block], codes[block])
            sums = part if sums is None else _added(sums, part)
        assert sums is not None
        other = LeafCentroids.__new__(LeafCentroids)
        vars(other).update(self.__getstate__(), _prior=0.0, _code_weight=REFINED_CODE_WEIGHT)
        return other._with(sums[0], other._place(*sums))

    def crowded(self, codes: np.ndarray, squared: np.ndarray, share: float) -> LeafCentroids:
        """Put leaves of more items than the mean farther away.

        A leaf of e times the mean size gains `share` times the mean of its items' squared distances to it, or
        of all items' to theirs where that is less; the gain grows as the size's logarithm. Where items are
        closer together than others theirs alone counts: a gain that is large beside it would take all of them
        away from the leaf.

        Parameters
        ----------
        codes : ndarray of shape (n_items, sparsity), dtype int64
            Leaves of each item, nearest first, of those of the fit.
        squared : ndarray of shape (n_items,), dtype float64
            How far the first is, see `squared_distances`.
        share : float
            Of these distances. Where one is infinite, beyond float32, no leaf moves.

        Returns
        -------
        LeafCentroids
            The same leaves, without any that came later.
        """
        vectors = self._vectors.stored_vectors()[1]
        rows = self.rows_of(codes)
        sizes = np.bincount(rows.ravel(), minlength=len(vectors))
        counts = np.bincount(rows[:, 0], minlength=len(vectors))
        sums = np.bincount(rows[:, 0], weights=squared, minlength=len(vectors))
        spread = np.minimum(sums / np.maximum(counts, 1), squared.mean())
        if np.isfinite(spread).all():
            farther = share * spread * np.log(np.maximum(sizes / sizes.mean(), 1))
            vectors[:, -1] = np.sqrt(np.square(vectors[:, -1], dtype=np.float64) + farther)
        return self._with(self._fitted_ids, vectors)

    def list_items(
        self, embedding: np.ndarray, level_scores: np.ndarray, sparsity: int, n_jobs: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """List items in the nearest leaves.

        Parameters
        ----------
        embedding, level_scores : ndarray
            Of the items, as in `CentroidSums.add`.
        sparsity : int
            Leaves of an item.
        n_jobs : int or None, default=None
            Threads, as in joblib.

        Returns
        -------
        codes : ndarray of shape (n_items, sparsity), dtype int64
            The leaves of each item, nearest first.
        distances : ndarray of shape (n_items, sparsity), dtype float32
            How far these are, not squared.
        """
        listed = np.empty((len(embedding), sparsity), dtype=np.int64)
        distances = np.empty(listed.shape, dtype=np.float32)
        for block in _blocks(len(embedding)):
            found = self.rank(embedding[block], level_scores[block], sparsity, n_jobs=n_jobs)
            listed[block], distances[block] = self.leaf_ids[found[0]], found[1]
        return listed, distances

    def squared_distances(self, codes: np.ndarray, distances: np.ndarray) -> np.ndarray:
        """Square distances of items to leaves, less a leaf's part that is the same for every item.

        Parameters
        ----------
        codes : ndarray of shape (n_items,), dtype int64
            The leaf of each item, of those of the fit.
        distances : ndarray of shape (n_items,), dtype float32
            How far it is.

        Returns
        -------
        ndarray of shape (n_items,), dtype float64
        """
        own = np.square(self._vectors.stored_vectors()[1][:, -1], dtype=np.float64)
        return np.maximum(np.square(distances, dtype=np.float64) - own[self.rows_of(codes)], 0)

    def _with(self, leaf_ids: np.ndarray, vectors: np.ndarray) -> LeafCentroids:
        """Other leaves of the same tree, in the same units."""
        other = LeafCentroids.__new__(LeafCentroids)
        root = np.zeros((len(vectors), 1), dtype=np.int64)
        table = LeafTable.build(vectors, root, branching_factor=1, n_levels=1)
        n_scores = self._n_levels * self._branching_factor
        none, sums = np.empty(0, dtype=np.int64), vectors[:0].astype(np.float64)
        later = (none, none, sums[:, n_scores:-1], sums[:, :n_scores])
        vars(other).update(self.__getstate__(), _fitted_ids=leaf_ids, _vectors=table, _later=later)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self._fitted_ids.nbytes + self._table.nbytes + sum(part.nbytes for part in self._later)

    def rows_of(self, leaf_ids: np.ndarray) -> np.ndarray:
        """Row of each leaf id, -1 where it is not there (int64)."""
        places = np.searchsorted(self.leaf_ids, leaf_ids, sorter=self._order)
        rows = self._order[np.minimum(places, len(self._order) - 1)]
        return np.where(self.leaf_ids[rows] == leaf_ids, rows, -1)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.leaf_ids, kind="stable")

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name, None) for name in LeafCentroids.__annotations__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Written before leaves were parted.
        vars(self).update({"_code_weight": CODE_WEIGHT, "_n_part_levels": 0} | state)


class CentroidSums:
    """Makes `LeafCentroids` of items that come block by block; only sums of leaves are held.

    Parameters
    ----------
    branching_factor, n_levels : int
        Shape of the tree.
    embedding_weight : float, default=1.0
        Mean squared distance of embeddings from their mean, after scaling.
    keep : bool, default=False
        Whether to hold what `directions` returns, two bytes for each bucket and item.
    """

    def __init__(
        self, *, branching_factor: int, n_levels: int, embedding_weight: float = 1.0, keep: bool = False
    ):
        # Powers of numpy's integers wrap.
        self.branching_factor, self.n_levels = int(branching_factor), int(n_levels)
        self._embedding_weight = embedding_weight
        self._kept: list[np.ndarray] | None = [] if keep else None
        self._sums: tuple[np.ndarray, ...] | None = None
        self._finite = True
        self._n_items = 0
        self._total: Any = 0.0
        self._squares = 0.0

    def add(self, embedding: np.ndarray, level_scores: np.ndarray, codes: np.ndarray) -> None:
        """Add items.

        Parameters
        ----------
        embedding : ndarray of shape (n_items, embedding_dim), dtype float32
            Their embedding.
        level_scores : ndarray of shape (n_items, n_levels, branching_factor), dtype float32
            Their level scores.
        codes : ndarray of shape (n_items, sparsity), dtype int64
            Their leaves; an item counts in each of them.
        """
        directions = level_directions(level_scores)
        # Some encoders forbid buckets by -inf.
        self._finite = self._finite and bool(np.isfinite(directions).all())
        if not self._finite or (self._sums is not None and len(self._sums[0]) > MOST_LEAVES):
            return
        if self._kept is not None:
            self._kept.append(directions.astype(np.float16))
        part = _leaf_sums(embedding, directions, codes)
        self._sums = part if self._sums is None else _added(self._sums, part)
        self._n_items += len(embedding)
        self._total = self._total + embedding.sum(0, dtype=np.float64)
        self._squares += float(np.square(embedding, dtype=np.float64).sum())

    @property
    def usable(self) -> bool:
        """Whether there was a block, all level scores were finite, and there are not too many leaves."""
        return self._sums is not None and self._finite and len(self._sums[0]) <= MOST_LEAVES

    def finish(self) -> LeafCentroids:
        """Return the centroids of all items, if they are `usable`."""
        assert self._sums is not None
        n_items = max(1, self._n_items)
        mean = self._total / n_items
        spread = self._squares / n_items - float(mean @ mean)
        centroids = LeafCentroids.__new__(LeafCentroids)
        # Where all embeddings are equal, what is left of the difference is rounding.
        alike = spread <= 1e-12 * self._squares / n_items
        centroids._scale = 1.0 if alike else math.sqrt(self._embedding_weight / spread)
        centroids._n_levels, centroids._branching_factor = self.n_levels, self.branching_factor
        centroids._prior, centroids._largest = PRIOR, int(self._sums[1].max(initial=1))
        centroids._code_weight, centroids._n_part_levels = CODE_WEIGHT, 0
        return centroids._with(self._sums[0], centroids._place(*self._sums))

    def directions(self) -> np.ndarray:
        """Level scores of all items, centred and of unit length: float16, (n_items, n_levels * d)."""
        assert self._kept is not None
        return np.concatenate(self._kept)


def _blocks(n_items: int) -> Iterator[slice]:
    for start in range(0, n_items, _BLOCK):
        yield slice(start, start + _BLOCK)


def _leaf_sums(
    embedding: np.ndarray, directions: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Leaves in ascending order; their items' number, and sums of both descriptions in float64."""
    leaf_ids, leaf_of = np.unique(codes, return_inverse=True)
    n_items, sparsity = codes.shape
    items = np.repeat(np.arange(n_items), sparsity)
    members = sp.csr_matrix((np.ones(codes.size), (leaf_of.ravel(), items)), shape=(len(leaf_ids), n_items))
    counts = np.bincount(leaf_of.ravel(), minlength=len(leaf_ids))
    return leaf_ids, counts, members @ embedding.astype(np.float64), members @ directions.astype(np.float64)


def _added(first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Leaves, counts and sums of both."""
    leaf_ids, rows = np.unique(np.append(first[0], second[0]), return_inverse=True)
    total = [np.zeros((len(leaf_ids), *part.shape[1:]), dtype=part.dtype) for part in first[1:]]
    # Within either part no leaf comes twice.
    for parts, at in ((first, rows[: len(first[0])]), (second, rows[len(first[0]) :])):
        for whole, part in zip(total, parts[1:], strict=True):
            whole[at] += part
    return leaf_ids, *total
