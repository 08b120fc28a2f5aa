"""A leaf table <-> plain named arrays, so that it can be kept in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from hqsearch.search.checks import check_shape
from hqsearch.search.snapshot import Tail
from hqsearch.search.table import LeafTable

if TYPE_CHECKING:
    from hqsearch.search.segments import Segment

# Fields of a table that are not arrays.
_NUMBERS = ("n_items", "n_live_items", "branching_factor", "n_levels", "sparsity", "embedding_dim", "storage")


def table_arrays(table: LeafTable) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Take a table apart.

    Items that still wait in the tail come as a segment of their own. Nothing is rounded or renumbered:
    removed positions stay vacant, and a search of the table that is put together again gives the same bits.

    Parameters
    ----------
    table : LeafTable
        Any table; it stays as it is.

    Returns
    -------
    numbers : dict
        `n_segments`, and the integers and the storage name that describe the table.
    arrays : dict of str to ndarray
        `live` of shape (n_items,) and dtype uint8, and for each segment `i` its arrays as
        ``segment{i}.{name}``. They are the table's own, not copies.

    Examples
    --------
    >>> import numpy as np
    >>> from hqsearch.search import LeafTable, table_arrays, table_from_arrays
    >>> table = LeafTable.build(np.eye(2), np.array([[0], [3]]), branching_factor=2, n_levels=2)
    >>> numbers, arrays = table_arrays(table)
    >>> numbers["n_items"], arrays["segment0.positions"]
    (2, array([0, 1], dtype=int32))
    >>> table_from_arrays(numbers, arrays).occupied_leaves()
    array([0, 3])
    """
    segments = table._directory.segments
    numbers = {name: getattr(table, name) for name in _NUMBERS} | {"n_segments": len(segments)}
    arrays = {"live": table._live_flags[: table.n_items]}
    for i, segment in enumerate(segments):
        arrays |= {f"segment{i}.{field.name}": getattr(segment, field.name) for field in fields(segment)}
    return numbers, arrays


def table_from_arrays(numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> LeafTable:
    """Put a table together from what `table_arrays` gave.

    Parameters
    ----------
    numbers : mapping
        As `table_arrays` returns it.
    arrays : mapping of str to ndarray
        Likewise; they are used as they are, and never written to.

    Returns
    -------
    table : LeafTable
        The table.

    Raises
    ------
    ValueError
        If an array is missing or not of the dtype and shape that the others ask for, or holds a place
        outside of another: the compiled search trusts them.
    """
    from hqsearch.search.segments import Segment

    table = object.__new__(LeafTable)
    for name in _NUMBERS:
        setattr(table, name, numbers[name])
    check_shape(table.branching_factor, table.n_levels, table.storage)
    segments = []
    for i in range(numbers["n_segments"]):
        parts = {field.name: arrays[f"segment{i}.{field.name}"] for field in fields(Segment)}
        segment = Segment(**parts)
        _check_segment(segment, table, f"segment{i}")
        segments.append(segment)
    flags = arrays["live"]
    _require(flags.dtype == np.uint8 and flags.shape == (table.n_items,), "live", "one byte an item")
    _require(np.count_nonzero(flags) == table.n_live_items, "live", "n_live_items ones")
    held = np.concatenate([np.empty(0, np.int32), *(segment.positions for segment in segments)])
    stored = np.bincount(held, minlength=table.n_items)
    _require(bool((stored <= 1).all() and stored[flags != 0].all()), "live", "each live item stored once")
    table._segments = tuple(segments)
    table._tail, table._n_tail = Tail(table.embedding_dim, table.sparsity), 0
    table._live_flags = flags
    return table


def _require(holds: bool, name: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"Expected {name} to hold {expected}, but it does not")


def _check_segment(segment: Segment, table: LeafTable, name: str) -> None:
    """Check all that the kernels rely on when they compute addresses."""
    from hqsearch.search import blocks

    n_rows, n_cells, n_leaves = segment.positions.size, segment.cell_start.size - 1, segment.leaf_ids.size
    raw = blocks.RAW_DTYPES[blocks.STORAGE_KINDS[table.storage]]
    wanted: dict[str, tuple[type, tuple[int, ...]]] = {
        "packed": (raw, (n_rows * table.embedding_dim + blocks.SLACK,)),
        "low": (np.float32, (table.embedding_dim,)),
        "step": (np.float32, (table.embedding_dim,)),
        "positions": (np.int32, (n_rows,)),
        "cell_start": (np.int64, (n_cells + 1,)),
        "cell_codes": (np.int64, (n_cells, table.sparsity)),
        "cell_live": (np.int32, (n_cells,)),
        "leaf_ids": (np.int64, (n_leaves,)),
        "leaf_start": (np.int64, (n_leaves + 1,)),
        "leaf_cells": (np.int32, (n_cells * table.sparsity,)),
    }
    for part, (dtype, shape) in wanted.items():
        array = getattr(segment, part)
        _require(
            array.dtype == dtype and array.shape == shape, f"{name}.{part}", f"{np.dtype(dtype)} of {shape}"
        )
        # A single query knows of an array its address and size alone.
        _require(array.flags.c_contiguous and array.flags.aligned, f"{name}.{part}", "values side by side")
    _require(n_rows > 0, f"{name}.positions", "an item")
    sizes, widths = np.diff(segment.cell_start), np.diff(segment.leaf_start)
    total = table.branching_factor**table.n_levels
    for part, holds in (
        ("positions", segment.positions.min() >= 0 and segment.positions.max() < table.n_items),
        ("cell_start", segment.cell_start[0] == 0 and segment.cell_start[-1] == n_rows and sizes.min() > 0),
        ("cell_live", (segment.cell_live >= 0).all() and (segment.cell_live <= sizes).all()),
        ("cell_codes", segment.cell_codes.min() >= 0 and segment.cell_codes.max() < total),
        ("leaf_ids", segment.leaf_ids[0] >= 0 and segment.leaf_ids[-1] < total),
        ("leaf_ids", (np.diff(segment.leaf_ids) > 0).all()),
        ("leaf_start", segment.leaf_start[0] == 0 and widths.min() > 0),
        ("leaf_start", segment.leaf_start[-1] == segment.leaf_cells.size),
        ("leaf_cells", segment.leaf_cells.min() >= 0 and segment.leaf_cells.max() < n_cells),
    ):
        _require(bool(holds), f"{name}.{part}", "places within the table, in order")
