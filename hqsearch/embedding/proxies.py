"""The stages of `loss="proxy"`: every item against all classes, not only against those of its batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hqsearch.embedding.checkpoints import StageState
from hqsearch.embedding.losses import class_cross_entropy, code_cross_entropy
from hqsearch.embedding.settling import SettledHashStage
from hqsearch.embedding.training import MetricStage

# Proxies are few and see one class each, so they move faster than the layers that all items share.
PROXY_RATE_RATIO = 10.0


class ProxyMetricStage(MetricStage):
    """First stage: normalised softmax over the cosines of unit embeddings to one unit proxy for each class.

    Source: A. Zhai and H.-Y. Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019
    (arXiv 1811.12649).
    """

    def _initialize(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (int(self.data.y.max()) + 1, self.network.head.out_features)
        proxies = torch.randn(shape, generator=generator)
        self._proxies = nn.Parameter(proxies.to(self.data.X.device))
        super()._initialize()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        rate = self.settings.learning_rate * PROXY_RATE_RATIO
        return [*super()._parameter_groups(), {"params": [self._proxies], "lr": rate, "weight_decay": 0.0}]

    def _state_to_save(self) -> StageState:
        state = super()._state_to_save()
        state.add("proxies", {"proxies": self._proxies})
        return state

    def _load_state(self, state: StageState) -> None:
        super()._load_state(state)
        with torch.no_grad():
            self._proxies.copy_(state.group("proxies")["proxies"])

    def _loss(self, outputs: Tensor, classes: Tensor) -> Tensor:
        unit = nn.functional.normalize(outputs, dim=-1)
        cosines = unit @ nn.functional.normalize(self._proxies, dim=-1).T
        return class_cross_entropy(self.settings.proxy_scale * cosines, classes)


class ProxyHashStage(SettledHashStage):
    """Second stage: cross-entropy of level scores, which are log-probabilities, to codes that settle."""

    initial_scale = 4.0
    hysteresis = 0.5

    def _loss(self, outputs: Tensor, classes: Tensor) -> Tensor:
        scores = self._split(outputs)
        self._average(scores, classes)
        # To one code, bucket by bucket; and to one class among all by the score of its leaves, so that the
        # levels together tell apart what one of them confuses.
        leaf_scores = scores.flatten(-2) @ self._mean_buckets().flatten(1).T
        return code_cross_entropy(scores, self._codes[classes]) + class_cross_entropy(leaf_scores, classes)

    def _mean_buckets(self) -> Tensor:
        """Weights that turn level scores into the mean score of the leaves of each class's code."""
        return self._codes / self._codes.sum(-1, keepdim=True)
