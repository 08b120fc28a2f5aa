"""Vectors in the layout that the scoring kernels read: blocks of `BLOCK` items, dimension by dimension.

A cell of n items is cut into blocks of `BLOCK` items and one shorter last block. A block of w items is stored
as a C-contiguous (embedding_dim, w) matrix, so that one vector instruction handles the same dimension of
several items and no horizontal sums are needed. Blocks lie back to back without padding: a kernel that
rounds w up to the vector width reads into whatever follows and ignores those lanes, hence `SLACK` spare
values at the end.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hqsearch.search.instructions import LEAF_KERNEL

BLOCK = 64
SLACK = 16
# Bytes of a cache line, and of the widest vector register: one that straddles two lines is twice the work.
LINE = 64

PLAIN, FLOAT16, INT8 = 0, 1, 2
STORAGE_KINDS = {"float32": PLAIN, "float16": FLOAT16, "int8": INT8}
RAW_DTYPES = (np.float32, np.uint16, np.uint8)

# A float16's bits, moved to float32's places, are 2**112 too small: the difference of the exponent biases.
_HALF_SCALE = np.float32(2.0**112)


def aligned_zeros(size: int, dtype: type) -> np.ndarray:
    """Zeros of shape (size,) that begin on a cache line, as kernels read whole blocks fastest."""
    n_bytes = size * np.dtype(dtype).itemsize
    room = np.zeros(n_bytes + LINE, dtype=np.uint8)
    first = -room.ctypes.data % LINE
    return room[first : first + n_bytes].view(dtype)


@njit(cache=True, nogil=True)
def aligned_floats(size):
    """Memory of shape (size,) and dtype float32 that begins on a cache line, for kernels to work in."""
    room = np.empty(size + LINE // 4, dtype=np.float32)
    first = (LINE - np.int64(room.ctypes.data) % LINE) % LINE // 4
    return room[first : first + size]


@njit(cache=True, nogil=True)
def pack(rows, order, cell_start, embedding_dim, packed):
    """Write ``rows[order]`` into `packed`, block by block; `rows` is flat and row-major."""
    for cell in range(cell_start.size - 1):
        first, end = cell_start[cell], cell_start[cell + 1]
        while first < end:
            width = min(BLOCK, end - first)
            for i in range(width):
                source = order[first + i] * embedding_dim
                target = first * embedding_dim + i
                for j in range(embedding_dim):
                    packed[target + j * width] = rows[source + j]
            first += width


@njit(cache=True, nogil=True)
def unpack(packed, cell_start, embedding_dim, rows):
    """Write the vectors of `packed` into the flat, row-major `rows`, in stored order."""
    for cell in range(cell_start.size - 1):
        first, end = cell_start[cell], cell_start[cell + 1]
        while first < end:
            width = min(BLOCK, end - first)
            for i in range(width):
                source = first * embedding_dim + i
                target = (first + i) * embedding_dim
                for j in range(embedding_dim):
                    rows[target + j] = packed[source + j * width]
            first += width


@njit(**LEAF_KERNEL)
def decode_half(bits, start, size, target):
    """Write `size` float16 values, given as uint16 bits, as float32 to the head of `target`."""
    words = target.view(np.uint32)
    for i in range(size):
        half = np.uint32(bits[start + i])
        words[i] = (half & np.uint32(0x7FFF)) << np.uint32(13) | (half & np.uint32(0x8000)) << np.uint32(16)
    for i in range(size):
        target[i] *= _HALF_SCALE


@njit(**LEAF_KERNEL)
def decode_bytes(levels, start, width, low, step, target):
    """Write a block of `width` items, given as steps above each dimension's lowest value, as float32."""
    for j in range(low.size):
        for i in range(width):
            target[j * width + i] = low[j] + step[j] * np.float32(levels[start + j * width + i])


def encode(vectors: np.ndarray, kind: int, low: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Turn float32 vectors into the raw values of a storage kind.

    Parameters
    ----------
    vectors : ndarray of shape (n_items, embedding_dim), dtype float32
        The vectors.
    kind : int
        One of `PLAIN`, `FLOAT16`, `INT8`.
    low, step : ndarray of shape (embedding_dim,), dtype float32
        The value of level 0 and the distance between levels of each dimension; read for `INT8` only.

    Returns
    -------
    raw : ndarray of shape (n_items, embedding_dim), dtype float32, uint16 or uint8
        The vectors themselves, the bits of their float16 form, or their levels 0..255.
    """
    if kind == PLAIN:
        return vectors
    if kind == FLOAT16:
        return vectors.astype(np.float16).view(np.uint16)
    scaled = (vectors - low) / np.where(step > 0, step, np.float32(1))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def decode(raw: np.ndarray, low: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Undo `encode` up to its rounding: float32 vectors from raw values of any kind."""
    if raw.dtype == np.float32:
        return raw
    if raw.dtype == np.uint16:
        return raw.view(np.float16).astype(np.float32)
    return low + step * raw.astype(np.float32)


def byte_scale(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest value and step of each dimension, so that 256 levels span what `vectors` hold."""
    low = vectors.min(axis=0)
    step = (vectors.max(axis=0) - low) / np.float32(255)
    return low, step.astype(np.float32)
