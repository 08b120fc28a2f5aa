"""Training steps as CUDA graphs: all kernels of a step launched as one.

The kernels of a small network take a few microseconds each, less than Python needs to launch them one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

# Steps that are run as they are first: libraries choose their kernels, and the optimiser makes its averages.
N_STEPS_BEFORE = 3
# CUDA captures one graph at a time in a process.
_CAPTURING = threading.Lock()


class CapturedStep:
    """A training step that is run as it is a few times, then captured, and from then on replayed.

    Parameters
    ----------
    step : callable
        Maps items, an int64 Tensor on the device, to a dict of Tensors. What it reads and writes must stay
        at its place in memory, and nothing in it may wait for the device.
    device : torch.device
        A CUDA device.
    generator : torch.Generator
        What the step draws random numbers from; each replay draws the next ones.
    """

    def __init__(
        self,
        step: Callable[[Tensor], dict[str, Tensor]],
        device: torch.device,
        generator: torch.Generator,
    ):
        self._step = step
        self._generator = generator
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._n_before = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, items: Tensor) -> dict[str, Tensor]:
        """Take a step; what it returns is valid until the next one."""
        if self._n_before < N_STEPS_BEFORE:
            self._n_before += 1
            return self._run(items)
        if self._graph is None:
            self._capture(items)
        assert self._graph is not None
        self._items.copy_(items)
        self._graph.replay()
        return self._results

    def _run(self, items: Tensor) -> dict[str, Tensor]:
        # On the stream of the capture, where the libraries' workspaces then are.
        waiting = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(waiting)
        try:
            with torch.cuda.stream(self._stream):
                return self._step(items)
        finally:
            waiting.wait_stream(self._stream)

    def _capture(self, items: Tensor) -> None:
        self._items = items.clone()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with (
            _CAPTURING,
            torch.cuda.device(self._device),
            # Other threads may go on allocating memory.
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            self._results = self._step(self._items)
        self._graph = graph
