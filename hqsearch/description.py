"""What a fitted encoder says of items: embedding, level scores, codes, whether they are of its classes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import _num_samples, check_is_fitted, validate_data

from hqsearch.calibration import mean_distance_ratio
from hqsearch.codes import greedy_codes, mean_score_gap
from hqsearch.gallery import Gallery

if TYPE_CHECKING:
    from hqsearch.embedding import EmbeddingModel

# Items of a gallery whose level scores are looked at, and whose principal axes count.
_MOST_ASKED, _MOST_LOOKED_AT = 2048, 8192
# Of what items may be made; others become the first.
ITEM_DTYPES = [np.float64, np.float32, np.uint8]


def validate_items(encoder: Any, X: Any) -> np.ndarray:
    """Check that items are such as a fitted encoder knows.

    Parameters
    ----------
    encoder : estimator
        Its `_input_shape` is the shape of one item.
    X : array-like of shape (n_samples, *input_shape)
        Items.

    Returns
    -------
    ndarray of shape (n_samples, *input_shape)
        Of one of `ITEM_DTYPES`.

    Raises
    ------
    NotFittedError
        If the encoder is not fitted.
    ValueError
        If X is malformed, or its items are of another shape.
    """
    check_is_fitted(encoder)
    X = validate_data(encoder, X, reset=False, dtype=ITEM_DTYPES, allow_nd=True)
    if X.shape[1:] != encoder._input_shape:
        raise ValueError(
            f"X has items of shape {X.shape[1:]}, but {type(encoder).__name__} is expecting items of shape "
            f"{encoder._input_shape} as input."
        )
    return X


def check_described(described: Any, encoder: Any, n_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validate what an encoder, which may be anyone's, says of items.

    Parameters
    ----------
    described : tuple of three array-likes
        What its `embed`, `level_scores` and `encode` give.
    encoder : estimator
        For the shape of its codes, and its name.
    n_items : int
        Of how many items.

    Returns
    -------
    embedding, level_scores, codes : ndarray
        The same as arrays.

    Raises
    ------
    ValueError
        If a shape, or the dtype of the codes, is not that of the encoder protocol.
    """
    embedding, level_scores, codes = map(np.asarray, described)
    shape = n_items, encoder.n_levels, encoder.branching_factor
    if (
        embedding.ndim != 2
        or len(embedding) != n_items
        or level_scores.shape != shape
        or codes.ndim != 2
        or len(codes) != n_items
        or codes.dtype.kind not in "iu"
    ):
        raise ValueError(
            f"Expected embed, level_scores and encode of {type(encoder).__name__} to give arrays of shape "
            f"({n_items}, embedding_dim), {shape} and, integers, ({n_items}, sparsity), got "
            f"{embedding.shape}, {level_scores.shape} and, {codes.dtype}, {codes.shape}."
        )
    return embedding, level_scores, codes


