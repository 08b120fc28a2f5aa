"""A trained model <-> its numbers and the bytes of a safetensors file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hqsearch.embedding.classifier import ClassifierModel
from hqsearch.embedding.inference import UNIT_LOSSES
from hqsearch.embedding.model import EmbeddingModel
from hqsearch.embedding.networks import EmbeddingNetwork, StageNetwork, Standardize, build_trunk
from hqsearch.embedding.randomness import randomness_of

# The attributes that are networks, by the kind of model; the stages of one model share their statistics.
_STAGES: dict[type[ClassifierModel | EmbeddingModel], tuple[str, ...]] = {
    ClassifierModel: ("classifier_network",),
    EmbeddingModel: ("metric_network", "hash_network"),
}
_KINDS = {cls.__name__: cls for cls in _STAGES}
_TRUNK = "trunk."


def pack_model(model: ClassifierModel | EmbeddingModel) -> tuple[dict[str, Any], bytes]:
    """Take a trained model apart.

    Parameters
    ----------
    model : ClassifierModel or EmbeddingModel
        With all stages trained.

    Returns
    -------
    structure : dict
        The kind of model as `kind`, and the attributes that are not networks, as plain Python values.
    weights : bytes
        A safetensors file: each stage below its name, as ``metric_network.*``, a trunk that both share once,
        and a module that the user gave, as it was given, as ``network.*``.

    Raises
    ------
    ValueError
        If a module of the user's keeps something else than tensors in its `state_dict`.
    """
    stages = _STAGES[type(model)]
    structure = {
        name: value for name, value in vars(model).items() if name not in stages and name != "_network"
    }
    modules = {name: getattr(model, name) for name in stages}
    if isinstance(model._network, nn.Module):
        modules["network"] = model._network
    shared = isinstance(model, EmbeddingModel) and model.shared_trunk
    tensors = {}
    for prefix, module in modules.items():
        for name, value in module.state_dict().items():
            if shared and prefix == "hash_network" and name.startswith(_TRUNK):
                continue
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"Expected the state_dict of {type(module).__name__} to hold tensors only, but "
                    f"{name} is a {type(value).__name__}."
                )
            # Copies: safetensors refuses tensors that share memory, as tied weights do.
            tensors[f"{prefix}.{name}"] = value.detach().cpu().contiguous().clone()
    return {"kind": type(model).__name__, **structure}, safetensors.torch.save(tensors)


def unpack_model(
    structure: dict[str, Any],
    weights: bytes,
    *,
    network: str | nn.Module | Callable,
    is_module: bool,
    input_shape: Sequence[int],
) -> ClassifierModel | EmbeddingModel:
    """Put a model together from what `pack_model` gave.

    Parameters
    ----------
    structure : dict
        As `pack_model` returns it.
    weights : bytes
        Likewise.
    network : str, nn.Module or callable
        What makes the trunk: the encoder's parameter; or, where that was a module, such a module (it is
        copied), its class (called without arguments), or a function of `input_shape` that returns one.
    is_module : bool
        Whether the encoder's parameter was a module.
    input_shape : sequence of int
        Shape of one item.

    Returns
    -------
    ClassifierModel or EmbeddingModel
        On the device that its `device` names, or where that is gone, on what there is.

    Raises
    ------
    ValueError
        If the weights are not a safetensors file, or not those of this network.
    """
    try:
        tensors = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error
    structure = dict(structure)
    cls = _KINDS[structure.pop("kind")]
    model = cls.__new__(cls)
    with randomness_of(network, 0):
        if is_module:
            network = _make_module(network, input_shape)
            _fill(network, _below("network", tensors))
        shared = structure.get("shared_trunk", False)
        parts = {name: _below(name, tensors) for name in _STAGES[cls]}
        if shared:
            first = parts["metric_network"]
            parts["hash_network"] |= {name: first[name] for name in first if name.startswith(_TRUNK)}
        unit = structure.get("loss") in UNIT_LOSSES
        stages = {name: _stage(part, network, input_shape, unit=unit) for name, part in parts.items()}
        if shared:
            stages["hash_network"].trunk = stages["metric_network"].trunk
    # One module from training on.
    standardize = stages[_STAGES[cls][0]].standardize
    for stage in stages.values():
        stage.standardize = standardize
    # The same way onto a device as a pickle takes.
    model.__setstate__({**structure, **stages, "_network": network})
    return model


def _make_module(network: Any, input_shape: Sequence[int]) -> nn.Module:
    if isinstance(network, nn.Module):
        return copy.deepcopy(network)
    try:
        module = network() if isinstance(network, type) else network(tuple(input_shape))
    except TypeError as error:
        name = getattr(network, "__qualname__", repr(network))
        raise ValueError(
            f"network={name} can't make the module ({error}): pass a module of the same build, or a function "
            "of the shape of one item that returns one."
        ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"Expected network to return a torch.nn.Module, got {type(module).__name__}.")
    return module


def _stage(
    tensors: dict[str, Tensor], network: Any, input_shape: Sequence[int], *, unit: bool
) -> StageNetwork:
    n_out, n_in = _named(tensors, "head.weight").shape
    standardize = Standardize(
        *(np.asarray(_named(tensors, f"standardize.{name}").numpy()) for name in ("mean", "scale"))
    )
    trunk = build_trunk(network, input_shape, torch.Generator())
    head = nn.utils.skip_init(nn.Linear, n_in, n_out)
    if "axes" in tensors:
        axes = torch.empty(n_out + n_in, n_out)
        stage: StageNetwork = EmbeddingNetwork(standardize, trunk, head, axes, unit=unit)
    else:
        stage = StageNetwork(standardize, trunk, head)
    _fill(stage, tensors)
    return stage.eval()


def _named(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"there is no tensor {name}")
    return tensors[name]


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a state that must fit exactly: torch would cast another dtype silently."""
    for name, own in module.state_dict().items():
        saved = tensors.get(name)
        if saved is None or saved.shape != own.shape or saved.dtype != own.dtype:
            came = "nothing" if saved is None else f"{saved.dtype} of shape {tuple(saved.shape)}"
            raise ValueError(
                f"{type(module).__name__} expects {name} to be {own.dtype} of shape {tuple(own.shape)}, but "
                f"the weights hold {came}."
            )
    extra = sorted(tensors.keys() - module.state_dict().keys())
    if extra:
        raise ValueError(f"{type(module).__name__} has no place for the weights' {extra[0]}.")
    module.load_state_dict(tensors)
