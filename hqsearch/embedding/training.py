"""The two training stages: first the metric embedding, then the level scores behind the codes."""

from __future__ import annotations

import copy
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hqsearch.embedding.batches import ClassBalancedBatches
from hqsearch.embedding.losses import (
    masked_l1_distances,
    masked_similarities,
    npairs_loss,
    semihard_triplet_loss,
    squared_distances,
)
from hqsearch.embedding.networks import Dropout, StageNetwork
from hqsearch.embedding.progress import report_epoch

# A batch of this many items keeps activations of a small convolutional network under about 1 GiB.
INFERENCE_BATCH = 2048
BATCH_MULTIPLE = 16


@dataclass(frozen=True)
class StageSettings:
    """How one stage is trained.

    Attributes
    ----------
    loss : {"npairs", "triplet"}
        Name of the loss.
    regularization, margin : float
        Weight of the norm penalty (npairs), hinge margin (triplet).
    epochs : int
        Most epochs to train.
    learning_rate, trunk_learning_rate : float
        Peak rates of the stage's new layer, and of the trunk below it.
    batch_size, classes_per_batch, class_groups_per_step : int
        Shape of a step: items and classes of one group, and groups.
    patience : int or None
        Validations without improvement after which training stops; None never stops early.
    """

    loss: str
    regularization: float
    margin: float
    epochs: int
    learning_rate: float
    trunk_learning_rate: float
    batch_size: int
    classes_per_batch: int
    class_groups_per_step: int = 1
    patience: int | None = None


@dataclass(frozen=True)
class TrainingData:
    """Items on the training device, and which of them are held out.

    Attributes
    ----------
    X : Tensor of shape (n_samples, *input_shape)
        All items.
    y : ndarray of shape (n_samples,), dtype int64
        Class indices.
    train, validation : ndarray of int64
        Positions; `validation` may be empty.
    """

    X: Tensor
    y: np.ndarray
    train: np.ndarray
    validation: np.ndarray


@dataclass(frozen=True)
class CodeProblem:
    """What the hash stage needs to know of codes.

    Attributes
    ----------
    n_levels, branching_factor, sparsity : int
        Shape of a code.
    solve : callable
        Class scores, float32 array of shape (n_groups, n_classes, n_levels, branching_factor), to the best
        codes, bool array of the same shape.
    validate : callable
        Level scores of all items, float32 array of shape (n_samples, n_levels, branching_factor), to a dict
        of figures on the held-out items, of which "criterion" is to be maximised.
    """

    n_levels: int
    branching_factor: int
    sparsity: int
    solve: Callable[[np.ndarray], np.ndarray]
    validate: Callable[[np.ndarray], dict[str, float]]


