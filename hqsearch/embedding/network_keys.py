"""A user's network -> what tells it from others: its weights, its values and the code that it runs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), np.generic)
# What a class has beside its own, and what says nothing of what it computes.
_OF_CLASSES = {
    "__annotations__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__qualname__",
    "__static_attributes__",
    "__weakref__",
}
_OF_MODULES = vars(nn.Module()).keys()


def network_key(network: str | nn.Module | Callable) -> Any:
    """Values that are equal for equal networks, or None where there are none.

    Parameters
    ----------
    network : str, nn.Module or callable
        As the encoder's parameter.

    Returns
    -------
    object
        For `joblib.hash`. A module is its build, its weights and its `behaviour`: a copy of it pickles to
        other bytes. A function is its name and behaviour, if it can be found by that name.
    """
    if isinstance(network, str):
        return network
    known = _Description()
    if isinstance(network, nn.Module):
        if any(nn.parameter.is_lazy(p) for p in network.parameters()):
            return None
        weights = {name: value.detach().cpu().numpy() for name, value in network.state_dict().items()}
        key: tuple = type(network).__module__, repr(network), weights, known.of(network)
    else:
        name = getattr(network, "__qualname__", "<unknown>")
        if "<" in name:
            return None
        key = network.__module__, name, known.of(network)
    return key if known.complete else None


def behaviour(module: nn.Module) -> str:
    """Digest of what a network computes but for its weights: code, plain attributes, hooks."""
    return _Description().of(module)


class _Description:
    """Describes functions, classes and objects, and whatever of a user's they refer to, by digests.

    Code of installed packages, and of this one, counts by its name.

    Attributes
    ----------
    complete : bool
        Whether all that was described could be.
    """

    def __init__(self) -> None:
        self.complete = True
        # With the things themselves: an id is one object's only as long as that lives.
        self._known: dict[int, tuple[Any, str]] = {}
        self._open: list[int] = []

    def of(self, thing: Any) -> str:
        """Text that is equal for things that do the same."""
        if isinstance(thing, _PLAIN):
            return f"{type(thing).__name__} {thing!r}"
        if isinstance(thing, types.ModuleType):
            return f"module {thing.__name__}"
        if id(thing) in self._known:
            return self._known[id(thing)][1]
        if id(thing) in self._open:
            return f"the one {len(self._open) - self._open.index(id(thing))} further out"
        self._open.append(id(thing))
        text = "\0".join([type(thing).__name__, *self._parts(thing)])
        self._open.pop()
        self._known[id(thing)] = thing, hashlib.sha256(text.encode()).hexdigest()
        return self._known[id(thing)][1]

    def _parts(self, thing: Any) -> Iterator[str]:
        if isinstance(thing, np.ndarray) and thing.dtype.hasobject:
            yield from (str(thing.shape), *map(self.of, thing.ravel().tolist()))
        elif isinstance(thing, (Tensor, np.ndarray)):
            yield from _of_array(thing)
        elif isinstance(thing, (tuple, list)):
            yield from map(self.of, thing)
        elif isinstance(thing, (set, frozenset)):
            # Their order is another one in every process.
            yield from sorted(map(self.of, thing))
        elif isinstance(thing, dict):
            yield from map(self.of, thing.items())
        elif isinstance(thing, types.CodeType):
            yield from (thing.co_name, thing.co_code.hex(), str(thing.co_names))
            yield from map(self.of, thing.co_consts)
        elif isinstance(thing, types.FunctionType):
            yield from self._function(thing)
        elif isinstance(thing, type):
            yield from self._class(thing)
        elif isinstance(thing, (staticmethod, classmethod, types.MethodType)):
            yield self.of(thing.__func__)
            yield self.of(getattr(thing, "__self__", None))
        elif isinstance(thing, property):
            yield from map(self.of, (thing.fget, thing.fset))
        elif isinstance(thing, functools.partial):
            yield from map(self.of, (thing.func, thing.args, thing.keywords))
        else:
            yield from self._object(thing)

    def _function(self, function: types.FunctionType) -> Iterator[str]:
        yield from (function.__module__, function.__qualname__)
        if _is_installed(function.__module__):
            return
        for value in (function.__code__, function.__defaults__, function.__kwdefaults__):
            yield self.of(value)
        for cell in function.__closure__ or ():
            # That of a variable without a value is empty.
            with contextlib.suppress(ValueError):
                yield self.of(cell.cell_contents)
        for name in sorted(_names(function.__code__) & function.__globals__.keys()):
            yield from (name, self.of(function.__globals__[name]))

    def _class(self, cls: type) -> Iterator[str]:
        for base in cls.__mro__:
            yield from (base.__module__, base.__qualname__)
            if not _is_installed(base.__module__):
                for name in sorted(vars(base).keys() - _OF_CLASSES):
                    yield from (name, self.of(vars(base)[name]))

    def _object(self, thing: Any) -> Iterator[str]:
        yield self.of(type(thing))
        if isinstance(thing, nn.Module):
            for name in sorted(vars(thing).keys() - _OF_MODULES):
                yield from (name, self.of(vars(thing)[name]))
            for name, part in thing.named_children():
                yield from (name, self.of(part))
            # Not by the names of hooks, which count all that were ever made.
            for hook in (*thing._forward_pre_hooks.values(), *thing._forward_hooks.values()):
                yield self.of(hook)
        elif _is_installed(type(thing).__module__):
            # Of a function in C, a dtype or a device this is all there is to say.
            yield from (getattr(thing, "__qualname__", ""), _plain_repr(thing))
        elif hasattr(thing, "__dict__"):
            yield self.of(vars(thing))
        else:
            self.complete = False


def _of_array(array: Tensor | np.ndarray) -> Iterator[str]:
    """Dtype, shape and contents."""
    yield from (str(array.dtype), str(tuple(array.shape)))
    if isinstance(array, Tensor):
        # As bytes: numpy does not know every dtype.
        array = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    yield hashlib.sha256(array.tobytes()).hexdigest()


def _plain_repr(thing: Any) -> str:
    """Text of an object, or nothing where it holds an address, which is another one in every process."""
    text = repr(thing)
    return "" if " at 0x" in text else text


def _names(code: types.CodeType) -> set[str]:
    """Names that a function's code, and that of functions in it, may look up."""
    inner = (value for value in code.co_consts if isinstance(value, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


@functools.cache
def _installed_folders() -> frozenset[Path]:
    paths = sysconfig.get_paths()
    return frozenset(Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _is_installed(module: str | None) -> bool:
    """Whether a module is Python's, of this package or of an installed one, and not the user's own."""
    if module is None:
        return True
    package = module.partition(".")[0]
    if package == "hqsearch" or package in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and not _installed_folders().isdisjoint(Path(file).resolve().parents)
