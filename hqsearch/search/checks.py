"""Arguments of a table -> arrays of the right type, or a ValueError that says what was expected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hqsearch.search.table import LeafTable

STORAGES = ("float32", "float16", "int8")
PROBINGS = ("best_first", "lexicographic")
# A neighbour's key holds its position in 31 bits.
MAX_ITEMS = 2**31 - 2
# Bucket ids are int64, with a bit to spare for sums.
MAX_LEAVES = 2**62


class _Window:
    """An array's memory, announced as writable."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def readable(array: np.ndarray) -> np.ndarray:
    """Return the same memory as an array of the one type that kernels are compiled for.

    For numba a read-only array is of another type: every kernel would be compiled again, for seconds,
    when a query comes read-only or a table lies in a mapped file. No kernel writes to its inputs.
    """
    return np.asarray(array if array.flags.writeable else _Window(array))


def check_shape(branching_factor: int, n_levels: int, storage: str) -> None:
    """Validate what a table is built for."""
    if storage not in STORAGES:
        raise ValueError(f"Expected storage to be one of {STORAGES}, got {storage!r}")
    if branching_factor < 1 or n_levels < 1 or int(branching_factor) ** int(n_levels) > MAX_LEAVES:
        raise ValueError(
            "Expected branching_factor >= 1, n_levels >= 1 and branching_factor ** n_levels <= 2 ** 62, "
            f"but branching_factor = {branching_factor}, n_levels = {n_levels}"
        )


def check_items(vectors, codes, table: LeafTable) -> tuple[np.ndarray, np.ndarray]:
    """Validate items to be stored; return them as contiguous float32 and int64 arrays."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise ValueError(f"Expected codes of an integer dtype, got {codes.dtype}")
    codes = np.ascontiguousarray(codes, dtype=np.int64)
    if vectors.ndim != 2 or vectors.shape[1] == 0 or table.embedding_dim not in (-1, vectors.shape[1]):
        wanted = "embedding_dim >= 1" if table.embedding_dim == -1 else str(table.embedding_dim)
        raise ValueError(f"Expected vectors of shape (n_items, {wanted}), got {vectors.shape}")
    right_width = codes.ndim == 2 and codes.shape[1] > 0 and table.sparsity in (-1, codes.shape[1])
    if not right_width or len(codes) != len(vectors):
        wanted = "sparsity >= 1" if table.sparsity == -1 else str(table.sparsity)
        raise ValueError(f"Expected codes of shape ({len(vectors)}, {wanted}), got {codes.shape}")
    if table.n_items + len(vectors) > MAX_ITEMS:
        raise ValueError(f"Expected n_items <= {MAX_ITEMS}, got {table.n_items + len(vectors)}")
    if len(vectors) == 0:
        return vectors, codes
    if not np.isfinite(vectors).all():
        raise ValueError("Input vectors contains NaN or infinity.")
    if table.storage == "float16" and np.abs(vectors).max() > np.finfo(np.float16).max:
        raise ValueError(f"Expected vectors within ±65504 for storage='float16', got {np.abs(vectors).max()}")
    n_leaves = table.branching_factor**table.n_levels
    if codes.min() < 0 or codes.max() >= n_leaves:
        raise ValueError(f"Expected codes in [0, {n_leaves}), got {codes.min()} to {codes.max()}")
    if codes.shape[1] > 1:
        ascending = np.sort(codes, axis=1)
        if (ascending[:, 1:] == ascending[:, :-1]).any():
            raise ValueError("Expected different leaves within each row of codes, got a leaf twice")
    return readable(vectors), readable(codes)


def check_queries(
    queries, level_scores, codes, table: LeafTable
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validate queries but for NaN and infinity, which the engine finds while it reads them."""
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != table.embedding_dim:
        raise ValueError(f"Expected queries of shape (n_queries, {table.embedding_dim}), got {queries.shape}")
    level_scores = np.ascontiguousarray(level_scores, dtype=np.float32)
    wanted = (len(queries), table.n_levels, table.branching_factor)
    if level_scores.shape != wanted:
        raise ValueError(f"Expected level_scores of shape {wanted}, got {level_scores.shape}")
    codes = np.ascontiguousarray(codes, dtype=np.int64)
    if codes.ndim != 2 or len(codes) != len(queries) or codes.shape[1] == 0:
        raise ValueError(f"Expected codes of shape ({len(queries)}, sparsity >= 1), got {codes.shape}")
    return readable(queries), readable(level_scores), readable(codes)


def check_allowed(allowed, n_items: int) -> np.ndarray:
    """Validate a mask over positions; return its flags as bytes."""
    allowed = np.ascontiguousarray(allowed)
    if allowed.dtype != np.bool_ or allowed.shape != (n_items,):
        raise ValueError(
            f"Expected allowed of shape ({n_items},) and dtype bool, got {allowed.shape} and {allowed.dtype}"
        )
    return readable(allowed.view(np.uint8))


def check_exclude(exclude, n_queries: int, n_items: int) -> np.ndarray:
    """Validate the positions that queries leave out; return them as int64."""
    exclude = np.ascontiguousarray(exclude, dtype=np.int64)
    if exclude.shape != (n_queries,):
        raise ValueError(f"Expected exclude of shape ({n_queries},), got {exclude.shape}")
    if n_queries and (exclude.min() < -1 or exclude.max() >= n_items):
        raise ValueError(f"Expected exclude in [-1, {n_items}), got {exclude.min()} to {exclude.max()}")
    return exclude


def check_removal(positions, live_flags: np.ndarray, n_items: int) -> np.ndarray:
    """Validate positions to be removed; return them as ascending int64 without repetitions."""
    positions = np.atleast_1d(np.asarray(positions))
    if positions.ndim != 1 or (positions.size and positions.dtype.kind not in "iu"):
        raise ValueError(
            f"Expected positions of shape (n_positions,) and an integer dtype, "
            f"got {positions.shape} and {positions.dtype}"
        )
    positions = np.unique(positions.astype(np.int64))
    if positions.size and (positions[0] < 0 or positions[-1] >= n_items):
        raise ValueError(f"Expected positions in [0, {n_items}), got {positions[0]} to {positions[-1]}")
    gone = positions[live_flags[positions] == 0]
    if gone.size:
        raise ValueError(f"Expected positions of live items, but {gone[:5].tolist()} were removed already")
    return positions


def check_probing(probing: str) -> None:
    """Validate the name of an order of leaves."""
    if probing not in PROBINGS:
        raise ValueError(f"Expected probing to be one of {PROBINGS}, got {probing!r}")


def check_count(name: str, value) -> int:
    """Validate a number that must be an integer of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ValueError(f"Expected {name} to be an integer >= 1, got {value!r}")
    # More than this is more than there is of anything.
    return min(value.__index__(), MAX_LEAVES)
