"""Training steps as CUDA graphs: all kernels of a step launched as one.

The kernels of a small network take a few microseconds each, less than Python needs to launch them one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

# Steps that are run as they are first: libraries choose their kernels, and the optimiser makes its averages.
N_STEPS_BEFORE = 3
# CUDA captures one graph at a time in a process.
_CAPTURING = threading.Lock()

ArrayFunction = Callable[[np.ndarray], np.ndarray]


class CapturedStep:
    """A training step that is run as it is a few times, then captured, and from then on replayed.

    What the CPU does in the middle of a step goes through `on_cpu`: the step is captured in parts, one before
    it and one after it, each with something for the device to do.

    Parameters
    ----------
    step : callable
        Maps items, an int64 Tensor on the device, to a dict of Tensors. What it reads and writes must stay
        at its place in memory, and but for `on_cpu` nothing in it may wait for the device.
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
        # A graph for each part, and what the CPU does before the next one; one being captured is open.
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._exchanges: list[Callable[[], None]] = []
        self._open = ExitStack()
        self._results: dict[str, Tensor] | None = None

    def __call__(self, items: Tensor) -> dict[str, Tensor]:
        """Take a step; what it returns is valid until the next one."""
        if self._n_before < N_STEPS_BEFORE:
            self._n_before += 1
            return self._run(items)
        if self._results is None:
            return self._capture(items)
        self._items.copy_(items)
        self._graphs[0].replay()
        for exchange, graph in zip(self._exchanges, self._graphs[1:], strict=True):
            exchange()
            graph.replay()
        return self._results

    def on_cpu(self, function: ArrayFunction, values: Tensor) -> Tensor:
        """Give what a function makes of an array, to the step that is being taken.

        Parameters
        ----------
        function : callable
            Its arrays have the same shapes and dtypes in every step.
        values : Tensor
            On the device, without gradient.

        Returns
        -------
        Tensor
            On the device.
        """
        if not self._graphs:
            return on_cpu(function, values, self._device)
        # Nothing of the part before has run yet; what follows needs what comes of it.
        self._close_part()
        device = self._device
        result = on_cpu(function, values, device)

        # Without `self`, which would hold itself, and the stage with all its data.
        def exchange() -> None:
            result.copy_(on_cpu(function, values, device))

        self._exchanges.append(exchange)
        self._open_part()
        return result

    def _run(self, items: Tensor) -> dict[str, Tensor]:
        # On the stream of the capture, where the libraries' workspaces then are.
        waiting = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(waiting)
        try:
            with torch.cuda.stream(self._stream):
                return self._step(items)
        finally:
            waiting.wait_stream(self._stream)

    def _capture(self, items: Tensor) -> dict[str, Tensor]:
        """Take a step that is captured part by part, each of them replayed at its end."""
        self._items = items.clone()
        with _CAPTURING, torch.cuda.device(self._device), self._open:
            self._open_part()
            results = self._step(self._items)
            self._close_part()
        self._results = results
        return results

    def _open_part(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        # One pool of memory: a part reads what those before it have left there.
        pool = self._graphs[0].pool() if self._graphs else None
        self._graphs.append(graph)
        # Other threads may go on allocating memory.
        capture = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
        self._open.enter_context(capture)

    def _close_part(self) -> None:
        self._open.close()
        self._graphs[-1].replay()


def on_cpu(function: ArrayFunction, values: Tensor, device: torch.device) -> Tensor:
    """Give what a function makes of an array, on the device; wait for the values."""
    return from_cpu(function(values.cpu().numpy()), device)


def from_cpu(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device, without waiting for what it is doing."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
