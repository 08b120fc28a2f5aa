"""What the baselines share: an encoder whose embedding ranks candidates, and codes from level scores."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from numbers import Integral
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin, _fit_context, clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_array, check_random_state
from sklearn.utils._param_validation import HasMethods, Interval
from sklearn.utils.validation import check_is_fitted, validate_data

from hqsearch.codes import code_matrix, greedy_codes
from hqsearch.encoder import HierarchicalHashEncoder
from hqsearch.persistence import SaveMixin, load_estimator


class BaselineHashEncoder(SaveMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator, ABC):
    """Encoder protocol of all baselines: codes are what is best by their level scores."""

    _parameter_constraints: dict = {  # noqa: RUF012  scikit-learn's own form
        "encoder": [None, HasMethods(["fit", "embed"])],
        "sparsity": [Interval(Integral, 1, None, closed="left")],
        "random_state": ["random_state"],
    }

    encoder: Any
    sparsity: int
    # Flat codes, unless a baseline says otherwise.
    n_levels = 1
    _branching_factor: int

    @property
    def branching_factor(self) -> int:
        """Buckets of each level, known once fitted."""
        check_is_fitted(self)
        return self._branching_factor

    @abstractmethod
    def embed(self, X: Any) -> np.ndarray:
        """Embedding of X."""

    @abstractmethod
    def level_scores(self, X: Any) -> np.ndarray:
        """Score of each bucket at each level."""

    @abstractmethod
    def describe(self, X: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embedding, level scores and codes in one call."""

    def encode(self, X: Any) -> np.ndarray:
        """Leaves of each item.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items.

        Returns
        -------
        ndarray of shape (n_samples, sparsity), dtype int64
            Bucket ids, best first; ties go to the lower id.
        """
        return self._codes(self.level_scores(X))

    def transform(self, X: Any) -> sp.csr_matrix:
        """Codes as binary rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items.

        Returns
        -------
        csr_matrix of shape (n_samples, branching_factor**n_levels), dtype float64
            `sparsity` ones per row.
        """
        return code_matrix(self.encode(X), self._n_features_out)

    def _codes(self, level_scores: np.ndarray) -> np.ndarray:
        return greedy_codes(level_scores, self.sparsity)

    def _check_sparsity(self, branching_factor: int) -> None:
        n_leaves = branching_factor**self.n_levels
        if self.sparsity > n_leaves:
            raise ValueError(
                f"Expected sparsity <= number of buckets, but sparsity = {self.sparsity}, and "
                f"{type(self).__name__} has {n_leaves} buckets here."
            )

    def _finish_fit(self, branching_factor: int) -> None:
        # Python's number: powers of numpy's overflow.
        branching_factor = int(branching_factor)
        self._check_sparsity(branching_factor)
        self._branching_factor = branching_factor
        self._n_features_out = branching_factor**self.n_levels

    def _fit_encoder(self, X: Any, y: Any) -> Any:
        """Return the encoder whose embedding counts, fitted."""
        if isinstance(self.encoder, FrozenEstimator):
            return self.encoder.estimator
        # Nothing asks for the codes of the default encoder.
        encoder = HierarchicalHashEncoder(hash_epochs=0) if self.encoder is None else clone(self.encoder)
        if self.random_state is not None and "random_state" in encoder.get_params(deep=False):
            encoder.set_params(random_state=self.random_state)
        return encoder.fit(X, y)

    def _embed_by_encoder(self, X: Any) -> np.ndarray:
        return check_array(self.encoder_.embed(X), dtype=np.float32, input_name="encoder.embed(X)")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        mmap_mode: str | None = None,
        *,
        encoder: Any = None,
        network: Any = None,
        trusted: bool = False,
    ) -> Any:
        """Load a baseline that `save` wrote; it gives the same bits as the one that was saved.

        Every file is verified before it is used.

        Parameters
        ----------
        path : path-like
            The folder.
        mmap_mode : {None, "r"}, default=None
            "r" maps larger arrays, as centroids can be, into memory. Weights are read either way.
        encoder : type or fitted estimator, default=None
            Class of `encoder_`, or that encoder itself, where it is not one of this package.
        network : torch.nn.Module, type or callable, default=None
            As in `HierarchicalHashEncoder.load`, of whichever network is your own. Where classifier and
            encoder each have a different one, give the fitted encoder itself as `encoder`.
        trusted : bool, default=False
            Whether to import classes from the paths that the folder names, where they are not given.
            Importing runs code, so trust only your own folders.

        Returns
        -------
        estimator
            The fitted baseline.

        Raises
        ------
        ValueError
            If a file is missing, truncated, damaged or foreign, the format is newer than this package, or a
            class or network that is not of this package is neither given nor trusted. The message names the
            file.
        """
        return load_estimator(
            cls, path, mmap_mode=mmap_mode, encoder=encoder, network=network, trusted=trusted
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_branching_factor")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = not isinstance(self.encoder, FrozenEstimator)
        return tags


class EmbeddingHashEncoder(BaselineHashEncoder):
    """Baseline whose buckets are places in the embedding space: items are embedded once for both uses."""

    random_state: Any

    # The encoder is an estimator with parameters of its own.
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any = None) -> Any:
        """Fit the encoder, unless it is frozen, and the buckets on the embedding of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items; whatever the encoder takes.
        y : array-like of shape (n_samples,), default=None
            Labels. A frozen encoder does without.

        Returns
        -------
        estimator
            This encoder.

        Raises
        ------
        ValueError
            If the encoder refuses X or y, or there are fewer buckets than `sparsity`.
        """
        validate_data(self, X, skip_check_array=True)
        self.encoder_ = self._fit_encoder(X, y)
        embedding = self._embed_by_encoder(X)
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        self._finish_fit(self._fit_buckets(embedding, int(seed)))
        return self

    @abstractmethod
    def _fit_buckets(self, embedding: np.ndarray, seed: int) -> int:
        """Learn the buckets of the embedded items; return how many there are at each level."""

    @abstractmethod
    def _score_buckets(self, embedding: np.ndarray) -> np.ndarray:
        """Level scores, float32 of shape (n_samples, n_levels, branching_factor)."""

    def embed(self, X: Any) -> np.ndarray:
        """Embedding of the encoder, by which candidates are ranked.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items.

        Returns
        -------
        ndarray of shape (n_samples, embedding_dim), dtype float32
            Compared by Euclidean distance.
        """
        check_is_fitted(self)
        return self._embed_by_encoder(X)

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
        return self._score_buckets(self.embed(X))

    def describe(self, X: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embedding, level scores and codes in one call: what an index asks of every item.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items.

        Returns
        -------
        embedding : ndarray of shape (n_samples, embedding_dim), dtype float32
            As `embed`.
        level_scores : ndarray of shape (n_samples, n_levels, branching_factor), dtype float32
            As `level_scores`.
        codes : ndarray of shape (n_samples, sparsity), dtype int64
            As `encode`.
        """
        embedding = self.embed(X)
        level_scores = self._score_buckets(embedding)
        return embedding, level_scores, self._codes(level_scores)
