"""HierarchicalHashEncoder: labelled items in, hierarchical sparse hash codes out."""

from __future__ import annotations

import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin, _fit_context
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from hqsearch.calibration import Calibration
from hqsearch.codes import code_matrix
from hqsearch.description import ITEM_DTYPES, DescriptionMixin
from hqsearch.persistence import SaveMixin, load_estimator

# As the search has it: bucket ids are int64, with a bit to spare for sums.
MAX_LEAVES = 2**62


class HierarchicalHashEncoder(
    DescriptionMixin, SaveMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator
):
    """Learn an embedding and hierarchical sparse hash codes for it, from labelled items.

    `fit` trains in two stages. The metric stage trains a network whose embedding puts items of one class
    close together. The hash stage goes on from its trunk, or starts with a new one (see `hash_trunk`), and
    learns, for each of `n_levels` levels, a score of each of `branching_factor` buckets; the best codes of
    the classes, of all of them or of those in a mini-batch, are found exactly by a cascade of min-cost flows,
    and the scores are trained towards them.

    Parameters
    ----------
    n_levels : int, default=2
        Levels of the hash tree. With one, "npairs" and "triplet" tell the classes themselves apart, as in the
        papers' method of one level; with several, at each level the classes of different buckets.
    branching_factor : int, default=64
        Buckets of each level; the tree has `branching_factor**n_levels` leaves.
    sparsity : int, default=1
        Active buckets in the last level, so leaves that an item lies in.
    embedding_dim : int, default=64
        Length of an embedding vector.
    network : {"auto", "mlp", "conv", "nin"}, torch.nn.Module or callable, default="auto"
        Trunk below the linear layers. "mlp" suits feature vectors and "conv" images; "auto" chooses by the
        shape of X; "nin" is the papers' network in network. A module is copied, and must map
        (n_samples, ...) to (n_samples, n_hidden); a callable gets the shape of one item and returns such a
        module. Every trunk is fed standardised float32 items.
    loss : {"proxy", "npairs", "triplet"}, default="proxy"
        Loss of both stages. "proxy" compares every item with all classes: softmax over cosines to one proxy
        for each class (unit embeddings), then cross-entropy of each level to codes that are solved over all
        classes until they settle. "npairs" and "triplet" (semi-hard, unit-length embeddings) are the papers',
        and compare the items of a mini-batch, whose codes they find.
    sibling_penalty : float, default=100.0
        Cost of two classes, of all or of a mini-batch (see `code_assignment`), that share parent and bucket.
    orthogonality_penalty : float, default=0.1
        Cost of two classes, of all or of a mini-batch, that share a bucket at one level.
    code_assignment : {"batch", "settled"}, default="batch"
        Where the codes of the hash stage come from. "batch" finds those of each mini-batch's classes from
        that batch alone, as the papers do. "settled" finds those of all classes together, from running means
        of their scores, once an epoch until half of the epochs, and then keeps them; it starts from the
        class means. `loss="proxy"` always settles.
    classes_per_batch : int, default=64
        Classes in a mini-batch; at most as many as there are.
    batch_size : int, default=128
        Items in a mini-batch, shared evenly by its classes.
    class_groups_per_step : int, default=1
        Mini-batches in one training step: one forward pass, the losses averaged. With
        `code_assignment="batch"` their flow problems are solved in parallel.
    shared_trunk : bool or "frozen", default=False
        Whether one trunk serves embedding and level scores, so that a query runs one network instead of two.
        With True the hash stage goes on training the embedding too, by the sum of both losses, and the
        embedding depends on the codes. With npairs that was more precise too on the images that were
        compared, with proxy a point less at 1 where queries met many items. With "frozen" the hash stage
        trains a linear layer above the metric stage's trunk, in seconds and in float32; with `memory` a
        search over sparsities or penalties trains little else. An index is then about as precise as
        exhaustive search, and loses what the second network adds to that: up to a point with proxy, seven
        with npairs on the images that were compared (doc/experiments.md).
    hash_trunk : {"auto", "metric", "new"}, default="auto"
        Where the trunk of the hash stage starts: at that of the metric stage, as in the papers, or anew. Two
        networks that were trained apart err on different queries, so together they choose better leaves,
        but a new one needs more epochs. A module of your own starts as it was given. "auto" is "new" with
        `loss="proxy"`, unless the trunk is shared, an epoch has fewer than 40 steps or `hash_epochs` are
        fewer than "auto" gives a new trunk; else, and with `hash_epochs=0`, it is "metric".
    metric_epochs, hash_epochs : int or "auto", default="auto"
        Most epochs of each stage. An epoch draws about as many items as there are, at least those of a step.
        "auto" is 10 and 20, more where an epoch has fewer than 40 steps and fewer where it has more than 120,
        but at most 30, and at least 6 and 8; a hash stage with a new trunk has those of both. A longer metric
        stage makes neighbours of classes that `fit` has seen hardly more precise, and those of other classes
        much less.
    learning_rate : float or "auto", default="auto"
        Peak rate of the metric stage's linear layer. "auto" is 3e-3 with "mlp" and "conv"; 1e-3 with "nin",
        which has no normalisation, and with a network of your own, which may be trained already.
    hash_learning_rate : float or "auto", default="auto"
        The same, of the hash stage.
    trunk_learning_rate_ratio : float, default=1.0
        The trunk's rate in either stage, as a share of the linear layer's. The papers, with hundreds of
        epochs, use 0.1.
    regularization : float, default=0.003
        Weight of the squared norms in the npairs loss of the metric stage.
    hash_regularization : float, default=0.01
        The same, of the hash stage.
    hidden_weight : float or "auto", default="auto"
        Weight in the embedding of the hidden layer, the trunk's ReLU. `fit` joins the trained embedding
        with it, scaled to this length beside the embedding's 1 (npairs: beside its root mean square), and
        projects both to `embedding_dim` numbers by their principal axes. The hidden layer ranks items of
        classes that `fit` has not seen better, and those of trained classes worse. "auto" is 0.7 with
        `loss="proxy"` and 0, the trained embedding alone, with the papers' losses, and more in an index of
        items of other classes, see `gallery_of`.
    proxy_scale : float, default=8.0
        Factor of the cosines in the proxy loss of the metric stage.
    margin : float, default=0.3
        Margin of the triplet loss of the metric stage.
    hash_margin : float, default=2.0
        The same, of the hash stage.
    validation_fraction : float, default=0.1
        Share of the items, stratified, that is held out to choose the epoch that each stage keeps: the last
        one within a standard error of the best. 0 keeps the last epoch.
    patience : int or None, default=None
        Validations without improvement after which a stage stops; a tie is none. A stage validates after
        each of up to 19 epochs, and ten to fifteen times in more. None never stops early.
    memory : None, str or joblib.Memory, default=None
        Where to keep metric stages that are trained already. They do not depend on `n_levels`,
        `branching_factor`, `sparsity`, the penalties, `code_assignment`, `shared_trunk`, `hash_trunk` or
        `hidden_weight`, so with an integer `random_state` a search over those trains the metric stage once
        per fold.
    checkpoint_dir : None, str or path-like, default=None
        Folder where `fit` leaves how far it came, for the case that it is killed: started again with the same
        data and parameters it goes on from there, and on the CPU ends with the same model bit by bit. It
        is made where there is none. The state is written at the end of an epoch, after the first one and then
        whenever that takes at most two per cent of the time. Needs a `random_state` other than None. The
        folder belongs to one fit, so a search over parameters cannot share one. It is kept at the end,
        holding both trained networks, and fitting the same again returns at once; delete it when it has
        served.
    device : str, default="auto"
        Where networks train and run: "auto" takes CUDA where there is one, else the CPU.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Of the products in training and validation; weights, losses and what a fitted encoder computes are
        float32.
        "auto" trains the built-in convolutional trunks in bfloat16 where the device has fast instructions for
        it (AMX, AVX512-BF16 but for Intel's from Sapphire Rapids on, NVIDIA from Ampere on), else in float32.
    n_jobs : int or None, default=None
        Threads that solve the flow problems of a step, as in joblib, used with `code_assignment="batch"` and
        several class groups; and that search for held-out items in the end.
    random_state : int, RandomState instance or None, default=None
        Seed of the hold-out, the initial weights, the batches and dropout. Same seed, same codes on one
        machine's CPU, whatever `n_jobs`. The global random states are neither read nor changed, but for
        `random_state=None`, which draws its seed from numpy's.
    verbose : int, default=0
        1 prints a line an epoch.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels.
    history_ : list of dict
        One record an epoch: `stage`, `epoch`, `loss`, `seconds`, and where the epoch was validated
        `precision@1`, for the hash stage `suf`, and `criterion`, which is greatest at the best epoch, with
        its `standard_error`. They are of held-out items searched among those trained on, among 16,384 of them
        where there are more. The metric stage's figures are of the trained embedding alone.
    score_gap_ : tuple of float or None
        Mean gap between the level scores of the best and the second best bucket of held-out items, summed
        over the levels, and its standard error, which `gallery_of` compares with. None where fewer than two
        items were held out, the hash stage was not trained, there is one bucket a level, `fit` was
        interrupted, or the encoder was saved by an earlier version.
    distance_ratio_ : tuple of float or None
        Mean ratio of a held-out item's distances to the nearest and to the second nearest of `class_means_`,
        and its standard error, which `gallery_of` compares with too.
    class_means_ : ndarray of shape (n_means, embedding_dim), dtype float32, or None
        Mean embedding of each class that is among 16,384 random training items; None where `score_gap_` is.
    epsilon_ : float
        What an index's `epsilon="auto"` is over items of trained classes, with codes of the sparsity of the
        fit. It is the least of 0 to 0.4 with which searching for held-out items is as precise as exhaustive
        search of the embedding, at 1 and at 16 neighbours, half a standard error or one query aside; where
        none is, or only at a speed-up (at 1) below the number of classes, the largest that is not as slow as
        that. 0 opens the nearest leaf alone; so it is where `score_gap_` is None or the leaves of an index
        have no centroids.
    n_features_in_ : int
        `X.shape[1]`: features of a vector, channels of an image.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the features, where X has them.

    See Also
    --------
    HierarchicalHashIndex : Answers neighbour queries with such codes.

    References
    ----------
    Y. Jeong, Y. Kim and H. O. Song, "End-to-End Efficient Representation Learning via Cascading Combinatorial
    Optimization", CVPR 2019. Y. Jeong and H. O. Song, "Efficient end-to-end learning for quantizable
    representations", ICML 2018.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from hqsearch import HierarchicalHashEncoder
    >>> X, y = load_digits(return_X_y=True)
    >>> encoder = HierarchicalHashEncoder(metric_epochs=2, hash_epochs=2, random_state=0)
    >>> encoder = encoder.fit(X[:500], y[:500])
    >>> encoder.encode(X[500:503]).shape
    (3, 1)
    >>> encoder.transform(X[500:503]).shape
    (3, 4096)
    """

    _parameter_constraints: dict = {  # noqa: RUF012  scikit-learn's own form
        "n_levels": [Interval(Integral, 1, None, closed="left")],
        "branching_factor": [Interval(Integral, 1, None, closed="left")],
        "sparsity": [Interval(Integral, 1, None, closed="left")],
        "embedding_dim": [Interval(Integral, 1, None, closed="left")],
        "network": [
            StrOptions({"auto", "mlp", "conv", "nin"}),
            HasMethods(["forward", "parameters"]),
            callable,
        ],
        "loss": [StrOptions({"proxy", "npairs", "triplet"})],
        "sibling_penalty": [Interval(Real, 0, None, closed="left")],
        "orthogonality_penalty": [Interval(Real, 0, None, closed="left")],
        "code_assignment": [StrOptions({"settled", "batch"})],
        "classes_per_batch": [Interval(Integral, 2, None, closed="left")],
        "batch_size": [Interval(Integral, 4, None, closed="left")],
        "class_groups_per_step": [Interval(Integral, 1, None, closed="left")],
        "shared_trunk": ["boolean", StrOptions({"frozen"})],
        "hash_trunk": [StrOptions({"auto", "metric", "new"})],
        "metric_epochs": [StrOptions({"auto"}), Interval(Integral, 0, None, closed="left")],
        "hash_epochs": [StrOptions({"auto"}), Interval(Integral, 0, None, closed="left")],
        "learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "hash_learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "trunk_learning_rate_ratio": [Interval(Real, 0, None, closed="left")],
        "regularization": [Interval(Real, 0, None, closed="left")],
        "hash_regularization": [Interval(Real, 0, None, closed="left")],
        "hidden_weight": [StrOptions({"auto"}), Interval(Real, 0, 1e6, closed="both")],
        "proxy_scale": [Interval(Real, 0, None, closed="neither")],
        "margin": [Interval(Real, 0, None, closed="left")],
        "hash_margin": [Interval(Real, 0, None, closed="left")],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "patience": [None, Interval(Integral, 1, None, closed="left")],
        "memory": [None, str, HasMethods(["cache"])],
        "checkpoint_dir": [None, str, os.PathLike],
        "device": [str],
        "precision": [StrOptions({"auto", "float32", "bfloat16"})],
        "n_jobs": [None, Integral],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        *,
        n_levels: int = 2,
        branching_factor: int = 64,
        sparsity: int = 1,
        embedding_dim: int = 64,
        network: str | Callable = "auto",
        loss: str = "proxy",
        sibling_penalty: float = 100.0,
        orthogonality_penalty: float = 0.1,
        code_assignment: str = "batch",
        classes_per_batch: int = 64,
        batch_size: int = 128,
        class_groups_per_step: int = 1,
        shared_trunk: bool | str = False,
        hash_trunk: str = "auto",
        metric_epochs: int | str = "auto",
        hash_epochs: int | str = "auto",
        learning_rate: float | str = "auto",
        hash_learning_rate: float | str = "auto",
        trunk_learning_rate_ratio: float = 1.0,
        regularization: float = 0.003,
        hash_regularization: float = 0.01,
        hidden_weight: float | str = "auto",
        proxy_scale: float = 8.0,
        margin: float = 0.3,
        hash_margin: float = 2.0,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        memory: Any = None,
        checkpoint_dir: str | os.PathLike | None = None,
        device: str = "auto",
        precision: str = "auto",
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ):
        self.n_levels = n_levels
        self.branching_factor = branching_factor
        self.sparsity = sparsity
        self.embedding_dim = embedding_dim
        self.network = network
        self.loss = loss
        self.sibling_penalty = sibling_penalty
        self.orthogonality_penalty = orthogonality_penalty
        self.code_assignment = code_assignment
        self.classes_per_batch = classes_per_batch
        self.batch_size = batch_size
        self.class_groups_per_step = class_groups_per_step
        self.shared_trunk = shared_trunk
        self.hash_trunk = hash_trunk
        self.metric_epochs = metric_epochs
        self.hash_epochs = hash_epochs
        self.learning_rate = learning_rate
        self.hash_learning_rate = hash_learning_rate
        self.trunk_learning_rate_ratio = trunk_learning_rate_ratio
        self.regularization = regularization
        self.hash_regularization = hash_regularization
        self.hidden_weight = hidden_weight
        self.proxy_scale = proxy_scale
        self.margin = margin
        self.hash_margin = hash_margin
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.memory = memory
        self.checkpoint_dir = checkpoint_dir
        self.device = device
        self.precision = precision
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any) -> HierarchicalHashEncoder:
        """Train both stages.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or (n_samples, channels, height, width)
            Items. float32, float64 and uint8 are taken as they are, all else as float64.
        y : array-like of shape (n_samples,)
            Labels, of at least two classes.

        Returns
        -------
        HierarchicalHashEncoder
            This encoder.

        Warns
        -----
        UserWarning
            If it is interrupted (Ctrl-C): of the epochs so far one is kept as in the end, and after an
            interrupted metric stage the hash stage runs for one epoch on its trunk.

        Raises
        ------
        FloatingPointError
            If the loss is not finite any more.
        ValueError
            If X or y is malformed, y has one class, the tree has more than 2**62 leaves, `sparsity`
            exceeds `branching_factor`, `hash_trunk` is "new" with `shared_trunk`, or `device` does not exist;
            or if `checkpoint_dir` holds checkpoints of another fit or damaged ones, or `random_state` is None
            with it.
        OSError
            If a checkpoint cannot be written.
        """
        # Before anything is learned of X: a fit refused for these leaves a fitted encoder as it was.
        n_leaves = self._check_tree()
        if self.checkpoint_dir is not None and self.random_state is None:
            raise ValueError(
                "Expected random_state to be an int or a RandomState with checkpoint_dir, got None: a fit "
                "that is started again would draw other seeds, and could not go on."
            )
        X, y = self._validate_training_data(X, y)
        # It imports torch, which importing this package must not.
        from hqsearch.fitting import fit_stages

        self._model, self.history_, calibration = fit_stages(self, X, y, *self._draw_seeds())
        self._keep(calibration)
        self._n_features_out = n_leaves
        return self

    def _validate_training_data(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        X, y = validate_data(self, X, y, dtype=ITEM_DTYPES, allow_nd=True, ensure_min_samples=2)
        self._check_n_dimensions(X)
        check_classification_targets(y)
        self.classes_, y = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} expects at least 2 classes in y, got 1 class: {self.classes_[0]}."
            )
        self._input_shape = X.shape[1:]
        return X, y

    @staticmethod
    def _check_n_dimensions(X: np.ndarray) -> None:
        if X.ndim not in (2, 4):
            raise ValueError(
                "Expected X of shape (n_samples, n_features) or (n_samples, channels, height, width), "
                f"got {X.ndim} dimensions, shape {X.shape}."
            )
        if 0 in X.shape[1:]:
            raise ValueError(f"Expected items of at least one number, got shape {X.shape}.")

    def _check_tree(self) -> int:
        """Check the codes' parameters against each other; return the number of leaves."""
        if self.sparsity > self.branching_factor:
            raise ValueError(
                f"Expected sparsity <= branching_factor, but sparsity = {self.sparsity}, "
                f"branching_factor = {self.branching_factor}."
            )
        # Python's numbers: numpy's overflow.
        n_leaves = int(self.branching_factor) ** int(self.n_levels)
        if n_leaves > MAX_LEAVES:
            raise ValueError(
                "Expected branching_factor**n_levels <= 2**62, but branching_factor = "
                f"{self.branching_factor}, n_levels = {self.n_levels}."
            )
        return n_leaves

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

    def _draw_seeds(self) -> list[int]:
        """Seeds of the hold-out and of either stage."""
        seeds = check_random_state(self.random_state).randint(np.iinfo(np.int32).max, size=3)
        return [int(seed) for seed in seeds]

    def _keep(self, calibration: Calibration) -> None:
        self.score_gap_, self.distance_ratio_ = calibration.score_gap, calibration.distance_ratio
        self.class_means_, self.epsilon_ = calibration.class_means, calibration.epsilon
        # Of this many leaves, that `epsilon_` is of.
        self._calibrated_sparsity = self.sparsity

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        mmap_mode: str | None = None,
        *,
        network: Any = None,
        trusted: bool = False,
    ) -> HierarchicalHashEncoder:
        """Load an encoder that `save` wrote; it gives the same bits as the one that was saved.

        Every file is verified before it is used.

        Parameters
        ----------
        path : path-like
            The folder.
        mmap_mode : {None, "r"}, default=None
            "r" maps larger arrays, as labels can be, into memory. Weights are read either way.
        network : torch.nn.Module, type or callable, default=None
            What makes the trunk where the encoder was fitted with a network of your own. For a module: its
            class if it takes no arguments, a module of the same build, or a function of the shape of one
            item. For a callable: the callable. The weights are filled in.
        trusted : bool, default=False
            Whether to import the network from the path that the folder names, if `network` is not given.
            Importing runs code, so trust only your own folders.

        Returns
        -------
        HierarchicalHashEncoder
            The fitted encoder, on the device that its `device` names or, without it, on what there is.

        Raises
        ------
        ValueError
            If a file is missing, truncated, damaged or foreign, the format is newer than this package, or a
            network of your own is neither given nor trusted. The message names the file.

        Examples
        --------
        >>> import tempfile
        >>> from sklearn.datasets import load_digits
        >>> from hqsearch import HierarchicalHashEncoder
        >>> X, y = load_digits(return_X_y=True)
        >>> encoder = HierarchicalHashEncoder(metric_epochs=1, hash_epochs=1, random_state=0)
        >>> encoder = encoder.fit(X[:200], y[:200])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     encoder.save(f"{folder}/digits")
        ...     loaded = HierarchicalHashEncoder.load(f"{folder}/digits")
        >>> bool((loaded.encode(X[200:]) == encoder.encode(X[200:])).all())
        True
        """
        return load_estimator(cls, path, mmap_mode=mmap_mode, network=network, trusted=trusted)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_model")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags
