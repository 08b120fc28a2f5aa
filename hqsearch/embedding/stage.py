"""The training loop that all stages share."""

from __future__ import annotations

import copy
import math
import time
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hqsearch.embedding.automatic import mixed_precision
from hqsearch.embedding.batches import ClassBalancedBatches
from hqsearch.embedding.capture import ArrayFunction, CapturedStep, from_cpu, on_cpu
from hqsearch.embedding.checkpoints import Checkpoint, StageState, fill_network, network_tensors
from hqsearch.embedding.networks import Dropout, StageNetwork
from hqsearch.embedding.progress import report_epoch

# Training items among which held-out ones are searched after an epoch, at most: a forward pass over all of
# many items would take a fifth of the training's time.
MOST_SEARCHED = 16384


@dataclass(frozen=True)
class StageSettings:
    """How one stage is trained.

    Attributes
    ----------
    loss : {"npairs", "triplet", "proxy", "softmax"}
        Name of the loss.
    regularization, margin : float
        Weight of the norm penalty (npairs), hinge margin (triplet).
    proxy_scale : float
        Factor of the cosines to class proxies (proxy).
    code_assignment : {"settled", "batch"}
        Whether the hash stage's codes are those of all classes or of each batch.
    epochs : int
        Most epochs to train.
    learning_rate, trunk_learning_rate : float
        Peak rates of the stage's new layer, and of the trunk below it.
    batch_size, classes_per_batch, class_groups_per_step : int
        Shape of a step: items and classes of one group, and groups.
    patience : int or None
        Validations without improvement after which training stops; None never stops early.
    precision : {"float32", "bfloat16"}
        Of the network's products in training and validation; losses are float32.
    captured : bool
        Whether steps are captured as CUDA graphs, see `CapturedStep`.
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
    proxy_scale: float = 8.0
    code_assignment: str = "batch"
    precision: str = "float32"
    captured: bool = False


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

    @cached_property
    def gallery(self) -> np.ndarray:
        """Positions of the training items that held-out ones are searched among."""
        if len(self.train) <= MOST_SEARCHED:
            return self.train
        # Whatever the seed: stages are compared on the same items.
        return np.sort(np.random.default_rng(0).permutation(self.train)[:MOST_SEARCHED])

    @cached_property
    def searched(self) -> np.ndarray:
        """Positions of the gallery, then of the held-out items: all that a validation looks at."""
        return np.concatenate([self.gallery, self.validation])


class Stage(ABC):
    """Training loop that both stages share: epochs, schedule, validation, kept state, early stopping."""

    name: str
    n_warmup_steps = 10
    # Set before `run` where there is one; not a parameter, so that no subclass has to hand it on.
    checkpoint: Checkpoint | None = None
    _captured: CapturedStep | None = None

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
        """Train `network` in place, leave it at the epoch it keeps and in eval mode; return the history.

        With a checkpoint that an earlier run left, go on from there.
        """
        self._initialize()
        try:
            finished = self._resume_or_fit()
        finally:
            self._lend_generator(None)
            # A captured step holds this stage, and with it all data; gradients would stay as long as the
            # network does.
            self._captured = None
            self._optimizer.zero_grad(set_to_none=True)
        if self._kept_state is not None:
            self.network.load_state_dict(self._kept_state)
        if self.checkpoint is not None and not finished and not self.interrupted:
            self.checkpoint.write(self._finished_state, finished=True)
        self.network.eval()
        return self.history

    def _resume_or_fit(self) -> bool:
        """Train, unless a checkpoint holds the whole stage; return whether it did."""
        if self.checkpoint is not None and self.checkpoint.resume(self._resume):
            return True
        try:
            self._fit_loop()
        except KeyboardInterrupt:
            self.interrupted = True
            warnings.warn(
                f"Training of the {self.name} stage was interrupted after {len(self.history)} epochs; "
                "it keeps one of them, as it would have in the end.",
                UserWarning,
                stacklevel=4,
            )
        return False

    def _initialize(self) -> None:
        settings, data = self.settings, self.data
        self.interrupted = False
        self.history: list[dict[str, Any]] = []
        self._kept_state: dict[str, Tensor] | None = None
        self._best, self._best_error = -math.inf, 0.0
        self._validations_without_gain = 0
        self._batches = ClassBalancedBatches(
            data.y[data.train],
            classes_per_batch=settings.classes_per_batch,
            batch_size=settings.batch_size,
            groups_per_step=settings.class_groups_per_step,
            rng=np.random.default_rng(self.seed),
        )
        self._class_of = torch.from_numpy(data.y).to(data.X.device)
        self._optimizer = make_optimizer(self._parameter_groups(), data.X.device, captured=settings.captured)
        n_steps = max(1, settings.epochs * self._batches.steps_per_epoch)
        # Not `self`: the stage would hold itself, and with it all data, until cycles are looked for.
        n_warmup_steps = self.n_warmup_steps
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: _warmup_and_cosine(step, n_steps, n_warmup_steps)
        )
        self._generator = torch.Generator(data.X.device).manual_seed(self.seed)
        self._lend_generator(self._generator)
        self._captured = (
            CapturedStep(self._train_step, data.X.device, self._generator) if settings.captured else None
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """List what the optimiser trains, with rates and weight decay."""
        return network_parameter_groups(self.network, self.settings)

    def _lend_generator(self, generator: torch.Generator | None) -> None:
        for module in self.network.modules():
            if isinstance(module, Dropout):
                module.generator = generator

    def _fit_loop(self) -> None:
        # Validating costs a forward pass over many items, so long runs do it ten to twenty times.
        every = max(1, self.settings.epochs // 10)
        for epoch in range(len(self.history) + 1, self.settings.epochs + 1):
            started = time.perf_counter()
            record: dict[str, Any] = {"stage": self.name, "epoch": epoch, **self._run_epoch()}
            last = epoch == self.settings.epochs
            if len(self.data.validation) and (last or epoch % every == 0):
                self.network.eval()
                # In the precision of the training, which is faster; a fitted encoder computes in float32, so
                # these figures are not to the last digit its own.
                with mixed_precision(self.settings.precision, self.data.X.device):
                    record |= self._validate()
                self._compare(record["criterion"], record["standard_error"])
            record["seconds"] = time.perf_counter() - started
            self.history.append(record)
            if self.verbose:
                report_epoch(record, self.settings.epochs)
            patience = self.settings.patience
            if patience is not None and self._validations_without_gain >= patience:
                break
            if self.checkpoint is not None and not last:
                self.checkpoint.write(self._state_to_save)

    def _compare(self, criterion: float, error: float) -> None:
        """Keep this epoch's network, unless an earlier one was better by more than chance.

        Of epochs within a standard error of the best the last one has trained longest, at the lowest rate.
        """
        self._validations_without_gain = 0 if criterion > self._best else self._validations_without_gain + 1
        if criterion >= self._best:
            self._best, self._best_error = criterion, error
        if criterion >= self._best - self._best_error:
            self._kept_state = copy.deepcopy(self.network.state_dict())

    def _state_to_save(self) -> StageState:
        """All that the epochs to come depend on.

        A stage that learns more than its network overrides this and `_load_state`, and calls both here.
        """
        state = StageState()
        state.add("network", network_tensors(self.network))
        state.add("kept", self._kept_state or {})
        # Adam's averages and count of each parameter.
        for i, averages in self._optimizer.state_dict()["state"].items():
            state.add(f"optimizer/{i}", averages)
        state.add("generator", {"state": self._generator.get_state()})
        arrays, generator = self._batches.get_state()
        state.add("batches", arrays)
        state.values = {
            "history": self.history,
            "best": self._best,
            "best_error": self._best_error,
            "validations_without_gain": self._validations_without_gain,
            "rates": [float(group["lr"]) for group in self._optimizer.param_groups],
            "schedule": {k: v for k, v in self._schedule.state_dict().items() if k != "_last_lr"},
            "batches": generator,
        }
        return state

    def _load_state(self, state: StageState) -> None:
        """Put all that `_state_to_save` gave where `_initialize` put the beginning."""
        values = state.values
        fill_network(self.network, state.group("network"))
        self._kept_state = state.group("kept") or None
        optimizer = self._optimizer.state_dict()
        optimizer["state"] = {
            i: averages
            for i in range(sum(len(group["params"]) for group in optimizer["param_groups"]))
            if (averages := state.group(f"optimizer/{i}"))
        }
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for i, averages in optimizer["state"].items():
            # In the order in memory of their parameter, which the fused Adam asks for.
            for name, value in averages.items():
                if value.shape == parameters[i].shape:
                    averages[name] = torch.empty_like(parameters[i], device=value.device).copy_(value)
        for group, rate in zip(optimizer["param_groups"], values["rates"], strict=True):
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
        self._optimizer.load_state_dict(optimizer)
        self._schedule.load_state_dict(values["schedule"])
        self._generator.set_state(state.group("generator")["state"])
        arrays = {name: value.numpy() for name, value in state.group("batches").items()}
        self._batches.set_state(arrays, values["batches"])
        self.history = values["history"]
        self._best, self._best_error = values["best"], values["best_error"]
        self._validations_without_gain = values["validations_without_gain"]

    def _finished_state(self) -> StageState:
        """Keep what is left of a stage at its end: the network and its history."""
        state = StageState(values={"history": self.history})
        state.add("network", network_tensors(self.network))
        return state

    def _resume(self, state: StageState, finished: bool) -> None:
        if finished:
            fill_network(self.network, state.group("network"))
            self.history = state.values["history"]
        else:
            self._load_state(state)

    def _run_epoch(self) -> dict[str, float]:
        self.network.train()
        # Summed on the device: reading a loss every step would wait for the device every step.
        total = torch.zeros((), device=self.data.X.device)
        for _ in range(self._batches.steps_per_epoch):
            items, _ = self._batches.draw()
            step = self._update(from_cpu(self.data.train[items], self.data.X.device))
            total += step["loss"]
            self._schedule.step()
        loss = float(total) / self._batches.steps_per_epoch
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss of the {self.name} stage is {loss} in epoch {len(self.history) + 1}; a smaller "
                "learning_rate or scaled input may help."
            )
        return {"loss": loss}

    def _update(self, items: Tensor) -> dict[str, Tensor]:
        """One training step, captured where it can be."""
        return (self._captured or self._train_step)(items)

    def _on_cpu(self, function: ArrayFunction, values: Tensor) -> Tensor:
        """Give what a function on the CPU makes of values, in the middle of a step, on the device."""
        if self._captured is not None:
            return self._captured.on_cpu(function, values)
        return on_cpu(function, values, self.data.X.device)

    def _train_step(self, items: Tensor) -> dict[str, Tensor]:
        """One update on `items`, int64 of shape (n_groups, n_classes, items_per_class)."""
        X = self.data.X[items.flatten()]
        with mixed_precision(self.settings.precision, X.device):
            outputs = self.network(X)
        classes = self._class_of[items[:, :, 0]]
        loss = self._loss(outputs.float().unflatten(0, tuple(items.shape)), classes).mean()
        self._backward(loss)
        self._apply()
        return {"loss": loss.detach()}

    def _backward(self, loss: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def _apply(self) -> None:
        self._optimizer.step()

    @abstractmethod
    def _loss(self, outputs: Tensor, classes: Tensor) -> Tensor:
        """Loss of each group.

        `outputs` is (n_groups, n_classes, items_per_class, n_outputs), `classes` int64 (n_groups, n_classes):
        which classes a group holds, for losses that ask for more than which items share one.
        """

    @abstractmethod
    def _validate(self) -> dict[str, float]:
        """Figures on the held-out items, among them "criterion" and its "standard_error".

        The last epoch whose criterion is within the best one's standard error of it is kept.
        """


def standard_error(share: float, n_items: int) -> float:
    """Return the standard error of a share of so many items."""
    return math.sqrt(share * (1 - share) / n_items)


def _warmup_and_cosine(step: int, n_steps: int, n_warmup_steps: int) -> float:
    """Share of the peak learning rate: a short linear rise, then half a cosine down to zero."""
    warmup = min(1.0, (step + 1) / (n_warmup_steps + 1))
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / n_steps)))


def make_optimizer(
    groups: list[dict[str, Any]], device: torch.device, *, captured: bool
) -> torch.optim.Optimizer:
    """Make Adam for parameter groups; for steps that are captured in a form that a graph can hold."""
    if not captured:
        return torch.optim.Adam(groups)
    for group in groups:
        # A number would be captured as it is; a tensor is read at every replay. The schedule computes with
        # the number, and fills the tensor.
        group["initial_lr"] = group["lr"]
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
    return torch.optim.Adam(groups, fused=True, capturable=True)


_WEIGHT_DECAY: dict[type, float] = {nn.Linear: 5e-4, nn.Conv2d: 4e-5}


def network_parameter_groups(network: StageNetwork, settings: StageSettings) -> list[dict[str, Any]]:
    """Adam's groups: the head's rate and the trunk's; the papers' weight decay by kind of layer."""
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    seen: set[int] = set()
    for part, rate in ((network.head, settings.learning_rate), (network.trunk, settings.trunk_learning_rate)):
        for module in part.modules():
            decay = next((d for kind, d in _WEIGHT_DECAY.items() if isinstance(module, kind)), 0.0)
            for name, parameter in module.named_parameters(recurse=False):
                # Modules that share a parameter count once, or Adam would step it twice.
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                weight_decay = decay if name == "weight" else 0.0
                group = {"params": [], "lr": rate, "weight_decay": weight_decay}
                merged.setdefault((rate, weight_decay), group)["params"].append(parameter)
    return list(merged.values())
