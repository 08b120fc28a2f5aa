"""HierarchicalHashIndex: nearest neighbours through learned hash codes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin, _fit_context, clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import _safe_indexing
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import (
    _num_samples,
    check_is_fitted,
    validate_data,
)

from hqsearch.description import check_described
from hqsearch.encoder import HierarchicalHashEncoder
from hqsearch.gallery import Gallery
from hqsearch.items import LISTINGS, PROBINGS, FittedItems, IndexState
from hqsearch.metrics import precision_at_k
from hqsearch.neighbors import NeighborsMixin
from hqsearch.persistence import SaveMixin, load_estimator
from hqsearch.search import LeafTable
from hqsearch.updates import UpdatesMixin, check_labels

# Items are described, and turned into queries, this many at a time: level scores are kept only that long.
ITEM_BLOCK = 16384


class HierarchicalHashIndex(
    NeighborsMixin, UpdatesMixin, SaveMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator
):
    """Nearest neighbours search over hierarchical hash codes.

    `fit` lists every item in leaves of a tree: those of its code, as they are or adapted to the items. A
    query opens the leaves nearest to it, as many as a code has or `n_probes`, those hardly farther where
    `epsilon` says so, then further ones until it has `n_neighbors` candidates, and ranks the candidates by
    the Euclidean distance of the encoder's embedding.

    Parameters
    ----------
    encoder : estimator or None, default=None
        None is `HierarchicalHashEncoder()`. An encoder is cloned and fitted; wrapped in
        `sklearn.frozen.FrozenEstimator` a fitted one is not trained again, and `fit` needs no y. Any
        estimator serves that has `fit`, `embed`, `encode`, `level_scores` and the attributes `n_levels`,
        `branching_factor` and `sparsity`. Where it also has `describe(X)`, which returns embedding, level
        scores and codes together, that is called instead of the three; where a frozen one has
        `gallery_of(X)`, that is asked in `fit` what suits the items, and returns a `Gallery` or None
        (`gallery_`).
    sparsity : int or None, default=None
        None keeps the encoder's; a number overrides it.
    n_neighbors : int, default=5
        Neighbours of a query, unless a call says otherwise.
    n_probes : int or None, default=None
        Leaves to open for each query. None opens as many as a code has. Either way more are opened where
        `epsilon` says so, and while fewer than `n_neighbors` candidates are there.
    epsilon : float or "auto", default="auto"
        Beside the nearest leaf a query also opens those, of the 64 nearest, that are at most `1 + epsilon`
        times as far: one that lies between leaves opens several, one amid the items of a leaf only that. It
        takes `probing="centroids"`, and does nothing where there are no centroids (see Notes). "auto" is 0
        where a number of probes is given. Else, where items are listed by centroids, it is what the encoder
        has found to make a search as precise as exhaustive search (`HierarchicalHashEncoder.epsilon_`, often
        0); or if that is more, what `gallery_` says, up to 0.2 where the items look like other classes than
        those that the encoder was trained on. `epsilon_` is what it came to.
    mode : {"distance", "connectivity"}, default="distance"
        Entries of the graph that `transform` returns: distances, or ones.
    probing : {"centroids", "best_first", "lexicographic"}, default="centroids"
        Which leaves a query opens, and in what order. "centroids": those nearest to its embedding and level
        scores, by the leaves' codes and the means of the items that they hold (see Notes); empty leaves are
        never visited. With the others its own code comes first, even where it is empty, and further leaves
        follow by the sum of their level scores ("best_first"), or in the papers' order, every leaf under the
        best parent before the second parent ("lexicographic").
    listing : {"auto", "codes", "centroids"}, default="auto"
        Which leaves items are listed in: those of their codes, or those whose centroids are nearest (see
        Notes). "auto" lists by centroids with `probing="centroids"` and by codes with the others.
    storage : {"float32", "float16", "int8"}, default="float32"
        How embedding vectors are kept.
    radius : float, default=1.0
        Radius of `radius_neighbors`, unless a call says otherwise.
    n_jobs : int or None, default=None
        Threads of a search, and of listing items by centroids in `fit`, as in joblib.
    random_state : int, RandomState instance or None, default=None
        None keeps the encoder's; anything else overrides it.

    Attributes
    ----------
    encoder_ : estimator
        The fitted encoder.
    gallery_ : Gallery or None
        What a frozen encoder has said of the items in `fit`, where they are of other classes than its
        training; `embed` then differs from that of `encoder_`. Items that are added later are not asked.
        With a number as the encoder's `hidden_weight`, set before or after its own `fit`, it is None, so that
        distances of several indexes, such as the shards of one, can be compared.
    epsilon_ : float
        What `epsilon` comes to in searches whose call does not say otherwise.
    labels_ : ndarray of shape (n_positions_,) or None
        Labels of the items by position; None where `fit` or an `add` got none.
    n_samples_fit_ : int
        Number of items that a search can return.
    n_positions_ : int
        Positions ever given, the removed ones among them; `n_samples_fit_` until something is removed.
    n_features_in_ : int
        `X.shape[1]` as seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features, where X has them.

    See Also
    --------
    HierarchicalHashEncoder : The encoder that the index uses by default.
    sklearn.neighbors.KNeighborsTransformer : Exact neighbours with the same interface.

    Notes
    -----
    With `probing="centroids"` a query is compared with every leaf that holds items, as an inverted file
    compares it with every list: by the sum of three squared distances, of its level scores to the leaf's code
    and to the mean scores of the leaf's items, and of its embedding to their mean embedding. Two networks
    then choose the leaves where a code is the choice of one: precision at equal speed-up rises, most for
    items of classes that the encoder was not trained on (doc/experiments.md). It costs as many
    multiplications for each leaf as level scores and embedding have numbers, for a thousand leaves some
    microseconds a query; "best_first" costs less and reads the level scores alone. Centroids stay where they
    are when items are added or removed, but for leaves that the fit did not have. There are none, and items
    are listed and probed by codes, for a tree of more than 1024 buckets in all its levels, more than 16,384
    leaves, or level scores that are not finite. After the 64 nearest leaves, further ones follow by the sum
    of level scores.

    Listed by centroids, items start in the leaves of their codes; leaves of less than a quarter of the mean
    size and less than 12 items are dissolved, large ones are parted, up to about `2 * sqrt(n_samples)` leaves
    of not less than 48 items on average; then items and centroids move in turns, as in k-means, with large
    leaves a little farther away while they move. So the speed-up does not end at the number of classes, and
    items of classes that a frozen encoder has not seen, whose codes scatter, come together. It is done in
    `fit` alone, where it ranks all leaves for every item up to seven times, and holds two bytes for each
    bucket of each item: fit anew what has grown several times over. Listed by codes there are about as many
    leaves as classes, and `table_` and the other probings can be used.

    Reads never change the fitted index, so many threads may search at once. `add`, `remove` and `compact` put
    a new snapshot in the place of the old one: a search that runs meanwhile sees either, never half a change.

    References
    ----------
    Y. Jeong, Y. Kim and H. O. Song, "End-to-End Efficient Representation Learning via Cascading Combinatorial
    Optimization", CVPR 2019.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
    >>> X, y = load_digits(return_X_y=True)
    >>> encoder = HierarchicalHashEncoder(metric_epochs=5, hash_epochs=5, random_state=0)
    >>> index = HierarchicalHashIndex(encoder, n_neighbors=3).fit(X[:1000], y[:1000])
    >>> distances, positions = index.kneighbors(X[1000:1005])
    >>> positions.shape
    (5, 3)
    """

    _parameter_constraints: dict = {  # noqa: RUF012  scikit-learn's own form
        "encoder": [None, HasMethods(["fit", "embed", "encode", "level_scores"])],
        "sparsity": [None, Interval(Integral, 1, None, closed="left")],
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "n_probes": [None, Interval(Integral, 1, None, closed="left")],
        "epsilon": [StrOptions({"auto"}), Interval(Real, 0, None, closed="left")],
        "mode": [StrOptions({"distance", "connectivity"})],
        "probing": [StrOptions(set(PROBINGS))],
        "listing": [StrOptions({"auto", *LISTINGS})],
        "storage": [StrOptions({"float32", "float16", "int8"})],
        "radius": [Interval(Real, 0, None, closed="left")],
        "n_jobs": [None, Integral],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        encoder: Any = None,
        *,
        sparsity: int | None = None,
        n_neighbors: int = 5,
        n_probes: int | None = None,
        epsilon: float | str = "auto",
        mode: str = "distance",
        probing: str = "centroids",
        listing: str = "auto",
        storage: str = "float32",
        radius: float = 1.0,
        n_jobs: int | None = None,
        random_state: Any = None,
    ):
        self.encoder = encoder
        self.sparsity = sparsity
        self.n_neighbors = n_neighbors
        self.n_probes = n_probes
        self.epsilon = epsilon
        self.mode = mode
        self.probing = probing
        self.listing = listing
        self.storage = storage
        self.radius = radius
        self.n_jobs = n_jobs
        self.random_state = random_state

    # The encoder is an estimator with parameters of its own.
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any = None) -> HierarchicalHashIndex:
        """Fit the encoder, unless it is frozen, and list the items in their leaves.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, channels, height, width)
            Items to be searched; whatever the encoder takes.
        y : array-like of shape (n_samples,), default=None
            Labels. A frozen encoder does without.

        Returns
        -------
        HierarchicalHashIndex
            This index.

        Raises
        ------
        ValueError
            If the encoder refuses X or y, their lengths differ, or `epsilon` does not go with `probing`.
        """
        if self.probing != "centroids" and self.epsilon not in ("auto", 0):
            raise ValueError(f"Expected epsilon=0 with probing={self.probing!r}, got {self.epsilon!r}.")
        validate_data(self, X, skip_check_array=True)
        labels = check_labels(X, y)
        self.encoder_ = self._check_protocol(self._fit_encoder(X, y))
        self.gallery_ = self._ask_gallery(X)
        self._items = FittedItems.from_blocks(
            self._describe_blocks(X),
            branching_factor=self.encoder_.branching_factor,
            n_levels=self.encoder_.n_levels,
            storage=self.storage,
            labels=labels,
            listing=self._resolve_listing(),
            embedding_weight=1.0 if self.gallery_ is None else self.gallery_.embedding_weight,
            n_jobs=self.n_jobs,
        )
        self._state = IndexState()
        return self

    def _resolve_listing(self) -> str:
        """Say which leaves items are listed in: those where queries will look for them."""
        if self.listing != "auto":
            return self.listing
        return "centroids" if self.probing == "centroids" else "codes"

    def _fit_encoder(self, X: Any, y: Any) -> Any:
        encoder = HierarchicalHashEncoder() if self.encoder is None else self.encoder
        overrides = {
            name: value
            for name, value in (("sparsity", self.sparsity), ("random_state", self.random_state))
            if value is not None
        }
        if isinstance(encoder, FrozenEstimator):
            check_is_fitted(encoder)
            overrides.pop("random_state", None)
            # The user's encoder stays as it is; codes of another sparsity come from the same level scores.
            return copy.copy(encoder.estimator).set_params(**overrides)
        return clone(encoder).set_params(**overrides).fit(X, y)

    def _ask_gallery(self, X: Any) -> Gallery | None:
        """Ask a frozen encoder about the items; one that was fitted to them knows their classes."""
        # Of the class: a wrapper that passes on what it lacks would have its inner encoder asked.
        asks = isinstance(self.encoder, FrozenEstimator) and hasattr(type(self.encoder_), "gallery_of")
        return self.encoder_.gallery_of(X) if asks else None

    @staticmethod
    def _check_protocol(encoder: Any) -> Any:
        missing = [n for n in ("n_levels", "branching_factor", "sparsity") if not hasattr(encoder, n)]
        if missing:
            raise ValueError(
                f"Expected encoder to have the attributes n_levels, branching_factor and sparsity, but "
                f"{type(encoder).__name__} lacks {', '.join(missing)}."
            )
        return encoder

    def _describe(self, X: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embedding, level scores and codes of X, from the fitted encoder."""
        encoder, gallery = self.encoder_, getattr(self, "gallery_", None)
        if gallery is not None:
            described = encoder.describe(X, gallery)
        elif hasattr(encoder, "describe"):
            described = encoder.describe(X)
        else:
            described = encoder.embed(X), encoder.level_scores(X), encoder.encode(X)
        return check_described(described, encoder, _num_samples(X))

    def _describe_blocks(self, X: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Embedding, level scores and codes of X, a block of items at a time."""
        n_items = _num_samples(X)
        if n_items <= ITEM_BLOCK:
            yield self._describe(X)
            return
        for start in range(0, n_items, ITEM_BLOCK):
            yield self._describe(_safe_indexing(X, slice(start, start + ITEM_BLOCK)))

    def embed(self, X: Any) -> np.ndarray:
        """Embedding by which this index ranks candidates.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items or queries.

        Returns
        -------
        ndarray of shape (n_samples, embedding_dim), dtype float32
            That of `encoder_`, or where `gallery_` is not None the one that suits the items of this index.
            Distances of indexes with different galleries cannot be compared.
        """
        check_is_fitted(self)
        gallery = getattr(self, "gallery_", None)
        return self.encoder_.embed(X) if gallery is None else self.encoder_.embed(X, gallery)

    def transform(self, X: Any) -> sp.csr_matrix:
        """Neighbours graph of X, as `sklearn.neighbors.KNeighborsTransformer` gives it.

        Parameters
        ----------
        X : array-like of shape (n_queries, ...)
            Queries.

        Returns
        -------
        csr_matrix of shape (n_queries, n_positions_), dtype float64
            With `mode="distance"`, `n_neighbors + 1` entries per row, because a fitted item is its own
            nearest neighbour; with `mode="connectivity"`, `n_neighbors`. With `probing="centroids"` a fitted
            item that is not listed in the leaf that is nearest doesn't find itself: hardly any where items
            are listed by centroids, about one in twenty where they are listed by codes.
        """
        check_is_fitted(self)
        return self.kneighbors_graph(X, self.n_neighbors + (self.mode == "distance"), self.mode)

    def score(self, X: Any, y: Any) -> float:
        """Mean precision@n_neighbors of the queries X against the fitted items.

        Parameters
        ----------
        X : array-like of shape (n_queries, ...)
            Queries.
        y : array-like of shape (n_queries,)
            Their labels.

        Returns
        -------
        float
            Share of neighbours that have the query's label.

        Raises
        ------
        ValueError
            If the index was fitted without labels.
        """
        check_is_fitted(self)
        items = self._items
        labels = items.labels
        if labels is None:
            raise ValueError("Expected an index that was fitted with y, but labels_ is None.")
        return precision_at_k(y, labels[self._search(items, X, None, self._search_options())[1]])

    @property
    def table_(self) -> LeafTable:
        """The items as they are now: an immutable table that later changes of the index do not touch.

        The cheapest path for one query at a time, for callers that have embedding, level scores and codes
        already (`encoder_.describe`): `index.table_.search(embedding, level_scores, codes, n_neighbors)`. It
        opens the leaves of the codes, so fit with `probing="best_first"`, which lists by codes.
        """
        check_is_fitted(self)
        return self._items.table

    @property
    def epsilon_(self) -> float:
        """What `epsilon` comes to in searches whose call does not say otherwise."""
        check_is_fitted(self)
        return self._resolve_epsilon(self.epsilon, self.n_probes)

    def _epsilon_of_encoder(self) -> float:
        """Ask the encoder; of other estimators nothing is known."""
        encoder = self.encoder_
        return encoder._epsilon() if isinstance(encoder, HierarchicalHashEncoder) else 0.0

    @property
    def labels_(self) -> np.ndarray | None:
        """Labels of the items by position."""
        check_is_fitted(self)
        return self._items.labels

    @property
    def n_samples_fit_(self) -> int:
        """Number of items that a search can return."""
        check_is_fitted(self)
        return self._items.table.n_live_items

    @property
    def n_positions_(self) -> int:
        """Positions ever given."""
        check_is_fitted(self)
        return self._items.table.n_items

    @property
    def _n_features_out(self) -> int:
        return self.n_positions_

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        mmap_mode: str | None = None,
        *,
        verify: bool = False,
        encoder: Any = None,
        network: Any = None,
        trusted: bool = False,
    ) -> HierarchicalHashIndex:
        """Load an index that `save` wrote; it gives the same bits as the one that was saved.

        Parameters
        ----------
        path : path-like
            The folder.
        mmap_mode : {None, "r"}, default=None
            None reads all files into memory and verifies all their checksums. "r" maps larger arrays, which
            processes share and which are read when they are used. Of these, vectors and level scores are then
            verified by size, dtype and shape; all other files by their checksums too.
        verify : bool, default=False
            Whether to verify the checksums of vectors and level scores with `mmap_mode="r"` too, which reads
            them once.
        encoder : type or fitted estimator, default=None
            Class of the encoder, or the encoder itself, where it is not one of this package. Over a baseline,
            what is no baseline is taken as the encoder that the baseline holds.
        network : torch.nn.Module, type or callable, default=None
            As in `HierarchicalHashEncoder.load`.
        trusted : bool, default=False
            Whether to import classes from the paths that the folder names, where they are not given.
            Importing runs code, so trust only your own folders.

        Returns
        -------
        HierarchicalHashIndex
            The fitted index; its counts of searches begin at zero.

        Raises
        ------
        ValueError
            If a file is missing, truncated, damaged or foreign, the format is newer than this package, or a
            class that is not of this package is neither given nor trusted. The message names the file.

        Notes
        -----
        Positions are as they were, vacant ones too. The counts of `search_stats_` are not saved. With
        `storage="int8"`, items that were added lately are rounded for good, as every search rounds them.

        Examples
        --------
        >>> import tempfile
        >>> from sklearn.datasets import load_digits
        >>> from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
        >>> X, y = load_digits(return_X_y=True)
        >>> encoder = HierarchicalHashEncoder(metric_epochs=1, hash_epochs=1, random_state=0)
        >>> index = HierarchicalHashIndex(encoder).fit(X[:200], y[:200])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index.save(f"{folder}/digits")
        ...     loaded = HierarchicalHashIndex.load(f"{folder}/digits", mmap_mode="r")
        >>> bool((loaded.kneighbors(X[200:])[1] == index.kneighbors(X[200:])[1]).all())
        True
        """
        index = load_estimator(
            cls, path, mmap_mode=mmap_mode, verify=verify, encoder=encoder, network=network, trusted=trusted
        )
        index._state = IndexState()
        return index

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_items")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = not isinstance(self.encoder, FrozenEstimator)
        return tags
