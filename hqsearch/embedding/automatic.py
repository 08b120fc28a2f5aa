"""What "auto" stands for: bfloat16 where that is faster than float32, learning rates, epochs, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from hqsearch.embedding.networks import is_convolutional

# Measured on held-out items, see doc/experiments.md. "nin" has no normalisation and hardly trains at the
# higher rate; a network of the user's may be trained already.
_NORMALISED = ("auto", "mlp", "conv")
_NORMALISED_RATE, _RATE = 3e-3, 1e-3
# Also measured there. A longer metric stage gains little among the classes that it sees, and loses much among
# others. The hash stage has to learn its codes anew, however many items there are.
_EPOCHS = {"metric": 10, "hash": 20}
_FEWEST_EPOCHS = {"metric": 6, "hash": 8}
_MOST_EPOCHS = 30
# Epochs of fewer steps than this many don't teach much each, and of more than that many teach more.
_FEW_STEPS, _MANY_STEPS = 40, 120
# Also measured there: what other classes gain, and trained ones lose, by the hidden layer in the embedding.
_HIDDEN_WEIGHT = 0.7
# Also measured there: what it is among other classes alone, how much the embedding counts beside the level
# scores then, how much farther than the nearest leaf those may be that are opened too, and the shares of
# held-out items' score gap and distance ratio from which on a gallery's items count as of trained classes, or
# as of others.
_OTHER_CLASSES_WEIGHT = {"proxy": 3.0, "triplet": 3.0, "npairs": 1.0}
_OTHER_CLASSES_EMBEDDING, _OTHER_CLASSES_EPSILON = 4.0, 0.2
_FAMILIAR_GAP, _UNFAMILIAR_GAP = 0.95, 0.7
_FAMILIAR_RATIO, _UNFAMILIAR_RATIO = 1.1, 1.3
# The first NVIDIA GPUs that multiply bfloat16.
_CUDA_CAPABILITY = (8, 0)


def resolve_precision(
    precision: str, network: str | nn.Module | Callable, input_shape: Sequence[int], device: torch.device
) -> str:
    """Turn a `precision` parameter into that of a training.

    Parameters
    ----------
    precision : {"auto", "float32", "bfloat16"}
        "auto" takes bfloat16 for the built-in convolutional trunks where the device multiplies it faster than
        float32.
    network : str, nn.Module or callable
        The trunk, see `build_trunk`.
    input_shape : sequence of int
        Shape of one item.
    device : torch.device
        Where it is trained.

    Returns
    -------
    {"float32", "bfloat16"}
    """
    if precision != "auto":
        return precision
    fast = is_convolutional(network, input_shape) and multiplies_bfloat16(device)
    return "bfloat16" if fast else "float32"


def resolve_learning_rate(learning_rate: float | str, network: str | nn.Module | Callable) -> float:
    """Turn a `learning_rate` parameter into a peak rate: "auto" is higher for trunks with normalisation."""
    if not isinstance(learning_rate, str):
        return learning_rate
    normalised = isinstance(network, str) and network in _NORMALISED
    return _NORMALISED_RATE if normalised else _RATE


def resolve_epochs(epochs: int | str, stage: str, n_items: int, items_per_step: int) -> int:
    """Turn an `epochs` parameter into a number: "auto" is more for few items, and fewer for many.

    Parameters
    ----------
    epochs : int or "auto"
        The parameter.
    stage : {"metric", "hash", "single"}
        What is trained: a stage, or a network that no stage before it has trained, for as long as both.
    n_items : int
        Items to train on.
    items_per_step : int
        Items of a training step.

    Returns
    -------
    int
    """
    if not isinstance(epochs, str):
        return epochs
    if stage == "single":
        return sum(resolve_epochs(epochs, name, n_items, items_per_step) for name in _EPOCHS)
    steps = n_items / items_per_step
    wanted = round(_EPOCHS[stage] * min(max(steps, _FEW_STEPS), _MANY_STEPS) / steps)
    return min(max(wanted, _FEWEST_EPOCHS[stage]), _MOST_EPOCHS)


def resolve_hash_start(
    hash_trunk: str, epochs: int | str, *, loss: str, shared_trunk: bool, n_items: int, items_per_step: int
) -> tuple[bool, int]:
    """Turn `hash_trunk` and `hash_epochs` into whether the hash stage has a new trunk, and into its epochs.

    "auto" is a new trunk where one network does not serve both stages, the loss is not one of the papers',
    and epochs and items suffice for it.

    Parameters
    ----------
    hash_trunk : {"auto", "metric", "new"}
        The parameter.
    epochs : int or "auto"
        The parameter.
    loss : {"npairs", "triplet", "proxy"}
        Of both stages.
    shared_trunk : bool
        Whether one trunk serves both stages.
    n_items, items_per_step : int
        As in `resolve_epochs`.

    Returns
    -------
    new_trunk : bool
    epochs : int
    """
    whole, enough = (resolve_epochs(e, "single", n_items, items_per_step) for e in (epochs, "auto"))
    suffice = whole >= enough and n_items >= _FEW_STEPS * items_per_step
    new = hash_trunk == "new" or (hash_trunk == "auto" and loss == "proxy" and not shared_trunk and suffice)
    # What is not trained at all has better codes on a trunk that is.
    if new and whole > 0:
        return True, whole
    return False, resolve_epochs(epochs, "hash", n_items, items_per_step)


def resolve_hidden_weight(hidden_weight: float | str, loss: str) -> float:
    """Turn a `hidden_weight` parameter into a number: "auto" leaves the papers' embeddings as they are."""
    if not isinstance(hidden_weight, str):
        return hidden_weight
    return _HIDDEN_WEIGHT if loss == "proxy" else 0.0


