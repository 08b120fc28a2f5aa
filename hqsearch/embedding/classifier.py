"""A plain classifier on the same trunks: what codes learned by metric losses are held against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hqsearch.embedding.first_stage import fit_first_stage
from hqsearch.embedding.inference import infer
from hqsearch.embedding.losses import class_cross_entropy
from hqsearch.embedding.model import available_device, resolve_device
from hqsearch.embedding.networks import StageNetwork
from hqsearch.embedding.stage import Stage, StageSettings, standard_error


class ClassifierStage(Stage):
    """The only stage of a classifier: softmax cross-entropy over all classes of class-balanced batches."""

    name = "classifier"

    def _loss(self, outputs: Tensor, classes: Tensor) -> Tensor:
        return class_cross_entropy(outputs, classes)

    def _validate(self) -> dict[str, float]:
        held_out = self.data.validation
        predicted = infer(self.network, self.data.X, held_out).argmax(1).cpu().numpy()
        accuracy = float(np.mean(predicted == self.data.y[held_out]))
        error = standard_error(accuracy, len(held_out))
        return {"accuracy": accuracy, "criterion": accuracy, "standard_error": error}


class _HiddenAndLogits(StageNetwork):
    """A classifier's layers, that give what its linear layer gets and what it makes of it side by side."""

    def output(self, hidden: Tensor) -> Tensor:
        return torch.cat([hidden, self.head(hidden)], dim=1)


class ClassifierModel:
    """The trained classifier: X to log-probabilities, and to the hidden layer below them.

    Parameters
    ----------
    device : str
        "auto" or a torch device name; where the network is trained and run.
    """

    def __init__(self, *, device: str = "auto"):
        self.device = device
        self._network: str | nn.Module | Callable = "auto"
        self.classifier_network: StageNetwork | None = None

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        train: np.ndarray,
        validation: np.ndarray,
        *,
        network: str | nn.Module | Callable,
        settings: StageSettings,
        seed: int,
        memory: Any,
        verbose: int = 0,
    ) -> list[dict[str, Any]]:
        """Train the classifier; with a joblib.Memory, only where it was not trained before.

        Parameters
        ----------
        X : ndarray of shape (n_samples, *input_shape)
            All items.
        y : ndarray of shape (n_samples,), dtype int64
            Class indices, 0 to n_classes - 1, each at least once.
        train, validation : ndarray of int64
            Positions to train on and to hold out.
        network : str, nn.Module or callable
            The trunk, see `build_trunk`.
        settings : StageSettings
            How to train; its loss is not asked for.
        seed : int
            Of everything random.
        memory : joblib.Memory
            Cache of trained weights.
        verbose : int, default=0
            0 prints nothing, 1 a line an epoch.

        Returns
        -------
        list of dict
            One record an epoch.
        """
        self._network = network
        self.classifier_network, history, _ = fit_first_stage(
            ClassifierStage,
            X,
            y,
            train,
            validation,
            network=network,
            n_outputs=int(y.max()) + 1,
            settings=settings,
            seed=seed,
            device=resolve_device(self.device),
            memory=memory,
            verbose=verbose,
        )
        return history

    def log_probabilities(self, X: np.ndarray) -> np.ndarray:
        """Log-probability of each class, float32 of shape (n_samples, n_classes)."""
        assert self.classifier_network is not None
        return infer(self.classifier_network, X).log_softmax(1).cpu().numpy()

    def describe(self, X: np.ndarray, *, unit_length: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Hidden layer and `log_probabilities` from one pass.

        Parameters
        ----------
        X : ndarray of shape (n_samples, *input_shape)
            Items.
        unit_length : bool, default=True
            Whether each item's hidden layer is scaled to unit length.

        Returns
        -------
        hidden : ndarray of shape (n_samples, n_hidden), dtype float32
        log_probabilities : ndarray of shape (n_samples, n_classes), dtype float32
        """
        network = self.classifier_network
        assert network is not None
        both = infer(_HiddenAndLogits(network.standardize, network.trunk, network.head), X)
        hidden, logits = both.tensor_split([network.head.in_features], dim=1)
        if unit_length:
            hidden = nn.functional.normalize(hidden)
        return hidden.cpu().numpy(), logits.log_softmax(1).cpu().numpy()

    def __getstate__(self) -> dict[str, Any]:
        # Pickled on the CPU, so that a model trained on a GPU opens anywhere.
        network = self.classifier_network
        if network is not None and next(network.parameters()).is_cuda:
            network = copy.deepcopy(network).cpu()
        return {**self.__dict__, "classifier_network": network}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.classifier_network is not None:
            self.classifier_network.to(available_device(self.device))
