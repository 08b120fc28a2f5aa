"""The two training stages: first the metric embedding, then the level scores behind the codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hqsearch.embedding.inference import as_embedding, embed, infer, split_levels
from hqsearch.embedding.losses import (
    masked_l1_distances,
    masked_similarities,
    npairs_loss,
    semihard_triplet_loss,
    squared_distances,
)
from hqsearch.embedding.networks import StageNetwork
from hqsearch.embedding.stage import Stage, StageSettings, TrainingData, standard_error


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
        Positions of a gallery, positions of held-out items, level scores of the former and then the latter,
        float32 array of shape (n_gallery + n_held_out, n_levels, branching_factor), and their embedding where
        this stage trains that too, else None, to a dict of figures on the held-out items, of which
        "criterion" is to be maximised and has "standard_error".
    """

    n_levels: int
    branching_factor: int
    sparsity: int
    solve: Callable[[np.ndarray], np.ndarray]
    validate: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None], dict[str, float]]


class MetricStage(Stage):
    """First stage: the embedding whose nearest neighbours share a label."""

    name = "metric"

    def _loss(self, outputs: Tensor, classes: Tensor) -> Tensor:
        return metric_loss(outputs, self.settings)

    def _validate(self) -> dict[str, float]:
        data = self.data
        embedding = embed(self.network, data.X, self.settings.loss, data.searched)
        base, queries = embedding.tensor_split([len(data.gallery)])
        precision = _nearest_precision(queries, base, data.y[data.validation], data.y[data.gallery])
        error = standard_error(precision, len(data.validation))
        return {"precision@1": precision, "criterion": precision, "standard_error": error}


def metric_loss(outputs: Tensor, settings: StageSettings) -> Tensor:
    """Loss, npairs or triplet, of the embeddings of each group, (n_groups, n_classes, items_per_class, m)."""
    n_classes, per_class = outputs.shape[1:3]
    labels = torch.arange(n_classes, device=outputs.device)
    if settings.loss == "npairs":
        anchors, positives = _halves(outputs)
        labels = labels.repeat_interleave(per_class // 2)
        same = (labels[:, None] == labels).expand(len(outputs), -1, -1)
        similarities = anchors @ positives.transpose(-2, -1)
        return npairs_loss(similarities, same, anchors, positives, settings.regularization)
    labels = labels.repeat_interleave(per_class)
    same = (labels[:, None] == labels).expand(len(outputs), -1, -1)
    unit = nn.functional.normalize(outputs.flatten(1, 2), dim=-1)
    return semihard_triplet_loss(squared_distances(unit), same, settings.margin)


class HashStage(Stage):
    """Second stage: level scores and codes, trained for each other batch by batch.

    Parameters
    ----------
    network, data, settings, seed, verbose
        As in `Stage`.
    problem : CodeProblem
        How codes are solved and validated.
    metric : StageSettings or None, default=None
        Of the metric stage, if the embedding is trained along: then the network's outputs are the embedding,
        followed by the level scores, and the losses of both add up.
    """

    name = "hash"

    def __init__(
        self,
        network: StageNetwork,
        data: TrainingData,
        settings: StageSettings,
        *,
        problem: CodeProblem,
        metric: StageSettings | None = None,
        seed: int,
        verbose: int = 0,
    ):
        super().__init__(network, data, settings, seed=seed, verbose=verbose)
        self.problem = problem
        self.metric = metric
        self.embedding_dim = network.head.out_features - problem.n_levels * problem.branching_factor

    def _loss(self, outputs: Tensor, classes: Tensor) -> Tensor:
        loss = self._code_loss(self._split(outputs), classes)
        if self.metric is not None:
            loss = loss + self._metric_loss(outputs[..., : self.embedding_dim], classes, self.metric)
        return loss

    def _split(self, outputs: Tensor) -> Tensor:
        """Level scores, (..., n_levels, d), among the network's outputs."""
        problem = self.problem
        outputs = outputs[..., self.embedding_dim :]
        return split_levels(outputs, problem.n_levels, problem.branching_factor, self.settings.loss)

    def _metric_loss(self, embedding: Tensor, classes: Tensor, settings: StageSettings) -> Tensor:
        """Loss of the embedding that is trained along, for each group."""
        return metric_loss(embedding, settings)

    def _code_loss(self, scores: Tensor, classes: Tensor) -> Tensor:
        """Loss of the level scores, (n_groups, n_classes, items_per_class, n_levels, d), for each group."""
        # Of the class scores, (n_groups, n_classes, n_levels, d).
        codes = self._on_cpu(self.problem.solve, scores.detach().mean(2))
        return self._masked_loss(scores, codes)

    def _masked_loss(self, scores: Tensor, codes: Tensor) -> Tensor:
        """Loss of each group, summed over its levels."""
        n_levels = scores.shape[3]
        losses = [
            self._level_loss(
                scores[:, :, :, level],
                codes[:, :, level],
                self.problem.sparsity if level == n_levels - 1 else 1,
            )
            for level in range(n_levels)
        ]
        return torch.stack(losses).sum(0)

    def _level_loss(self, scores: Tensor, codes: Tensor, n_active: int) -> Tensor:
        """Masked loss of one level.

        `scores` is (n_groups, n_classes, items_per_class, d), `codes` bool (n_groups, n_classes, d) with
        `n_active` ones in each row.
        """
        n_classes, per_class = scores.shape[1:3]
        member = codes.to(scores.dtype)
        if self.problem.n_levels == 1:
            # Codes of one level are trained with the labels themselves (ICML 2018).
            same = torch.eye(n_classes, dtype=torch.bool, device=codes.device).expand(len(codes), -1, -1)
        else:
            # Two rows are equal when they share all their ones.
            same = member @ member.transpose(-2, -1) > n_active - 0.5
        if self.settings.loss == "npairs":
            anchors, positives = _halves(scores)
            per_class //= 2
            masks = member.repeat_interleave(per_class, 1)
            similarities = masked_similarities(anchors, positives, masks, masks)
            same = same.repeat_interleave(per_class, 1).repeat_interleave(per_class, 2)
            return npairs_loss(similarities, same, anchors, positives, self.settings.regularization)
        active = member.topk(n_active, dim=-1).indices.repeat_interleave(per_class, 1)
        distances = masked_l1_distances(scores.flatten(1, 2), active)
        same = same.repeat_interleave(per_class, 1).repeat_interleave(per_class, 2)
        return semihard_triplet_loss(distances, same, self.settings.margin)

    def _validate(self) -> dict[str, float]:
        data = self.data
        outputs = infer(self.network, data.X, data.searched)
        embedding = None
        if self.metric is not None:
            embedding = as_embedding(outputs[:, : self.embedding_dim], self.metric.loss).cpu().numpy()
        level_scores = self._split(outputs).cpu().numpy()
        return self.problem.validate(data.gallery, data.validation, level_scores, embedding)


def _halves(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """First and second half of each class's items, classes flattened: anchors and positives."""
    anchors, positives = outputs.tensor_split(2, dim=2)
    return anchors.flatten(1, 2), positives.flatten(1, 2)


def _nearest_precision(queries: Tensor, base: Tensor, query_y: np.ndarray, base_y: np.ndarray) -> float:
    """Share of queries whose nearest base item has their label."""
    nearest = [torch.cdist(chunk, base).argmin(1).cpu().numpy() for chunk in queries.split(1024)]
    return float(np.mean(base_y[np.concatenate(nearest)] == query_y))