class _Stage(ABC):
    """Training loop that both stages share: epochs, schedule, validation, best state, early stopping."""

    name: str
    n_warmup_steps = 10

    def __init__(
        self,
        network: StageNetwork,
        data: TrainingData,
        settings: StageSettings,
        *,
        seed: int,
        verbose: int = 0,
    ):
        self.network = network
        self.data = data
        self.settings = settings
        self.seed = seed
        self.verbose = verbose

    def run(self) -> list[dict[str, Any]]:
        """Train `network` in place, leave it at its best epoch and in eval mode; return the history."""
        self._initialize()
        try:
            self._fit_loop()
        except KeyboardInterrupt:
            warnings.warn(
                f"Training of the {self.name} stage was interrupted after {len(self.history)} epochs; "
                "the best epoch so far is kept.",
                UserWarning,
                stacklevel=3,
            )
        if self._best_state is not None:
            self.network.load_state_dict(self._best_state)
        self._lend_generator(None)
        self.network.eval()
        return self.history

    def _initialize(self) -> None:
        settings, data = self.settings, self.data
        self.history: list[dict[str, Any]] = []
        self._best_state: dict[str, Tensor] | None = None
        self._best = -math.inf
        self._batches = ClassBalancedBatches(
            data.y[data.train],
            classes_per_batch=settings.classes_per_batch,
            batch_size=settings.batch_size,
            groups_per_step=settings.class_groups_per_step,
            rng=np.random.default_rng(self.seed),
        )
        self._optimizer = torch.optim.Adam(_parameter_groups(self.network, settings))
        n_steps = max(1, settings.epochs * self._batches.steps_per_epoch)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: _warmup_and_cosine(step, n_steps, self.n_warmup_steps)
        )
        self._lend_generator(torch.Generator(data.X.device).manual_seed(self.seed))

    def _lend_generator(self, generator: torch.Generator | None) -> None:
        for module in self.network.modules():
            if isinstance(module, Dropout):
                module.generator = generator

    def _fit_loop(self) -> None:
        # Validating costs a forward pass over everything, so long runs do it ten times, not every epoch.
        every = max(1, self.settings.epochs // 10)
        validations_without_gain = 0
        for epoch in range(1, self.settings.epochs + 1):
            started = time.perf_counter()
            record: dict[str, Any] = {"stage": self.name, "epoch": epoch, **self._run_epoch()}
            last = epoch == self.settings.epochs
            if len(self.data.validation) and (last or epoch % every == 0):
                self.network.eval()
                record |= self._validate()
                # Of equal epochs the later one has trained longer on the same evidence.
                if record["criterion"] >= self._best:
                    validations_without_gain = 0
                    self._best = record["criterion"]
                    self._best_state = copy.deepcopy(self.network.state_dict())
                else:
                    validations_without_gain += 1
            record["seconds"] = time.perf_counter() - started
            self.history.append(record)
            if self.verbose:
                report_epoch(record, self.settings.epochs)
            if self.settings.patience is not None and validations_without_gain >= self.settings.patience:
                break

    def _run_epoch(self) -> dict[str, float]:
        self.network.train()
        # Summed on the device: reading a loss every step would wait for the device every step.
        total = torch.zeros((), device=self.data.X.device)
        for _ in range(self._batches.steps_per_epoch):
            items, _ = self._batches.draw()
            step = self._train_step(torch.from_numpy(self.data.train[items]).to(total.device))
            total += step["loss"].detach()
        loss = float(total) / self._batches.steps_per_epoch
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss of the {self.name} stage is {loss} in epoch {len(self.history) + 1}; a smaller "
                "learning_rate or scaled input may help."
            )
        return {"loss": loss}

    def _train_step(self, items: Tensor) -> dict[str, Tensor]:
        """One update on `items`, int64 of shape (n_groups, n_classes, items_per_class)."""
        outputs = self.network(self.data.X[items.flatten()])
        loss = self._loss(outputs.unflatten(0, tuple(items.shape))).mean()
        self._backward(loss)
        self._apply()
        return {"loss": loss}

    def _backward(self, loss: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def _apply(self) -> None:
        self._optimizer.step()
        self._schedule.step()

    @abstractmethod
    def _loss(self, outputs: Tensor) -> Tensor:
        """Loss of each group from outputs of shape (n_groups, n_classes, items_per_class, n_outputs)."""

    @abstractmethod
    def _validate(self) -> dict[str, float]:
        """Figures on the held-out items; "criterion" decides which epoch is best."""


class MetricStage(_Stage):
    """First stage: the embedding whose nearest neighbours share a label."""

    name = "metric"

    def _loss(self, outputs: Tensor) -> Tensor:
        n_classes, per_class = outputs.shape[1:3]
        labels = torch.arange(n_classes, device=outputs.device)
        if self.settings.loss == "npairs":
            anchors, positives = _halves(outputs)
            labels = labels.repeat_interleave(per_class // 2)
            same = (labels[:, None] == labels).expand(len(outputs), -1, -1)
            similarities = anchors @ positives.transpose(-2, -1)
            return npairs_loss(similarities, same, anchors, positives, self.settings.regularization)
        labels = labels.repeat_interleave(per_class)
        same = (labels[:, None] == labels).expand(len(outputs), -1, -1)
        unit = nn.functional.normalize(outputs.flatten(1, 2), dim=-1)
        return semihard_triplet_loss(squared_distances(unit), same, self.settings.margin)

    def _validate(self) -> dict[str, float]:
        data = self.data
        embedding = embed(self.network, data.X, self.settings.loss)
        precision = _nearest_precision(
            embedding[data.validation], embedding[data.train], data.y[data.validation], data.y[data.train]
        )
        return {"precision@1": precision, "criterion": precision}


class HashStage(_Stage):
    """Second stage: level scores and codes, trained for each other batch by batch."""

    name = "hash"

    def __init__(
        self,
        network: StageNetwork,
        data: TrainingData,
        settings: StageSettings,
        *,
        problem: CodeProblem,
        seed: int,
        verbose: int = 0,
    ):
        super().__init__(network, data, settings, seed=seed, verbose=verbose)
        self.problem = problem

    def _loss(self, outputs: Tensor) -> Tensor:
        problem = self.problem
        scores = split_levels(outputs, problem.n_levels, problem.branching_factor, self.settings.loss)
        codes = torch.from_numpy(problem.solve(self._class_scores(scores))).to(scores.device)
        return self._masked_loss(scores, codes)

    def _class_scores(self, scores: Tensor) -> np.ndarray:
        """Mean level scores of each class, on the CPU: (n_groups, n_classes, n_levels, d)."""
        return scores.detach().mean(2).cpu().numpy()

    def _masked_loss(self, scores: Tensor, codes: Tensor) -> Tensor:
        """Loss of each group, summed over its levels."""
        losses = [
            self._level_loss(scores[:, :, :, level], codes[:, :, level]) for level in range(scores.shape[3])
        ]
        return torch.stack(losses).sum(0)

    def _level_loss(self, scores: Tensor, codes: Tensor) -> Tensor:
        """Masked loss of one level.

        `scores` is (n_groups, n_classes, items_per_class, d), `codes` bool (n_groups, n_classes, d).
        """
        per_class = scores.shape[2]
        member = codes.to(scores.dtype)
        # Rows of one level have equally many ones, so two are equal when they share them all.
        n_active = member.sum(-1, keepdim=True)
        same = member @ member.transpose(-2, -1) > n_active - 0.5
        if self.settings.loss == "npairs":
            anchors, positives = _halves(scores)
            per_class //= 2
            masks = member.repeat_interleave(per_class, 1)
            similarities = masked_similarities(anchors, positives, masks, masks)
            same = same.repeat_interleave(per_class, 1).repeat_interleave(per_class, 2)
            return npairs_loss(similarities, same, anchors, positives, self.settings.regularization)
        n_each = int(n_active.flatten()[0])
        active = member.topk(n_each, dim=-1).indices.repeat_interleave(per_class, 1)
        distances = masked_l1_distances(scores.flatten(1, 2), active)
        same = same.repeat_interleave(per_class, 1).repeat_interleave(per_class, 2)
        return semihard_triplet_loss(distances, same, self.settings.margin)

    def _validate(self) -> dict[str, float]:
        problem = self.problem
        scores = level_scores(
            self.network, self.data.X, self.settings.loss, problem.n_levels, problem.branching_factor
        )
        return problem.validate(scores)


def split_levels(outputs: Tensor, n_levels: int, branching_factor: int, loss: str) -> Tensor:
    """Level scores, (..., n_levels, d), of network outputs, (..., n_levels * d); unit blocks for triplet."""
    scores = outputs.unflatten(-1, (n_levels, branching_factor))
    return nn.functional.normalize(scores, dim=-1) if loss == "triplet" else scores


def embed(network: StageNetwork, X: Tensor | np.ndarray, loss: str) -> Tensor:
    """Embedding of all items, float32 of shape (n_samples, embedding_dim), unit rows for triplet."""
    outputs = infer(network, X)
    return nn.functional.normalize(outputs, dim=-1) if loss == "triplet" else outputs


def level_scores(
    network: StageNetwork, X: Tensor | np.ndarray, loss: str, n_levels: int, branching_factor: int
) -> np.ndarray:
    """Level scores of all items, float32 array of shape (n_samples, n_levels, branching_factor)."""
    return split_levels(infer(network, X), n_levels, branching_factor, loss).cpu().numpy()


def infer(network: StageNetwork, X: Tensor | np.ndarray) -> Tensor:
    """Run `network`, which must be in eval mode, batch by batch on its device.

    Batches are padded to a multiple of `BATCH_MULTIPLE` items: matrix products of other heights may add up in
    another order, and an item's output should not depend on what it is asked together with.
    """
    device = next(network.parameters()).device
    with torch.inference_mode():
        return torch.cat(
            [
                _padded(network, as_tensor(X[start : start + INFERENCE_BATCH], device))
                for start in range(0, len(X), INFERENCE_BATCH)
            ]
        )


def _padded(network: StageNetwork, x: Tensor) -> Tensor:
    n_missing = -len(x) % BATCH_MULTIPLE
    if n_missing == 0:
        return network(x)
    return network(torch.cat([x, x[:1].expand(n_missing, *x.shape[1:])]))[: len(x)]


def as_tensor(X: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Put X on the device; no copy where it is there already and may be written to."""
    if isinstance(X, np.ndarray):
        X = torch.from_numpy(np.require(X, requirements=["C", "W"]))
    return X.to(device)


@contextmanager
def private_randomness(seed: int) -> Iterator[None]:
    """Let a user's own module draw from torch's global state inside, and put that state back afterwards."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.random.manual_seed(seed)
        yield


def _halves(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """First and second half of each class's items, classes flattened: anchors and positives."""
    anchors, positives = outputs.tensor_split(2, dim=2)
    return anchors.flatten(1, 2), positives.flatten(1, 2)


def _warmup_and_cosine(step: int, n_steps: int, n_warmup_steps: int) -> float:
    """Share of the peak learning rate: a short linear rise, then half a cosine down to zero."""
    warmup = min(1.0, (step + 1) / (n_warmup_steps + 1))
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / n_steps)))


def _parameter_groups(network: StageNetwork, settings: StageSettings) -> list[dict[str, Any]]:
    """Adam's groups: the head's rate and the trunk's; the papers' weight decay by kind of layer."""
    groups: list[dict[str, Any]] = []
    for part, rate in ((network.head, settings.learning_rate), (network.trunk, settings.trunk_learning_rate)):
        for module in part.modules():
            decay = {nn.Linear: 5e-4, nn.Conv2d: 4e-5}.get(type(module), 0.0)
            for name, parameter in module.named_parameters(recurse=False):
                weight_decay = decay if name == "weight" else 0.0
                groups.append({"params": [parameter], "lr": rate, "weight_decay": weight_decay})
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    for group in groups:
        key = (group["lr"], group["weight_decay"])
        merged.setdefault(key, {**group, "params": []})["params"].extend(group["params"])
    return list(merged.values())


def _nearest_precision(queries: Tensor, base: Tensor, query_y: np.ndarray, base_y: np.ndarray) -> float:
    """Share of queries whose nearest base item has their label."""
    nearest = [torch.cdist(chunk, base).argmin(1).cpu().numpy() for chunk in queries.split(1024)]
    return float(np.mean(base_y[np.concatenate(nearest)] == query_y))
