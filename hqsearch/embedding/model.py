"""The trained networks behind an encoder: X to embedding, X to level scores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hqsearch.embedding.checkpoints import Checkpoint
from hqsearch.embedding.first_stage import fit_first_stage
from hqsearch.embedding.inference import (
    UNIT_LOSSES,
    as_embedding,
    as_tensor,
    embed,
    infer,
    level_scores,
    split_levels,
)
from hqsearch.embedding.networks import (
    EmbeddingNetwork,
    StageNetwork,
    Standardize,
    initial_trunk,
    joined_heads,
    new_head,
    parted_heads,
)
from hqsearch.embedding.projection import with_hidden_layer
from hqsearch.embedding.proxies import ProxyHashStage, ProxyMetricStage
from hqsearch.embedding.randomness import randomness_of
from hqsearch.embedding.settling import SettledHashStage
from hqsearch.embedding.stage import StageSettings, TrainingData
from hqsearch.embedding.training import CodeProblem, HashStage, MetricStage

# The papers' deviation of the new layer's initial weights in the hash stage.
HASH_HEAD_STD = 0.01


def resolve_device(device: str) -> torch.device:
    """Turn a `device` parameter into a torch device that exists.

    Parameters
    ----------
    device : str
        "auto" (CUDA where there is one, else the CPU) or a torch device name.

    Returns
    -------
    torch.device

    Raises
    ------
    ValueError
        If the name is unknown or the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"Expected device to be 'auto', 'cpu' or 'cuda', got {device!r}.") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"Expected device={device!r} to exist, but torch finds {torch.cuda.device_count()} CUDA devices; "
            "device='auto' takes what there is."
        )
    try:
        # Other kinds of device tell only by trying whether they are there and hold values.
        torch.zeros(1, device=resolved).item()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"Expected device={device!r} to exist and to compute, but {error}") from error
    return resolved


def available_device(device: str) -> torch.device:
    """Resolve a device, or take what there is where it does not exist."""
    try:
        return resolve_device(device)
    except ValueError:
        return resolve_device("auto")


class _TwoHeads(StageNetwork):
    """Layers that two networks share, and what either makes of them side by side."""

    def __init__(self, network: StageNetwork, other: nn.Module):
        super().__init__(network.standardize, network.trunk, network.head)
        self.first = network
        self.other = other

    def output(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.first.output(hidden), self.other(hidden)], dim=1)


