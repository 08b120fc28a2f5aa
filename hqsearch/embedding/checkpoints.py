"""Checkpoints: what a stage that was killed needs to go on as if it had not been, bit by bit on the CPU.

Each stage has one safetensors file in the folder of its fit. Its metadata holds JSON: which fit it belongs
to, the numbers that are no tensors, and a checksum of all. The file is replaced in one step.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hqsearch.durable_files import replace_file
from hqsearch.embedding.network_keys import behaviour
from hqsearch.embedding.networks import initial_network
from hqsearch.embedding.randomness import get_random_states, set_random_states

STAGES = ("metric", "hash")
FORMAT = "hqsearch checkpoint"
FORMAT_VERSION = 5
# Most of the time that writing may take, as a share of all: where epochs are short, not each is written.
SHARE_OF_TIME = 0.02


@dataclass
class StageState:
    """What a stage writes and gets back.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Named ``{group}/{name}``; `add` and `group` see to that.
    values : dict
        All else, as JSON holds it: numbers, strings, None, lists and dicts of such.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, group: str, tensors: dict[str, Any]) -> None:
        """Add tensors or arrays under the name of a group."""
        for name, value in tensors.items():
            # Copies: safetensors refuses tensors that share memory, as tied weights do.
            tensor = torch.as_tensor(value).detach().cpu().contiguous().clone()
            self.tensors[f"{group}/{name}"] = tensor

    def group(self, group: str) -> dict[str, Tensor]:
        """Tensors of a group by name, on the CPU; empty where there are none."""
        start = f"{group}/"
        return {k.removeprefix(start): value for k, value in self.tensors.items() if k.startswith(start)}


class Checkpoint:
    """The file of one stage.

    Parameters
    ----------
    path : Path
        The file; its folder exists.
    problem : dict
        Names and values, as JSON holds them, that say which fit this is.
    network : str, nn.Module or callable
        As the encoder's parameter: tells whose random states are to be kept.

    Raises
    ------
    ValueError
        If the file is there, but is damaged, foreign or of another fit.
    """

    def __init__(self, path: Path, problem: dict[str, Any], network: str | nn.Module | Callable):
        self.path = path
        self.problem = problem
        self.network = network
        self._due = -np.inf
        self._found: tuple[StageState, bool] | None = None
        if path.exists():
            state, contents = _unpack(path)
            _check_problem(path, contents["problem"], problem)
            self._found = state, contents["finished"]

    def resume(self, load: Callable[[StageState, bool], None]) -> bool:
        """Hand over what an earlier run left, if anything; return whether that run finished the stage.

        Parameters
        ----------
        load : callable
            Called with the state and whether it is that of a finished stage.

        Returns
        -------
        bool

        Raises
        ------
        ValueError
            If the state does not fit the stage.
        """
        if self._found is None:
            return False
        state, finished = self._found
        self._found = None
        try:
            load(state, finished)
            if not finished:
                set_random_states(self.network, state.group("random"))
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.path} is foreign: it does not fit this stage ({error}).") from error
        return finished

    def write(self, make_state: Callable[[], StageState], *, finished: bool = False) -> None:
        """Write the file, unless the stage goes on and the last time was too short ago.

        Parameters
        ----------
        make_state : callable
            Returns the state; called only if it is written.
        finished : bool, default=False
            Whether the stage is at its end.

        Raises
        ------
        OSError
            If the disk refuses.
        """
        started = time.perf_counter()
        if not finished and started < self._due:
            return
        state = make_state()
        if not finished:
            state.add("random", get_random_states(self.network))
        contents = {"problem": self.problem, "finished": finished, "values": state.values}
        replace_file(self.path, _pack(state.tensors, contents))
        ended = time.perf_counter()
        self._due = ended + (ended - started) * (1 / SHARE_OF_TIME - 1)


