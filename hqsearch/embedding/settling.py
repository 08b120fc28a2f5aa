"""Codes that settle: solved over all classes, from their running scores, once an epoch until half way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hqsearch.embedding.checkpoints import StageState
from hqsearch.embedding.inference import inference_batch
from hqsearch.embedding.training import HashStage

# What a step leaves of the running averages of a class that it shows.
AVERAGE_KEPT = 0.9
# Half of the training is for learning codes that do not move any more.
SETTLED_AFTER = 0.5
# Deviation of the noise in the initial weights of the linear layer.
_INITIAL_NOISE = 0.3


class SettledHashStage(HashStage):
    """Second stage whose codes are those of all classes, instead of those of a batch alone.

    The class scores are running averages, so the penalties see every class and not only those of a batch.
    They start from the class means below the linear layer, and codes settle: they are solved anew once an
    epoch in the first part of the training and then stay.

    Attributes
    ----------
    initial_scale : float
        Deviation of the initial level scores.
    hysteresis : float
        By how much other buckets must be better than those that a class has, before it leaves them.
    """

    initial_scale = 0.3
    hysteresis = 0.0
    _averages: Tensor
    _codes: Tensor

    def _fit_loop(self) -> None:
        # Here, where Ctrl-C is minded, and not for a stage that goes on from a checkpoint.
        if not self.history and self.settings.epochs:
            self._start_codes()
        super()._fit_loop()

    def _start_codes(self) -> None:
        """Start head, class scores and codes from the class means."""
        means, spread = self._class_means()
        self._start_head(means, spread)
        with torch.no_grad():
            self._start_classes(self.network.head(means))

    def _start_classes(self, outputs: Tensor) -> None:
        """Start what belongs to classes from the outputs for their means, (n_classes, n_outputs)."""
        self._averages = self._split(outputs).contiguous()
        self._codes = self._solve(self._averages)

    def _state_to_save(self) -> StageState:
        state = super()._state_to_save()
        state.add("classes", {"averages": self._averages, "codes": self._codes})
        return state

    def _load_state(self, state: StageState) -> None:
        super()._load_state(state)
        classes = state.group("classes")
        self._averages, self._codes = (classes[name].to(self.data.X.device) for name in ("averages", "codes"))

    @torch.no_grad()
    def _class_means(self) -> tuple[Tensor, Tensor]:
        """Mean of each class below the linear layer, (n_classes, n_hidden), and the items' spread there."""
        network, data = self.network.eval(), self.data
        n_classes = int(data.y.max()) + 1
        train = torch.from_numpy(data.train).to(data.X.device)
        total = torch.zeros(n_classes, network.head.in_features, device=data.X.device)
        squares = torch.zeros((), device=data.X.device)
        for positions in train.split(inference_batch(data.X, data.X.device)):
            hidden = network.hidden(data.X[positions])
            total.index_add_(0, self._class_of[positions], hidden)
            squares += hidden.square().sum()
        counts = torch.bincount(self._class_of[train], minlength=n_classes)
        centre = total.sum(0) / len(train)
        spread = (squares / len(train) - centre.square().sum()).clamp_min(1e-12).sqrt()
        return total / counts[:, None], spread

    @torch.no_grad()
    def _start_head(self, means: Tensor, spread: Tensor) -> None:
        """Let every bucket start near some class's mean, each level in an order of its own.

        Where there are more classes than buckets, some have none of their own: they go where the first codes
        send them.
        """
        n_classes, n_hidden = means.shape
        d = self.problem.branching_factor
        generator = torch.Generator().manual_seed(self.seed)
        centre = means.mean(0)
        directions = nn.functional.normalize(means - centre, dim=-1, eps=1e-6)
        head = self.network.head
        for level in range(self.problem.n_levels):
            order = torch.randperm(n_classes, generator=generator)[torch.arange(d) % n_classes]
            noise = torch.randn(d, n_hidden, generator=generator) * (_INITIAL_NOISE / n_hidden**0.5)
            weight = (directions[order.to(means.device)] + noise.to(means.device)) * (
                self.initial_scale / spread
            )
            rows = slice(self.embedding_dim + level * d, self.embedding_dim + (level + 1) * d)
            head.weight[rows] = weight
            head.bias[rows] = -weight @ centre

    def _solve(self, averages: Tensor) -> Tensor:
        """Best codes of all classes, 0 or 1 of the scores' dtype: (n_classes, n_levels, d)."""
        codes = self.problem.solve(averages[None].cpu().numpy())[0]
        return torch.from_numpy(codes).to(averages)

    def _run_epoch(self) -> dict[str, float]:
        if 0 < len(self.history) < SETTLED_AFTER * self.settings.epochs:
            self._solve_again()
        return super()._run_epoch()

    def _solve_again(self) -> None:
        # In place: a captured step reads them where they are.
        self._codes.copy_(self._solve(self._averages + self.hysteresis * self._codes))

    def _code_loss(self, scores: Tensor, classes: Tensor) -> Tensor:
        self._average(scores, classes)
        return self._masked_loss(scores, self._codes[classes])

    def _average(self, scores: Tensor, classes: Tensor) -> None:
        """Move the running averages of the classes that a step shows."""
        # Group by group: one class may be in several of them, and within a group no class comes twice.
        for seen, rows in zip(scores.detach().mean(2), classes, strict=True):
            self._averages[rows] = self._averages[rows].lerp(seen, 1 - AVERAGE_KEPT)
