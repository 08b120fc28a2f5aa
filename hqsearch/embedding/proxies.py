"""The stages of `loss="proxy"`: every item against all classes, not only against those of its batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hqsearch.embedding.checkpoints import StageState
from hqsearch.embedding.losses import class_cross_entropy, code_cross_entropy
from hqsearch.embedding.settling import SettledHashStage
from hqsearch.embedding.stage import Stage, StageSettings
from hqsearch.embedding.training import MetricStage

# Proxies are few and see one class each, so they move faster than the layers that all items share.
PROXY_RATE_RATIO = 10.0


class WithProxies(Stage):
    """A stage that trains one proxy for each class, `_proxies`, or none where that is None."""

    _proxies: nn.Parameter | None

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups = super()._parameter_groups()
        if self._proxies is not None:
            rate = self.settings.learning_rate * PROXY_RATE_RATIO
            groups.append({"params": [self._proxies], "lr": rate, "weight_decay": 0.0})
        return groups

    def _state_to_save(self) -> StageState:
        state = super()._state_to_save()
        if self._proxies is not None:
            state.add("proxies", {"proxies": self._proxies})
        return state

    def _load_state(self, state: StageState) -> None:
        super()._load_state(state)
        if self._proxies is not None:
            with torch.no_grad():
                self._proxies.copy_(state.group("proxies")["proxies"])


class ProxyMetricStage(WithProxies, MetricStage):
    """First stage: normalised softmax over the cosines of unit embeddings to one unit proxy for each class.

    Source: A. Zhai and H.-Y. Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019
    (arXiv 1811.12649).
    """

    def _initialize(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (int(self.data.y.max()) + 1, self.network.head.out_features)
        self._proxies = nn.Parameter(torch.randn(shape, generator=generator).to(self.data.X.device))
        super()._initialize()

    def _loss(self, outputs: Tensor, classes: Tensor) -> Tensor:
        assert self._proxies is not None
        return proxy_loss(outputs, self._proxies, classes, self.settings)


def proxy_loss(outputs: Tensor, proxies: Tensor, classes: Tensor, settings: StageSettings) -> Tensor:
    """Normalised softmax of the embeddings of each group, (n_groups, n_classes, items_per_class, m)."""
    unit = nn.functional.normalize(outputs, dim=-1)
    cosines = unit @ nn.functional.normalize(proxies, dim=-1).T
    return class_cross_entropy(settings.proxy_scale * cosines, classes)


class ProxyHashStage(WithProxies, SettledHashStage):
    """Second stage: cross-entropy of level scores, which are log-probabilities, to codes that settle.

    An embedding that is trained along starts with proxies at the class means.
    """

    initial_scale = 4.0
    hysteresis = 0.5

    def _initialize(self) -> None:
        self._proxies = None
        if self.metric is not None:
            shape = (int(self.data.y.max()) + 1, self.embedding_dim)
            self._proxies = nn.Parameter(torch.zeros(shape, device=self.data.X.device))
        super()._initialize()

    def _start_classes(self, outputs: Tensor) -> None:
        super()._start_classes(outputs)
        if self._proxies is not None:
            # As long as those that a metric stage draws, so that they turn as fast.
            means = nn.functional.normalize(outputs[:, : self.embedding_dim], dim=-1)
            self._proxies.copy_(means * self.embedding_dim**0.5)

    def _metric_loss(self, embedding: Tensor, classes: Tensor, settings: StageSettings) -> Tensor:
        assert self._proxies is not None
        return proxy_loss(embedding, self._proxies, classes, settings)

    def _code_loss(self, scores: Tensor, classes: Tensor) -> Tensor:
        self._average(scores, classes)
        # To one code, bucket by bucket; and to one class among all by the score of its leaves, so that the
        # levels together tell apart what one of them confuses.
        leaf_scores = scores.flatten(-2) @ self._mean_buckets().flatten(1).T
        return code_cross_entropy(scores, self._codes[classes]) + class_cross_entropy(leaf_scores, classes)

    def _mean_buckets(self) -> Tensor:
        """Weights that turn level scores into the mean score of the leaves of each class's code."""
        return self._codes / self._codes.sum(-1, keepdim=True)
