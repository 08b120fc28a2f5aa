"""Attributes and parameters of estimators <-> JSON that names arrays. Only what is listed here is saved.

Numbers, strings, None and lists stand for themselves. Every JSON object has one key, which says what its
value stands for.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np

from hqsearch.persistence.files import DataReader, DataWriter
from hqsearch.search import LeafTable, table_arrays, table_from_arrays

# Classes of this package that are saved attribute by attribute.
_BY_ATTRIBUTES = {
    "CellScores": "hqsearch.codes",
    "FittedItems": "hqsearch.items",
    "Gallery": "hqsearch.gallery",
    "LeafCentroids": "hqsearch.centroids",
}
_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
# Arrays whose values lead to no place in another one. Wrong ones give wrong distances or another order of
# leaves, no worse, so they need not be read through before they are used.
_FIGURES = ("packed", "_scores")


class UnsavableError(ValueError):
    """A value that JSON and plain arrays cannot hold."""


def encode(value: Any, name: str, writer: DataWriter) -> Any:
    """Turn a value into JSON; its arrays go to `writer`.

    Parameters
    ----------
    value : object
        What is to be saved.
    name : str
        What it is called, in error messages and file names.
    writer : DataWriter
        Takes the arrays.

    Returns
    -------
    object
        None, a bool, int, float or str, a list of such, or a dict of one key.

    Raises
    ------
    UnsavableError
        A ValueError, if the value or one in it is of another kind.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is list:
        return [encode(item, f"{name}.{i}", writer) for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": encode(list(value), name, writer)}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": _encode_items(value, name, writer)}
    if isinstance(value, np.generic) and value.dtype.kind in "biufU" and value.dtype.itemsize <= 8:
        return {"scalar": [value.dtype.str, encode(value.item(), name, writer)]}
    if type(value) in (np.ndarray, np.memmap):
        return _encode_array(np.asarray(value), name, writer)
    if type(value) is np.random.RandomState:
        return {"random_state": encode(value.get_state(legacy=False), name, writer)}
    if type(value) is LeafTable:
        numbers, arrays = table_arrays(value)
        return {"leaf_table": [_encode_items(numbers, name, writer), _encode_items(arrays, name, writer)]}
    if _BY_ATTRIBUTES.get(type(value).__name__) == type(value).__module__:
        # What a pickle would hold, without views that are made again on first use.
        return {"object": [type(value).__name__, _encode_items(value.__getstate__(), name, writer)]}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise UnsavableError(
        f"Expected {name} to be made of None, numbers, strings, lists, tuples, dicts and arrays, got {kind}."
    )


def _encode_items(items: dict[str, Any], name: str, writer: DataWriter) -> dict[str, Any]:
    prefix = f"{name}." if name else ""
    encoded = {key: encode(item, prefix + key.lstrip("_"), writer) for key, item in items.items()}
    for key, saved in encoded.items():
        if key.endswith(_FIGURES) and isinstance(saved, dict) and "array" in saved:
            encoded[key] = {"figures": saved["array"]}
    return encoded


def _encode_array(array: np.ndarray, name: str, writer: DataWriter) -> dict[str, Any]:
    if array.dtype.kind in "biufcSUmM":
        return {"array": writer.add_array(name, array)}
    wrong = next((type(item).__name__ for item in array.ravel() if not isinstance(item, str)), None)
    if array.dtype != object or wrong is not None:
        what = array.dtype if array.dtype != object else f"objects, a {wrong} among them"
        raise UnsavableError(
            f"Expected {name} to be an array of numbers, booleans or strings, got one of {what}: only these "
            "can be saved without pickle."
        )
    # One after the other in UTF-8: an array of fixed width drops zeros at the end, and one long string
    # makes all of them long.
    pieces = [item.encode("utf-8", "surrogatepass") for item in array.ravel()]
    stops = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    text = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    files = [writer.add_array(f"{name}.text", text), writer.add_array(f"{name}.stops", stops)]
    return {"strings": [*files, list(array.shape)]}


def decode(saved: Any, reader: DataReader) -> Any:
    """Turn JSON of `encode` into the value again.

    Parameters
    ----------
    saved : object
        As `encode` returned it.
    reader : DataReader
        Gives the arrays.

    Returns
    -------
    object
        The value.

    Raises
    ------
    ValueError
        If an array is damaged, or the JSON is not as `encode` makes it.
    """
    if isinstance(saved, list):
        return [decode(item, reader) for item in saved]
    if not isinstance(saved, dict):
        return saved
    ((kind, content),) = saved.items()
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(decode(content, reader))
    if kind == "dict":
        return _decode_items(content, reader)
    if kind == "scalar":
        return np.dtype(content[0]).type(decode(content[1], reader))
    if kind == "array":
        return reader.array(content)
    if kind == "figures":
        return reader.array(content, guides=False)
    if kind == "strings":
        text, stops, shape = content
        return _decode_strings(reader.array(text), reader.array(stops), shape)
    if kind == "random_state":
        return _decode_random_state(decode(content, reader))
    if kind == "leaf_table":
        return table_from_arrays(*(_decode_items(part, reader) for part in content))
    if kind == "object":
        cls = getattr(import_module(_BY_ATTRIBUTES[content[0]]), content[0])
        value = object.__new__(cls)
        state = _decode_items(content[1], reader)
        # As pickle does it, for classes that keep less than they use.
        getattr(value, "__setstate__", vars(value).update)(state)
        return value
    raise ValueError(f"Expected the manifest to name a known kind of value, got {kind!r}.")


def _decode_items(items: dict[str, Any], reader: DataReader) -> dict[str, Any]:
    return {key: decode(item, reader) for key, item in items.items()}


def _decode_strings(text: np.ndarray, stops: np.ndarray, shape: list[int]) -> np.ndarray:
    joined = text.tobytes()
    array = np.empty(stops.size, dtype=object)
    start = 0
    for i, stop in enumerate(stops.tolist()):
        array[i] = joined[start:stop].decode("utf-8", "surrogatepass")
        start = stop
    return array.reshape(shape)


def _decode_random_state(state: dict[str, Any]) -> np.random.RandomState:
    if state["bit_generator"] not in _BIT_GENERATORS:
        raise ValueError(f"Expected a bit generator of numpy, got {state['bit_generator']!r}.")
    random_state = np.random.RandomState(getattr(np.random, state["bit_generator"])())
    random_state.set_state(state)
    return random_state
