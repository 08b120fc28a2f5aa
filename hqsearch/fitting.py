"""Both stages' training from an encoder's parameters: where embedding, assignment and search meet."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils.validation import check_memory

from hqsearch.assignment import solve_cascades
from hqsearch.calibration import (
    MOST_ITEMS,
    MOST_QUERIES,
    Calibration,
    class_means_of,
    least_epsilon,
    mean_distance_ratio,
)
from hqsearch.codes import greedy_codes, mean_score_gap
from hqsearch.embedding import (
    CodeProblem,
    EmbeddingModel,
    StageSettings,
    items_per_step,
    open_checkpoints,
    resolve_captured,
    resolve_device,
    resolve_epochs,
    resolve_hash_start,
    resolve_hidden_weight,
    resolve_learning_rate,
    resolve_precision,
    split_validation,
    standard_error,
)
from hqsearch.search import LeafTable

if TYPE_CHECKING:
    from hqsearch.encoder import HierarchicalHashEncoder

# Parameters that change nothing of what is trained.
_NOT_TRAINED_BY = ("memory", "checkpoint_dir", "n_jobs", "verbose")


def fit_stages(
    encoder: HierarchicalHashEncoder,
    X: np.ndarray,
    y: np.ndarray,
    split_seed: int,
    metric_seed: int,
    hash_seed: int,
) -> tuple[EmbeddingModel, list[dict[str, Any]], Calibration]:
    """Train both stages as an encoder's parameters say.

    Parameters
    ----------
    encoder : HierarchicalHashEncoder
        Whose parameters count; nothing is left on it.
    X : ndarray of shape (n_samples, *input_shape)
        Items.
    y : ndarray of shape (n_samples,), dtype int64
        Class indices.
    split_seed, metric_seed, hash_seed : int
        Of the hold-out and of either stage.

    Returns
    -------
    model : EmbeddingModel
        Trained.
    history : list of dict
        One record an epoch, of both stages.
    calibration : Calibration
        What the held-out items tell; nothing where there are none or the hash stage was not trained.
    """
    encoder = _with_plain_numbers(encoder)
    frozen = encoder.shared_trunk == "frozen"
    # Whether the hash stage trains the embedding too.
    along = bool(encoder.shared_trunk) and not frozen
    train, validation = split_validation(y, encoder.validation_fraction, np.random.default_rng(split_seed))
    metric, hashing, new_trunk = _settings(encoder, len(train))
    seeds = (split_seed, metric_seed, hash_seed)
    checkpoints = _open_checkpoints(encoder, X, y, seeds, metric, hashing, new_trunk=new_trunk)
    model = EmbeddingModel(
        loss=encoder.loss,
        n_levels=encoder.n_levels,
        branching_factor=encoder.branching_factor,
        device=encoder.device,
    )
    history, interrupted = model.fit_metric(
        X,
        y,
        train,
        validation,
        network=encoder.network,
        embedding_dim=encoder.embedding_dim,
        settings=metric,
        seed=metric_seed,
        memory=check_memory(encoder.memory),
        verbose=encoder.verbose,
        checkpoint=checkpoints.get("metric"),
    )
    join = partial(
        model.join_hidden_layer,
        X,
        train,
        weight=resolve_hidden_weight(encoder.hidden_weight, encoder.loss),
        seed=metric_seed,
    )
    embedding = hidden = None
    try:
        if not along:
            join()
        if frozen:
            embedding, hidden = model.embed_with_hidden_layer(X)
        else:
            embedding = model.embed(X)
    except KeyboardInterrupt:
        _warn_of_interruption("between the stages")
        # Without an embedding there is nothing to validate.
        interrupted, validation = True, validation[:0]
    if interrupted:
        # Whoever interrupts wants to stop; without any epoch there would be no codes to speak of, and one is
        # too few for a new trunk.
        hashing, new_trunk = replace(hashing, epochs=min(1, hashing.epochs)), False
        # That epoch is none of the fit that may be started again.
        checkpoints.pop("hash", None)
    if frozen and hidden is None:
        hidden = model.embed_with_hidden_layer(X)[1]
    history += model.fit_hash(
        X,
        y,
        train,
        validation,
        settings=hashing,
        seed=hash_seed,
        problem=_code_problem(encoder, embedding, y),
        new_trunk=new_trunk,
        hidden=hidden,
        metric=metric if along else None,
        verbose=encoder.verbose,
        checkpoint=checkpoints.get("hash"),
    )
    if along:
        # Now that both layers are trained.
        try:
            join()
        except KeyboardInterrupt:
            _warn_of_interruption("after both stages; the embedding is without the hidden layer")
    calibration = Calibration()
    if hashing.epochs > 0 and len(validation) > 1 and encoder.branching_factor > 1:
        try:
            known = None if along else embedding
            calibration = _calibrate(encoder, model, X, y, train, validation, split_seed, known)
        except KeyboardInterrupt:
            _warn_of_interruption(
                "after both stages; it won't tell whether items are of other classes, "
                "nor how many leaves to open"
            )
    return model, history, calibration


def calibrate_again(encoder: HierarchicalHashEncoder, X: np.ndarray, y: np.ndarray) -> Calibration:
    """Ask the items that a fitted encoder held out once more: what comes of it depends on how one searches.

    Parameters
    ----------
    encoder : HierarchicalHashEncoder
        Fitted, with an integer as its `random_state`.
    X : ndarray of shape (n_samples, *input_shape)
        The items of its fit.
    y : ndarray of shape (n_samples,)
        Their labels.

    Returns
    -------
    Calibration
        What `fit` would find now.
    """
    y = np.searchsorted(encoder.classes_, y)
    split_seed = encoder._draw_seeds()[0]
    parts = split_validation(y, encoder.validation_fraction, np.random.default_rng(split_seed))
    return _calibrate(_with_plain_numbers(encoder), encoder._model, X, y, *parts, split_seed)


def _with_plain_numbers(encoder: HierarchicalHashEncoder) -> HierarchicalHashEncoder:
    """Return a copy whose parameters are no numpy scalars, as grids hold them: products of those overflow."""
    plain = copy.copy(encoder)
    for name, value in encoder.get_params(deep=False).items():
        if isinstance(value, np.generic):
            setattr(plain, name, value.item())
    return plain


def _calibrate(
    encoder: HierarchicalHashEncoder,
    model: EmbeddingModel,
    X: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    validation: np.ndarray,
    seed: int,
    embedding: np.ndarray | None = None,
) -> Calibration:
    """Look at held-out items, and search for them among those trained on; at some of many."""
    rng = np.random.default_rng((seed, 1))
    described, classes = [], []
    for rows, most in ((train, MOST_ITEMS), (validation, MOST_QUERIES)):
        asked = np.sort(rng.permutation(rows)[:most])
        if embedding is None:
            vectors, level_scores = model.describe(X[asked])
        else:
            # That of all items is known.
            vectors, level_scores = embedding[asked], model.level_scores(X[asked])
        # An item beyond all bounds, which none of the training's checks refuses, says nothing.
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.square(vectors).sum(1) + np.square(level_scores).sum((1, 2))
        usable = np.isfinite(lengths)
        asked, vectors, level_scores = asked[usable], vectors[usable], level_scores[usable]
        described.append((vectors, level_scores, greedy_codes(level_scores, encoder.sparsity)))
        classes.append(y[asked])
    gallery, queries = described
    if min(map(len, classes)) < 2:
        return Calibration()
    means = class_means_of(gallery[0], np.unique(classes[0], return_inverse=True)[1])
    return Calibration(
        score_gap=mean_score_gap(queries[1]),
        distance_ratio=mean_distance_ratio(queries[0], means) if len(means) > 1 else None,
        class_means=means,
        epsilon=least_epsilon(
            gallery,
            classes[0],
            queries,
            classes[1],
            branching_factor=encoder.branching_factor,
            n_levels=encoder.n_levels,
            n_jobs=encoder.n_jobs,
        ),
    )


def _warn_of_interruption(where: str) -> None:
    warnings.warn(f"Training of the encoder was interrupted {where}.", UserWarning, stacklevel=4)


def _open_checkpoints(
    encoder: HierarchicalHashEncoder,
    X: np.ndarray,
    y: np.ndarray,
    seeds: tuple[int, int, int],
    metric: StageSettings,
    hashing: StageSettings,
    *,
    new_trunk: bool,
) -> dict[str, Any]:
    """Checkpoint of each stage, or none at all."""
    if encoder.checkpoint_dir is None:
        return {}
    parameters = encoder.get_params(deep=False)
    # The last three are compared by what comes of them, and so is what "auto" stands for.
    for name in (*_NOT_TRAINED_BY, "network", "device", "random_state"):
        del parameters[name]
    parameters["metric_epochs"], parameters["hash_epochs"] = metric.epochs, hashing.epochs
    parameters["hash_trunk"] = "new" if new_trunk else "metric"
    parameters["hidden_weight"] = resolve_hidden_weight(encoder.hidden_weight, encoder.loss)
    parameters["precision"] = metric.precision
    parameters["learning_rate"] = metric.learning_rate
    parameters["hash_learning_rate"] = hashing.learning_rate
    return open_checkpoints(
        encoder.checkpoint_dir,
        X,
        y,
        network=encoder.network,
        device=resolve_device(encoder.device),
        seeds=seeds,
        parameters=parameters,
    )


def _settings(encoder: HierarchicalHashEncoder, n_items: int) -> tuple[StageSettings, StageSettings, bool]:
    """Make both stages' settings for so many items, and say whether the hash stage has a new trunk."""
    if encoder.shared_trunk and encoder.hash_trunk == "new":
        raise ValueError(
            f"Expected hash_trunk='auto' or 'metric' with shared_trunk={encoder.shared_trunk!r}, where one "
            "trunk serves both stages, got hash_trunk='new'."
        )
    per_step = items_per_step(
        len(encoder.classes_), encoder.classes_per_batch, encoder.batch_size, encoder.class_groups_per_step
    )
    metric_epochs = resolve_epochs(encoder.metric_epochs, "metric", n_items, per_step)
    new_trunk, hash_epochs = resolve_hash_start(
        encoder.hash_trunk,
        encoder.hash_epochs,
        loss=encoder.loss,
        shared_trunk=bool(encoder.shared_trunk),
        n_items=n_items,
        items_per_step=per_step,
    )
    metric, hashing = (
        _stage_settings(encoder, stage, epochs)
        for stage, epochs in (("metric", metric_epochs), ("hash", hash_epochs))
    )
    return metric, hashing, new_trunk


