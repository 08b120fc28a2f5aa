"""Randomness of the user's own modules, kept apart from the global random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