def open_checkpoints(
    folder: str | os.PathLike,
    X: np.ndarray,
    y: np.ndarray,
    *,
    network: str | nn.Module | Callable,
    device: torch.device,
    seeds: tuple[int, int, int],
    parameters: dict[str, Any],
) -> dict[str, Checkpoint]:
    """Open the checkpoints of one fit, making the folder where there is none.

    Parameters
    ----------
    folder : path-like
        The folder.
    X : ndarray of shape (n_samples, *input_shape)
        All items.
    y : ndarray of shape (n_samples,), dtype int64
        Class indices.
    network : str, nn.Module or callable
        The trunk, see `build_trunk`.
    device : torch.device
        Where the stages train; they go on on the same kind of device only.
    seeds : tuple of int
        Of the hold-out, the metric stage and the hash stage.
    parameters : dict
        All other parameters that the trained networks depend on.

    Returns
    -------
    dict of str to Checkpoint
        By name of the stage.

    Raises
    ------
    ValueError
        If `folder` is a file, or a checkpoint in it is damaged, foreign or of another fit.
    OSError
        If the folder cannot be made.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected checkpoint_dir to be a folder or not to exist, but {folder} is a file.")
    folder.mkdir(parents=True, exist_ok=True)
    # Two items are enough to make the network, and whatever its kind its initial weights tell it from others.
    trunk = initial_network(X[:2], np.arange(len(X[:2])), network, 1, seeds[1]).trunk
    problem = {
        **parameters,
        "X": _digest([X]),
        "y": _digest([y]),
        "random_state": list(seeds),
        "network": [
            repr(trunk),
            _digest(v.numpy() for v in network_tensors(trunk).values()),
            behaviour(trunk),
        ],
        "device": device.type,
    }
    # As it will come back: JSON knows no tuples, and no numpy numbers.
    problem = json.loads(json.dumps(problem, default=_plain))
    return {name: Checkpoint(folder / f"{name}.safetensors", problem, network) for name in STAGES}


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of a network by name, also those buffers that its `state_dict` leaves out.

    Raises
    ------
    ValueError
        If a module keeps something else than tensors in its `state_dict`.
    """
    tensors = dict(network.named_buffers(remove_duplicate=False)) | network.state_dict()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                "Expected the state_dict of a network that is trained with checkpoint_dir to hold tensors "
                f"only, but {name} is a {type(value).__name__}."
            )
    return {name: value.detach() for name, value in tensors.items()}


def fill_network(network: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put tensors of `network_tensors` back in place; they must fit exactly.

    Raises
    ------
    ValueError
        If a tensor is missing, extra, or of another shape or dtype.
    """
    own = network_tensors(network)
    if own.keys() != saved.keys():
        raise ValueError(f"not the same tensors: {', '.join(sorted(own.keys() ^ saved.keys()))}")
    for name, value in own.items():
        if (value.shape, value.dtype) != (saved[name].shape, saved[name].dtype):
            raise ValueError(f"{name} has another shape or dtype")
        value.copy_(saved[name])


def _check_problem(path: Path, came: dict[str, Any], expected: dict[str, Any]) -> None:
    if came == expected:
        return
    names = sorted(n for n in came.keys() | expected.keys() if came.get(n) != expected.get(n))
    raise ValueError(
        f"Expected checkpoint_dir to hold checkpoints of this very fit, but {path} is of one that differs in "
        f"{', '.join(names)}. Choose another checkpoint_dir, or delete that one to start anew. (A network of "
        "your own must start from the same weights every time.)"
    )


def _pack(tensors: dict[str, Tensor], contents: dict[str, Any]) -> bytes:
    text = json.dumps(contents, default=_plain)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "contents": text,
        "sha256": _checksum(text, tensors),
    }
    return safetensors.torch.save(tensors, metadata)


def _unpack(path: Path) -> tuple[StageState, dict[str, Any]]:
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is truncated, damaged or foreign: {error}.") from error
    # The header of a safetensors file: its length, then JSON, which was just found sound.
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is foreign: it is not a checkpoint of hqsearch.")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')}, but this version of hqsearch reads "
            f"{FORMAT_VERSION}: delete it to start anew, or install the hqsearch that wrote it."
        )
    text = metadata.get("contents", "")
    if metadata.get("sha256") != _checksum(text, tensors):
        raise ValueError(f"{path} is damaged: its checksum differs.")
    contents = json.loads(text)
    # Copies, in memory of torch's own: what is loaded lies anywhere in the bytes of the file.
    return StageState({k: v.clone() for k, v in tensors.items()}, contents["values"]), contents


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    names = sorted(tensors)
    layout = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    header = np.frombuffer(json.dumps([text, layout]).encode("utf-8"), dtype=np.uint8)
    return _digest([header, *(tensors[n].reshape(-1).view(torch.uint8).numpy() for n in names)])


def _digest(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Turn what JSON cannot hold into what it can: numpy's numbers, and all else by its description."""
    return value.item() if isinstance(value, np.generic) else repr(value)