class EmbeddingModel:
    """Both stages' networks, from training to inference.

    Parameters
    ----------
    loss : {"npairs", "triplet", "proxy"}
        Triplet models give unit-length embeddings and level scores, proxy models unit-length embeddings and
        log-probabilities.
    n_levels, branching_factor : int
        Shape of the level scores.
    device : str
        "auto" or a torch device name; where networks are trained and run.
    """

    def __init__(self, *, loss: str, n_levels: int, branching_factor: int, device: str = "auto"):
        self.loss = loss
        self.n_levels = n_levels
        self.branching_factor = branching_factor
        self.device = device
        self._network: str | nn.Module | Callable = "auto"
        self.shared_trunk = False
        self.metric_network: StageNetwork | None = None
        self.hash_network: StageNetwork | None = None

    def fit_metric(
        self,
        X: np.ndarray,
        y: np.ndarray,
        train: np.ndarray,
        validation: np.ndarray,
        *,
        network: str | nn.Module | Callable,
        embedding_dim: int,
        settings: StageSettings,
        seed: int,
        memory: Any,
        verbose: int = 0,
        checkpoint: Checkpoint | None = None,
    ) -> tuple[list[dict[str, Any]], bool]:
        """Train the embedding; with a joblib.Memory, only where it was not trained before.

        Parameters
        ----------
        X : ndarray of shape (n_samples, *input_shape)
            All items.
        y : ndarray of shape (n_samples,), dtype int64
            Class indices.
        train, validation : ndarray of int64
            Positions to train on and to hold out.
        network : str, nn.Module or callable
            The trunk, see `build_trunk`.
        embedding_dim : int
            Length of an embedding vector.
        settings : StageSettings
            How to train.
        seed : int
            Of everything random in this stage.
        memory : joblib.Memory
            Cache of trained weights.
        verbose : int, default=0
            0 prints nothing, 1 a line an epoch.
        checkpoint : Checkpoint or None, default=None
            Where the stage goes on from, and leaves how far it came.

        Returns
        -------
        history : list of dict
            One record an epoch.
        interrupted : bool
            Whether the user stopped it before its end.
        """
        self._network = network
        self.metric_network, history, interrupted = fit_first_stage(
            ProxyMetricStage if self.loss == "proxy" else MetricStage,
            X,
            y,
            train,
            validation,
            network=network,
            n_outputs=embedding_dim,
            settings=settings,
            seed=seed,
            device=resolve_device(self.device),
            memory=memory,
            verbose=verbose,
            checkpoint=checkpoint,
        )
        return history, interrupted

    def fit_hash(
        self,
        X: np.ndarray,
        y: np.ndarray,
        train: np.ndarray,
        validation: np.ndarray,
        *,
        settings: StageSettings,
        seed: int,
        problem: CodeProblem,
        new_trunk: bool = False,
        hidden: Tensor | None = None,
        metric: StageSettings | None = None,
        verbose: int = 0,
        checkpoint: Checkpoint | None = None,
    ) -> list[dict[str, Any]]:
        """Train the level scores, starting from the metric stage's trunk, or with `new_trunk` from a new one.

        Parameters are those of `fit_metric`; `problem` tells how codes are solved and validated. With
        `metric`, the metric stage's settings, its embedding is trained along, and both share the trunk; with
        `hidden`, the metric stage's hidden layer of X (`embed_with_hidden_layer`), they share it as it is,
        and a linear layer is all that is trained.

        Returns
        -------
        list of dict
            One record an epoch.
        """
        assert self.metric_network is not None
        frozen = hidden is not None
        device = resolve_device(self.device)
        generator = torch.Generator().manual_seed(seed)
        if new_trunk:
            standardize = copy.deepcopy(self.metric_network.standardize).cpu()
            trunk, width = initial_trunk(X, standardize, self._network, seed, generator)
        else:
            trunk = self.metric_network.trunk if frozen else copy.deepcopy(self.metric_network.trunk)
            width = self.metric_network.head.in_features
        head = new_head(
            width,
            self.n_levels * self.branching_factor,
            generator,
            std=HASH_HEAD_STD,
        )
        standardize = self.metric_network.standardize
        if hidden is not None:
            items = hidden
            # Above what is scaled and rectified already.
            network = StageNetwork(Standardize(np.zeros(1), np.ones(1)), nn.Identity(), head).to(device)
            # One small product has nothing to gain from another.
            settings = replace(settings, precision="float32")
        else:
            items = as_tensor(X, device)
            if metric is not None:
                head = joined_heads(self.metric_network.head, head)
            network = StageNetwork(standardize, trunk, head).to(device)
        data = TrainingData(items, y, train, validation)
        with randomness_of(self._network, seed):
            kind = SettledHashStage if settings.code_assignment == "settled" else HashStage
            kind = ProxyHashStage if self.loss == "proxy" else kind
            stage = kind(network, data, settings, problem=problem, metric=metric, seed=seed, verbose=verbose)
            stage.checkpoint = checkpoint
            history = stage.run()
        self.shared_trunk = frozen or metric is not None
        self.hash_network = network
        if frozen:
            self.hash_network = StageNetwork(standardize, trunk, network.head).eval()
        elif metric is not None:
            self.metric_network, self.hash_network = (
                StageNetwork(standardize, trunk, part).eval()
                for part in parted_heads(network.head, self.metric_network.head.out_features)
            )
        return history

    def join_hidden_layer(self, X: np.ndarray, train: np.ndarray, *, weight: float, seed: int) -> None:
        """Join the embedding with the hidden layer, see `with_hidden_layer`, unless `weight` is 0.

        Parameters
        ----------
        X : ndarray of shape (n_samples, *input_shape)
            All items.
        train : ndarray of int64
            Positions of those that it was trained on.
        weight : float
            Of the hidden layer beside the trained embedding.
        seed : int
            Of everything random in it.
        """
        assert self.metric_network is not None
        if weight:
            unit = self.loss in UNIT_LOSSES
            self.metric_network = with_hidden_layer(
                self.metric_network, X, train, weight=weight, unit=unit, seed=seed
            )

    def gallery_axes(self, X: np.ndarray, weight: float) -> np.ndarray:
        """Projection of both layers, see `with_hidden_layer`, by the principal axes of items to be searched.

        Parameters
        ----------
        X : ndarray of shape (n_samples, *input_shape)
            The items.
        weight : float
            Of the hidden layer beside the trained embedding.

        Returns
        -------
        ndarray of shape (embedding_dim + n_hidden, embedding_dim), dtype float32
        """
        assert self.metric_network is not None
        # Always the same seed: an index of the same items should be the same.
        network = with_hidden_layer(
            self.metric_network,
            X,
            np.arange(len(X)),
            weight=weight,
            unit=self.loss in UNIT_LOSSES,
            seed=0,
        )
        return network.axes.cpu().numpy()

    def _embedding_network(self, axes: np.ndarray | None) -> StageNetwork:
        network = self.metric_network
        assert network is not None
        if axes is None:
            return network
        expected = (network.head.out_features + network.head.in_features, network.head.out_features)
        if axes.shape != expected:
            raise ValueError(
                f"Expected a gallery of this encoder, axes of shape {expected}, got {axes.shape}."
            )
        return EmbeddingNetwork(
            network.standardize,
            network.trunk,
            network.head,
            torch.tensor(axes, device=network.head.weight.device),
            unit=self.loss in UNIT_LOSSES,
        ).eval()

    def embed(self, X: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
        """Embedding of X, float32 of shape (n_samples, embedding_dim), by other axes where they are given."""
        return embed(self._embedding_network(axes), X, self.loss).cpu().numpy()

    def embed_with_hidden_layer(self, X: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """`embed` of X, and the layer below, float32 (n_samples, n_hidden) on the device, in one pass."""
        network = self.metric_network
        assert network is not None
        outputs = infer(_TwoHeads(network, nn.Identity()).eval(), X)
        embedding, hidden = outputs.tensor_split([network.head.out_features], dim=1)
        # A copy, as what inference makes cannot be trained on.
        return as_embedding(embedding, self.loss).cpu().numpy(), hidden.clone()

    def level_scores(self, X: np.ndarray) -> np.ndarray:
        """Level scores of X, float32 of shape (n_samples, n_levels, branching_factor)."""
        assert self.hash_network is not None
        return level_scores(self.hash_network, X, self.loss, self.n_levels, self.branching_factor)

    def describe(self, X: np.ndarray, axes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`embed` and `level_scores` of X, from one pass where the trunk is shared."""
        if not self.shared_trunk:
            return self.embed(X, axes), self.level_scores(X)
        assert self.hash_network is not None
        network = self._embedding_network(axes)
        outputs = infer(_TwoHeads(network, self.hash_network.head), X)
        embedding, scores = outputs.tensor_split([network.head.out_features], dim=1)
        scores = split_levels(scores, self.n_levels, self.branching_factor, self.loss)
        return as_embedding(embedding, self.loss).cpu().numpy(), scores.cpu().numpy()

    def __getstate__(self) -> dict[str, Any]:
        # Pickled on the CPU, so that a model trained on a GPU opens anywhere; together, for a trunk that both
        # share.
        names = ("metric_network", "hash_network")
        networks = {name: self.__dict__[name] for name in names}
        if any(n is not None and next(n.parameters()).is_cuda for n in networks.values()):
            networks = copy.deepcopy(networks)
            for network in networks.values():
                if network is not None:
                    network.cpu()
        return {**self.__dict__, **networks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shared_trunk = False
        self.__dict__.update(state)
        device = available_device(self.device)
        for network in (self.metric_network, self.hash_network):
            if network is not None:
                network.to(device)
