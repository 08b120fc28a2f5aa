"""The softmax control: the most probable classes of a plain classifier are the code."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import _fit_context
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_memory, validate_data

from hqsearch.baselines.protocol import BaselineHashEncoder
from hqsearch.description import ITEM_DTYPES, validate_items


class SoftmaxHashEncoder(BaselineHashEncoder):
    """Hash each item by the classes that a plain classifier finds most probable: the control.

    There is one level with a bucket for each class, and a bucket's score is the class's log-probability. The
    classifier has the trunks, the class-balanced batches and the training loop of `HierarchicalHashEncoder`,
    and is trained by softmax cross-entropy. Codes that are learned from labels are to be better than this.

    Parameters
    ----------
    encoder : estimator or None, default=None
        Whose embedding ranks candidates. None is the classifier's own hidden layer, the output of its trunk
        after the ReLU, at unit length. An estimator with `fit` and `embed` is cloned and fitted; wrapped in
        `sklearn.frozen.FrozenEstimator` a fitted one is used as it is. The classifier needs y either way.
    sparsity : int, default=1
        Classes that count, so buckets that an item lies in.
    network : {"auto", "mlp", "conv", "nin"}, torch.nn.Module or callable, default="auto"
        Trunk of the classifier, as in `HierarchicalHashEncoder`.
    classes_per_batch : int, default=64
        Classes in a mini-batch; at most as many as there are.
    batch_size : int, default=128
        Items in a mini-batch, shared evenly by its classes.
    epochs : int or "auto", default="auto"
        Most epochs; "auto" as a hash stage of `HierarchicalHashEncoder` with a new trunk.
    learning_rate : float or "auto", default="auto"
        Peak rate of the last layer; "auto" as in `HierarchicalHashEncoder`.
    trunk_learning_rate_ratio : float, default=1.0
        The trunk's rate, as a share of the last layer's.
    validation_fraction : float, default=0.1
        Share of the items, stratified, that is held out to choose the epoch that is kept: the last one within
        a standard error of the best accuracy. 0 keeps the last epoch.
    patience : int or None, default=None
        Validations without improvement after which training stops, as in `HierarchicalHashEncoder`. None
        never stops early.
    memory : None, str or joblib.Memory, default=None
        Where to keep classifiers that are trained already. They do not depend on `sparsity`.
    device : str, default="auto"
        Where the classifier trains and runs: "auto" takes CUDA where there is one, else the CPU.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Of the products in training, as in `HierarchicalHashEncoder`.
    random_state : int, RandomState instance or None, default=None
        Seed of the classifier, and of the encoder unless that is frozen. None keeps the one that a given
        encoder has.
    verbose : int, default=0
        1 prints a line an epoch.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels; bucket i stands for `classes_[i]`.
    encoder_ : estimator or None
        The fitted encoder; None where the hidden layer takes its part.
    history_ : list of dict
        One record an epoch of the classifier: `stage`, `epoch`, `loss`, `seconds`, and where it was validated
        `accuracy`, `criterion` and `standard_error`.
    n_levels : int
        1.
    branching_factor : int
        Number of classes.
    n_features_in_ : int
        `X.shape[1]`: features of a vector, channels of an image.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features, where X has them.

    References
    ----------
    A. Sablayrolles, M. Douze, N. Usunier and H. Jegou, "How should we evaluate supervised hashing?", ICASSP
    2017 (arXiv:1609.06753), show how strong this control is.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from hqsearch.baselines import SoftmaxHashEncoder
    >>> X, y = load_digits(return_X_y=True)
    >>> control = SoftmaxHashEncoder(epochs=3, sparsity=2, random_state=0).fit(X[:500], y[:500])
    >>> control.encode(X[500:503]).shape
    (3, 2)
    """

    _parameter_constraints: dict = {  # noqa: RUF012  scikit-learn's own form
        **BaselineHashEncoder._parameter_constraints,
        "network": [
            StrOptions({"auto", "mlp", "conv", "nin"}),
            HasMethods(["forward", "parameters"]),
            callable,
        ],
        "classes_per_batch": [Interval(Integral, 2, None, closed="left")],
        "batch_size": [Interval(Integral, 4, None, closed="left")],
        "epochs": [StrOptions({"auto"}), Interval(Integral, 0, None, closed="left")],
        "learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "trunk_learning_rate_ratio": [Interval(Real, 0, None, closed="left")],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "patience": [None, Interval(Integral, 1, None, closed="left")],
        "memory": [None, str, HasMethods(["cache"])],
        "device": [str],
        "precision": [StrOptions({"auto", "float32", "bfloat16"})],
        "verbose": ["verbose"],
    }

    # Of those that were saved before format version 7 or pickled.
    _unit_length = False

    def __init__(
        self,
        encoder: Any = None,
        *,
        sparsity: int = 1,
        network: str | Callable = "auto",
        classes_per_batch: int = 64,
        batch_size: int = 128,
        epochs: int | str = "auto",
        learning_rate: float | str = "auto",
        trunk_learning_rate_ratio: float = 1.0,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        memory: Any = None,
        device: str = "auto",
        precision: str = "auto",
        random_state: Any = None,
        verbose: int = 0,
    ):
        self.encoder = encoder
        self.sparsity = sparsity
        self.network = network
        self.classes_per_batch = classes_per_batch
        self.batch_size = batch_size
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.trunk_learning_rate_ratio = trunk_learning_rate_ratio
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.memory = memory
        self.device = device
        self.precision = precision
        self.random_state = random_state
        self.verbose = verbose

    # The encoder is an estimator with parameters of its own.
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: Any) -> SoftmaxHashEncoder:
        """Train the classifier, and fit the encoder if one is given and not frozen.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, channels, height, width)
            Items. float32, float64 and uint8 are taken as they are, all else as float64.
        y : array-like of shape (n_samples,)
            Labels, of at least two classes.

        Returns
        -------
        SoftmaxHashEncoder
            This encoder.

        Raises
        ------
        ValueError
            If X or y is malformed, y has one class, there are fewer classes than `sparsity`, or `device` does
            not exist.
        """
        items, indices = self._validate_training_data(X, y)
        # Before an encoder and a classifier are trained in vain.
        self._check_sparsity(len(self.classes_))
        self.encoder_ = None if self.encoder is None else self._fit_encoder(X, y)
        seeds = check_random_state(self.random_state).randint(np.iinfo(np.int32).max, size=2)
        self._fit_classifier(items, indices, *(int(seed) for seed in seeds))
        self._finish_fit(len(self.classes_))
        return self

    def _validate_training_data(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        X, y = validate_data(self, X, y, dtype=ITEM_DTYPES, allow_nd=True, ensure_min_samples=2)
        if X.ndim not in (2, 4):
            raise ValueError(
                "Expected X of shape (n_samples, n_features) or (n_samples, channels, height, width), "
                f"got {X.ndim} dimensions, shape {X.shape}."
            )
        check_classification_targets(y)
        self.classes_, y = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} expects at least 2 classes in y, got 1 class: {self.classes_[0]}."
            )
        self._input_shape = X.shape[1:]
        return X, y

    def _fit_classifier(self, X: np.ndarray, y: np.ndarray, split_seed: int, seed: int) -> None:
        from hqsearch.embedding import (
            ClassifierModel,
            StageSettings,
            items_per_step,
            resolve_captured,
            resolve_device,
            resolve_epochs,
            resolve_learning_rate,
            resolve_precision,
            split_validation,
        )

        train, validation = split_validation(y, self.validation_fraction, np.random.default_rng(split_seed))
        rate = resolve_learning_rate(self.learning_rate, self.network)
        device = resolve_device(self.device)
        per_step = items_per_step(len(self.classes_), self.classes_per_batch, self.batch_size)
        settings = StageSettings(
            loss="softmax",
            regularization=0.0,
            margin=0.0,
            epochs=resolve_epochs(self.epochs, "single", len(train), per_step),
            learning_rate=rate,
            trunk_learning_rate=rate * self.trunk_learning_rate_ratio,
            batch_size=self.batch_size,
            classes_per_batch=self.classes_per_batch,
            patience=self.patience,
            precision=resolve_precision(self.precision, self.network, self._input_shape, device),
            captured=resolve_captured(self.network, device),
        )
        self._unit_length = True
        self._model = ClassifierModel(device=self.device)
        self.history_ = self._model.fit(
            X,
            y,
            train,
            validation,
            network=self.network,
            settings=settings,
            seed=seed,
            memory=check_memory(self.memory),
            verbose=self.verbose,
        )

    def _describe_by_classifier(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        return self._model.describe(validate_items(self, X), unit_length=self._unit_length)

    def embed(self, X: Any) -> np.ndarray:
        """Embedding by which candidates are ranked: the encoder's, or the hidden layer at unit length.

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
        if self.encoder_ is None:
            return self._describe_by_classifier(X)[0]
        return self._embed_by_encoder(X)

    def level_scores(self, X: Any) -> np.ndarray:
        """Log-probability of each class.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items.

        Returns
        -------
        ndarray of shape (n_samples, 1, n_classes), dtype float32
            Natural logarithms, of classes of equal prior probability.
        """
        X = validate_items(self, X)
        return self._model.log_probabilities(X)[:, None, :]

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
        level_scores : ndarray of shape (n_samples, 1, n_classes), dtype float32
            As `level_scores`.
        codes : ndarray of shape (n_samples, sparsity), dtype int64
            As `encode`.
        """
        check_is_fitted(self)
        if self.encoder_ is None:
            embedding, log_probabilities = self._describe_by_classifier(X)
            level_scores = log_probabilities[:, None, :]
        else:
            embedding, level_scores = self.embed(X), self.level_scores(X)
        return embedding, level_scores, self._codes(level_scores)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags
