"""The stage that a network's training starts with, kept by joblib.Memory where there is one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from hqsearch.embedding.checkpoints import Checkpoint
from hqsearch.embedding.inference import as_tensor
from hqsearch.embedding.network_keys import network_key
from hqsearch.embedding.networks import StageNetwork, initial_network
from hqsearch.embedding.randomness import randomness_of
from hqsearch.embedding.stage import Stage, StageSettings, TrainingData

Weights = dict[str, np.ndarray]
History = list[dict[str, Any]]


class StageInterrupted(Exception):
    """Carries what an interrupted stage has learned past joblib.Memory, which must not keep it."""

    def __init__(self, weights: Weights, history: History):
        super().__init__("training was interrupted")
        self.weights = weights
        self.history = history


def fit_first_stage(
    stage: type[Stage],
    X: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    validation: np.ndarray,
    *,
    network: str | nn.Module | Callable,
    n_outputs: int,
    settings: StageSettings,
    seed: int,
    device: torch.device,
    memory: Any,
    verbose: int = 0,
    checkpoint: Checkpoint | None = None,
) -> tuple[StageNetwork, History, bool]:
    """Train a network from the start, or take it from the cache.

    Parameters
    ----------
    stage : type
        Class of the stage.
    X : ndarray of shape (n_samples, *input_shape)
        All items.
    y : ndarray of shape (n_samples,), dtype int64
        Class indices.
    train, validation : ndarray of int64
        Positions to train on and to hold out.
    network : str, nn.Module or callable
        The trunk, see `build_trunk`.
    n_outputs : int
        Width of the linear layer.
    settings : StageSettings
        How to train.
    seed : int
        Of everything random in this stage.
    device : torch.device
        Where to train; the network is left there.
    memory : joblib.Memory
        Cache of trained weights.
    verbose : int, default=0
        0 prints nothing, 1 a line an epoch.
    checkpoint : Checkpoint or None, default=None
        Where the stage goes on from, and leaves how far it came; the cache does not ask for it.

    Returns
    -------
    network : StageNetwork
        Trained, in eval mode.
    history : list of dict
        One record an epoch.
    interrupted : bool
        Whether the user stopped the training before its end.
    """
    key = network_key(network)
    train_stage: Callable = train_first_stage
    if key is not None:
        train_stage = memory.cache(train_first_stage, ignore=["network", "verbose", "checkpoint"])
    elif memory.store_backend is not None:
        warnings.warn(
            f"memory cannot tell whether two networks like {network!r} are the same, so the first stage is "
            "trained anew. A module that is initialised, or a function of a module's top level, is kept.",
            UserWarning,
            stacklevel=2,
        )
    arguments = (stage, X, y, train, validation, key, n_outputs, settings, seed, str(device))
    interrupted = False
    try:
        weights, history = train_stage(*arguments, network=network, verbose=verbose, checkpoint=checkpoint)
    except StageInterrupted as stopped:
        weights, history, interrupted = stopped.weights, stopped.history, True
    # The result is weights alone; the network is made again from the same seed and filled in.
    trained = initial_network(X, train, network, n_outputs, seed)
    trained.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    return trained.to(device).eval(), history, interrupted


def train_first_stage(
    stage: type[Stage],
    X: np.ndarray,
    y: np.ndarray,
    train: np.ndarray,
    validation: np.ndarray,
    key: Any,
    n_outputs: int,
    settings: StageSettings,
    seed: int,
    device: str,
    *,
    network: str | nn.Module | Callable,
    verbose: int = 0,
    checkpoint: Checkpoint | None = None,
) -> tuple[Weights, History]:
    """Train the stage; a plain function of its arguments, so that joblib.Memory can keep its result.

    `key` stands for `network` in the cache. Other parameters are those of `fit_first_stage`.

    Raises
    ------
    StageInterrupted
        If the user stops it, with what was learned so far.
    """
    start = initial_network(X, train, network, n_outputs, seed).to(device)
    data = TrainingData(as_tensor(X, torch.device(device)), y, train, validation)
    with randomness_of(network, seed):
        run = stage(start, data, settings, seed=seed, verbose=verbose)
        run.checkpoint = checkpoint
        history = run.run()
    weights = {name: value.cpu().numpy() for name, value in start.state_dict().items()}
    if run.interrupted:
        raise StageInterrupted(weights, history)
    return weights, history
