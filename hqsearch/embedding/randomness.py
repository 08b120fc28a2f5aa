"""Randomness of the user's own modules, kept apart from the global random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def randomness_of(network: Any, seed: int) -> Iterator[None]:
    """Let a module of the user's draw from torch's global state inside, and put that state back afterwards.

    The built-in trunks, given by name, have generators of their own and never touch it.

    Parameters
    ----------
    network : str, nn.Module or callable
        As the encoder's parameter.
    seed : int
        What the global state starts from inside.
    """
    if isinstance(network, str):
        yield
        return
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.random.manual_seed(seed)
        yield


def get_random_states(network: Any) -> dict[str, Tensor]:
    """Global states that a module of the user's draws from inside `randomness_of`; a built-in trunk has none.

    Parameters
    ----------
    network : str, nn.Module or callable
        As the encoder's parameter.

    Returns
    -------
    dict of str to Tensor
        By device, bytes on the CPU.
    """
    if isinstance(network, str):
        return {}
    cuda = {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return {"cpu": torch.random.get_rng_state(), **cuda}


def set_random_states(network: Any, states: dict[str, Tensor]) -> None:
    """Go on from what `get_random_states` gave; to be called inside `randomness_of`.

    Parameters
    ----------
    network : str, nn.Module or callable
        As the encoder's parameter.
    states : dict of str to Tensor
        By device; a device that is not there any more is left out.
    """
    if isinstance(network, str):
        return
    torch.random.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda:{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{i}"], i)