def _stage_settings(encoder: HierarchicalHashEncoder, stage: str, epochs: int) -> StageSettings:
    """Make the settings of a stage, "metric" or "hash"."""
    hashing = stage == "hash"
    rate = encoder.hash_learning_rate if hashing else encoder.learning_rate
    rate = resolve_learning_rate(rate, encoder.network)
    device = resolve_device(encoder.device)
    return StageSettings(
        loss=encoder.loss,
        regularization=encoder.hash_regularization if hashing else encoder.regularization,
        margin=encoder.hash_margin if hashing else encoder.margin,
        proxy_scale=encoder.proxy_scale,
        epochs=epochs,
        learning_rate=rate,
        trunk_learning_rate=rate * encoder.trunk_learning_rate_ratio,
        batch_size=encoder.batch_size,
        classes_per_batch=encoder.classes_per_batch,
        class_groups_per_step=encoder.class_groups_per_step,
        patience=encoder.patience,
        # Of the hash stage alone: a metric stage that `memory` keeps serves all.
        code_assignment=encoder.code_assignment if hashing else "batch",
        precision=resolve_precision(encoder.precision, encoder.network, encoder._input_shape, device),
        captured=resolve_captured(encoder.network, device),
    )


def _code_problem(
    encoder: HierarchicalHashEncoder,
    metric_embedding: np.ndarray | None,
    y: np.ndarray,
) -> CodeProblem:
    """Say how the codes of this encoder are solved and validated."""

    def solve(class_scores: np.ndarray) -> np.ndarray:
        codes = solve_cascades(
            class_scores,
            sparsity=encoder.sparsity,
            sibling_penalty=encoder.sibling_penalty,
            orthogonality_penalty=encoder.orthogonality_penalty,
            n_jobs=encoder.n_jobs,
        )
        return np.asarray(codes)

    def validate(
        gallery: np.ndarray,
        validation: np.ndarray,
        level_scores: np.ndarray,
        trained_along: np.ndarray | None,
    ) -> dict[str, float]:
        codes = greedy_codes(level_scores, encoder.sparsity)
        embedding = trained_along
        if embedding is None:
            assert metric_embedding is not None
            embedding = metric_embedding[np.concatenate([gallery, validation])]
        base, queries = slice(len(gallery)), slice(len(gallery), None)
        table = LeafTable.build(
            embedding[base],
            codes[base],
            branching_factor=encoder.branching_factor,
            n_levels=encoder.n_levels,
        )
        found = table.search(embedding[queries], level_scores[queries], codes[queries], 1)
        precision = float(np.mean(y[gallery[found.positions[:, 0]]] == y[validation]))
        suf = found.stats.suf()
        # Codes that put everything into one leaf are as precise as exhaustive search, and useless, so
        # precision counts in full only from a fair speed-up on.
        counted = min(1.0, suf * encoder.sparsity / (0.8 * len(np.unique(y[gallery]))))
        error = standard_error(precision, len(validation))
        return {
            "precision@1": precision,
            "suf": suf,
            "criterion": counted * precision,
            "standard_error": counted * error,
        }

    return CodeProblem(
        n_levels=encoder.n_levels,
        branching_factor=encoder.branching_factor,
        sparsity=encoder.sparsity,
        solve=solve,
        validate=validate,
    )