def resolve_gallery(loss: str, gap_share: float, ratio_share: float) -> dict[str, float] | None:
    """Say how a gallery is searched, where its items are of other classes.

    Parameters
    ----------
    loss : {"npairs", "triplet", "proxy"}
        Of the training.
    gap_share : float
        Score gap of the gallery's items, as a share of that of held-out items of trained classes.
    ratio_share : float
        Their distance ratio, likewise. Either says that items are of other classes, whatever the other says:
        the hash stage's network may be sure of items that the metric stage's has never seen the like of.

    Returns
    -------
    dict or None
        All of a `Gallery` but its axes. None where the items are of trained classes.
    """
    by_gap = (_FAMILIAR_GAP - gap_share) / (_FAMILIAR_GAP - _UNFAMILIAR_GAP)
    by_ratio = (ratio_share - _FAMILIAR_RATIO) / (_UNFAMILIAR_RATIO - _FAMILIAR_RATIO)
    others = min(max(by_gap, by_ratio), 1.0)
    if others <= 0:
        return None
    weight = resolve_hidden_weight("auto", loss)
    return {
        "hidden_weight": weight + others * (_OTHER_CLASSES_WEIGHT[loss] - weight),
        "embedding_weight": 1 + others * (_OTHER_CLASSES_EMBEDDING - 1),
        # Among trained classes even a small one costs much of the speed-up, so it waits for certainty.
        "epsilon": max(2 * others - 1, 0) * _OTHER_CLASSES_EPSILON,
    }


def resolve_captured(network: str | nn.Module | Callable, device: torch.device) -> bool:
    """Tell whether steps with this network may be captured as CUDA graphs: what a user's does is unknown."""
    return isinstance(network, str) and device.type == "cuda"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 in instructions that are faster than those of float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _CUDA_CAPABILITY
    # A torch that cannot tell counts as no.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    # Intel's processors with AVX512-FP16 are fast in AMX alone, which virtual machines may hide: their
    # AVX512-BF16 is slower than float32.
    in_vectors = capabilities.get("avx512_bf16") and not capabilities.get("avx512_fp16")
    return device.type == "cpu" and bool(capabilities.get("amx_bf16") or in_vectors)


def mixed_precision(precision: str, device: torch.device) -> AbstractContextManager:
    """Context in which products are of `precision`; weights and their gradients stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()