class DescriptionMixin:
    """Descriptions of items by the networks of an encoder."""

    loss: str
    branching_factor: int
    n_levels: int
    sparsity: int
    embedding_dim: int
    hidden_weight: float | str
    n_jobs: int | None
    score_gap_: tuple[float, float] | None
    distance_ratio_: tuple[float, float] | None
    class_means_: np.ndarray | None
    epsilon_: float
    _model: EmbeddingModel
    _input_shape: tuple[int, ...]

    def encode(self, X: Any) -> np.ndarray:
        """Leaves of each item.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items.

        Returns
        -------
        ndarray of shape (n_samples, sparsity), dtype int64
            Bucket ids `sum_v digit_v * branching_factor**(n_levels - v)`, best first.
        """
        return greedy_codes(self.level_scores(X), self.sparsity)

    def _describes_by_model(self) -> bool:
        """Whether items are described as in `fit`, not by a subclass's own methods."""
        return all(getattr(type(self), name) is method for name, method in _DESCRIBING.items())

    def _epsilon(self) -> float:
        """`epsilon_`, where it is of these codes."""
        # Encoders of earlier versions have none.
        known = getattr(self, "_calibrated_sparsity", None) == self.sparsity
        return self.epsilon_ if known and self._describes_by_model() else 0.0

    def embed(self, X: Any, gallery: Gallery | None = None) -> np.ndarray:
        """Embedding by which candidates are ranked.

        The metric stage's, or with `shared_trunk=True` what the hash stage has made of it, joined with the
        hidden layer as `hidden_weight` says.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items.
        gallery : Gallery or None, default=None
            What the items that are searched ask for, see `gallery_of`.

        Returns
        -------
        ndarray of shape (n_samples, embedding_dim), dtype float32
            Compared by Euclidean distance; unit rows for triplet and proxy.
        """
        X = validate_items(self, X)
        return self._model.embed(X, None if gallery is None else gallery.axes)

    def level_scores(self, X: Any) -> np.ndarray:
        """Score of each bucket at each level.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items.

        Returns
        -------
        ndarray of shape (n_samples, n_levels, branching_factor), dtype float32
            Higher is better; a leaf's score is the sum of its buckets' scores.
        """
        X = validate_items(self, X)
        return self._model.level_scores(X)

    def describe(self, X: Any, gallery: Gallery | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embedding, level scores and codes in one call: what an index asks of every item.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items.
        gallery : Gallery or None, default=None
            As in `embed`.

        Returns
        -------
        embedding : ndarray of shape (n_samples, embedding_dim), dtype float32
            As `embed`.
        level_scores : ndarray of shape (n_samples, n_levels, branching_factor), dtype float32
            As `level_scores`.
        codes : ndarray of shape (n_samples, sparsity), dtype int64
            As `encode`.
        """
        axes = None if gallery is None else gallery.axes
        embedding, level_scores = self._model.describe(validate_items(self, X), axes)
        return embedding, level_scores, greedy_codes(level_scores, self.sparsity)

    def gallery_of(self, X: Any) -> Gallery | None:
        """Say what suits items to be searched, where they are of other classes than `fit` has seen.

        An index asks this in its `fit`, of the items that it is fitted to, when its encoder is frozen. It
        needs no labels: the best buckets of items of trained classes are as far ahead of the second best as
        those of items that `fit` held out (`score_gap_`), of others less; and the nearest class mean is as
        much nearer than the second nearest (`distance_ratio_`), for others less. From 95 % of that gap down
        to 70 %, or from 110 % of that ratio up to 130 %, whichever says more, and beyond two standard errors,
        the weight of the hidden layer in the embedding rises to 3 (npairs: 1) and that of the embedding
        beside the level scores from 1 to 4, and in the second half of that way the index's `epsilon` from 0
        to 0.2. The principal axes then are those of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items to be searched, of which a few thousand are looked at.

        Returns
        -------
        Gallery or None
            For `embed` and `describe`. None where nothing speaks for another embedding: the items are of
            trained classes; `hidden_weight` is a number, which it may be set to after `fit` too;
            `score_gap_` is None; or X has fewer items than the embedding has numbers. Nor does it say
            anything for a subclass with an `embed`, `level_scores` or `describe` of its own.

        Raises
        ------
        ValueError
            If the items that are looked at do not fit the encoder.
        """
        check_is_fitted(self)
        # Pickles of earlier versions don't know that of their held-out items.
        reference = getattr(self, "score_gap_", None)
        n_items = _num_samples(X)
        if (
            reference is None
            or reference[0] <= 0
            or not isinstance(self.hidden_weight, str)
            or n_items < max(2, self.embedding_dim)
            or not self._describes_by_model()
        ):
            return None
        from hqsearch.embedding import resolve_gallery

        if n_items > _MOST_LOOKED_AT:
            # Always the same ones: an index of the same items should be the same.
            rows = np.random.default_rng(0).choice(n_items, _MOST_LOOKED_AT, replace=False)
            X = _safe_indexing(X, np.sort(rows))
        X = validate_items(self, X)
        asked = np.sort(np.random.default_rng(0).permutation(len(X))[:_MOST_ASKED])
        mean, error = mean_score_gap(self._model.level_scores(X[asked]))
        gap_share = (mean + 2 * math.hypot(error, reference[1])) / reference[0]
        ratio_share = 1.0
        # Encoders of earlier versions don't know that of their held-out items.
        of_held_out = getattr(self, "distance_ratio_", None)
        if of_held_out is not None and self.class_means_ is not None and of_held_out[0] > 0:
            mean, error = mean_distance_ratio(self._model.embed(X[asked]), self.class_means_)
            ratio_share = (mean - 2 * math.hypot(error, of_held_out[1])) / of_held_out[0]
        settings = resolve_gallery(self.loss, gap_share, ratio_share)
        if settings is None:
            return None
        return Gallery(**settings, axes=self._model.gallery_axes(X, settings["hidden_weight"]))

    def score(self, X: Any, y: Any) -> float:
        """Precision@1 under the code, among the items of X, each item's own entry left out.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            At least two items.
        y : array-like of shape (n_samples,)
            Their labels.

        Returns
        -------
        float
            Share of items whose nearest candidate has their label.
        """
        from hqsearch.search import LeafTable

        check_is_fitted(self)
        X, y = validate_data(
            self,
            X,
            y,
            reset=False,
            dtype=ITEM_DTYPES,
            allow_nd=True,
            ensure_min_samples=2,
        )
        embedding, level_scores, codes = self.describe(X)
        table = LeafTable.build(
            embedding, codes, branching_factor=self._model.branching_factor, n_levels=self._model.n_levels
        )
        found = table.search(embedding, level_scores, codes, 1, exclude=np.arange(len(y)), n_jobs=self.n_jobs)
        return float(np.mean(y[found.positions[:, 0]] == y))


# What calibration and `gallery_of` rely on.
_DESCRIBING = {name: getattr(DescriptionMixin, name) for name in ("embed", "level_scores", "describe")}
