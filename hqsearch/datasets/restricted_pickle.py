"""Published pickles -> arrays, without running anything that a pickle asks for."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np


def read_pickled_dict(file: IO[bytes], path: Path) -> dict[str, Any]:
    """Read a pickled dict of numpy arrays, numbers, strings and lists, as Python 2 or 3 wrote it.

    A pickle is a program. Of what it may call there is nothing here but stand-ins that note down an array's
    shape, type and bytes; numpy makes the array afterwards and checks that they fit.

    Parameters
    ----------
    file : binary file
        The pickle.
    path : Path
        Its name, for errors.

    Returns
    -------
    dict
        Values by key, keys as str; strings of Python 2 as bytes; arrays are read-only.

    Raises
    ------
    ValueError
        If the pickle is truncated, is not a dict, or names anything but numpy arrays, dtypes and scalars.
    """
    try:
        content = _Unpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise TypeError(f"expected a dict, got {type(content).__name__}")
        return {_text(key): _plain(value) for key, value in content.items()}
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # Bytes that are no pickle can end in any exception at all.
        raise ValueError(f"{path} is truncated or foreign: {error}") from error


class _Dtype:
    """Notes what a pickled dtype is made from."""

    def __init__(self, name: Any, align: Any = False, copy: Any = True):
        self._name = _text(name)

    def __setstate__(self, state: tuple) -> None:
        byte_order = state[1]
        self._name = _text(byte_order).strip("|=") + self._name.lstrip("|=<>")

    def made(self) -> np.dtype:
        dtype = np.dtype(self._name)
        if dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"an array of {dtype}")
        return dtype


class _Array:
    """Notes what a pickled array is made from."""

    def __setstate__(self, state: tuple) -> None:
        _, self._shape, self._dtype, self._is_fortran, self._raw = state

    def made(self) -> np.ndarray:
        order: Any = "F" if self._is_fortran else "C"
        return np.frombuffer(self._raw, dtype=self._dtype.made()).reshape(self._shape, order=order)


class _Callable:
    """What a pickle may name. No class of these has a `__dict__`, so a pickle can't change them either."""

    __slots__ = ()


class _MakeArray(_Callable):
    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, typecode: Any) -> _Array:
        return _Array()


class _MakeDtype(_Callable):
    __slots__ = ()

    def __call__(self, *arguments: Any) -> _Dtype:
        return _Dtype(*arguments)


class _MakeScalar(_Callable):
    __slots__ = ()

    def __call__(self, dtype: _Dtype, raw: bytes) -> np.generic:
        return np.frombuffer(raw, dtype=dtype.made())[0]


class _MakeBytes(_Callable):
    """The way in which Python 3 writes bytes with protocol 2."""

    __slots__ = ()

    def __call__(self, text: str, encoding: Any = "latin1") -> bytes:
        return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], _Callable] = {
    ("numpy", "ndarray"): _Callable(),
    ("numpy", "dtype"): _MakeDtype(),
    ("numpy.core.multiarray", "_reconstruct"): _MakeArray(),
    ("numpy._core.multiarray", "_reconstruct"): _MakeArray(),
    ("numpy.core.multiarray", "scalar"): _MakeScalar(),
    ("numpy._core.multiarray", "scalar"): _MakeScalar(),
    ("_codecs", "encode"): _MakeBytes(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no numpy array")
        return _ALLOWED[module, name]


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    return value.made() if isinstance(value, _Array) else value
