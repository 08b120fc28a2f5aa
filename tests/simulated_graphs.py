"""CUDA graphs simulated on a CPU: what is captured does not run, and runs when it is replayed."""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The device would have to be waited for: how much there is, or what it is, is not known yet.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


def tensors_of(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def unnoticed(tensors):
    """Let tensors be written as kernels write them: autograd sees the step, not what a graph does."""
    return torch.autograd._unsafe_preserve_version_counter(tuple(tensors))


class SimulatedGraph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.calls, self.generators = [], []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def pool(self):
        return id(self)

    def replay(self):
        # Kernels know nothing of gradients.
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, made in self.calls:
                written = [*tensors_of((args, kwargs)), *(tensor for _, tensor in made)]
                with unnoticed(written):
                    results = tensors_of(function(*args, **kwargs))
                    for place, tensor in made:
                        tensor.copy_(results[place])


class Capture(TorchDispatchMode):
    """Note each operation for a graph, and undo it: nothing that it makes or writes can be read yet."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in WAITING:
            raise RuntimeError(f"{func} waits for the device, but a graph is being captured")
        drawn = {leaf._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)}
        if not drawn <= {generator._cdata for generator in self.graph.generators}:
            raise RuntimeError(f"{func} draws from a generator that the graph does not know")
        # All that is given: batch normalisation writes what it does not say that it writes.
        memory = (tensor.untyped_storage() for tensor in tensors_of((args, kwargs)))
        given = {storage.data_ptr(): storage for storage in memory}
        before = [storage.clone() for storage in given.values()]
        states = [generator.get_state() for generator in self.graph.generators]
        results = func(*args, **kwargs)
        for storage, values in zip(given.values(), before, strict=True):
            storage.copy_(values)
        for generator, state in zip(self.graph.generators, states, strict=True):
            generator.set_state(state)
        made = [
            (place, tensor)
            for place, tensor in enumerate(tensors_of(results))
            if tensor.untyped_storage().data_ptr() not in given
        ]
        with unnoticed(tensor for _, tensor in made):
            for _, tensor in made:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        self.graph.calls.append((func, args, kwargs, made))
        return results


class SimulatedStream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, device):
        self.device = device

    def wait_stream(self, other):
        assert other.device == self.device


def simulate(monkeypatch):
    """Let `torch.cuda` capture what runs on the CPU; returns the graphs, one after the other."""
    graphs = []

    @contextmanager
    def capture(graph, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        assert stream.device == torch.device("cpu")
        assert pool in (None, *(earlier.pool() for earlier in graphs))
        graphs.append(graph)
        with Capture(graph):
            yield

    stand_ins = {
        "CUDAGraph": SimulatedGraph,
        "graph": capture,
        "Stream": SimulatedStream,
        "current_stream": SimulatedStream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return graphs
