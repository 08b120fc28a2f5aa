"""Fashion-MNIST, from Debian's package or a folder of its four files."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils import Bunch

from hqsearch.datasets.bunch import check_part, missing_file, split_bunch

# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SOURCE = "Fashion-MNIST (Debian's package dataset-fashion-mnist)"
NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
UNSIGNED_BYTES = 8

DESCRIPTION = """Fashion-MNIST

Grey images of clothes, 28 x 28 pixels, 10 classes, with the official split: 60,000 training and 10,000 test
images.

Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms", 2017, arXiv:1708.07747.
"""


def load_fashion_mnist(
    data_home: str | os.PathLike | None = None, *, return_split: bool = False
) -> Bunch | tuple:
    """Read Fashion-MNIST, with the official split.

    Parameters
    ----------
    data_home : path-like, default=None
        The folder that holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
        `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, as they are or with `.gz`. None is where
        Debian's package `dataset-fashion-mnist` puts them.
    return_split : bool, default=False
        Whether to return (data_train, data_test, target_train, target_test) alone.

    Returns
    -------
    Bunch
        `data`, uint8 of shape (70000, 1, 28, 28), training images first; `target`, int64 of shape
        (70000,), 0 to 9; their parts `data_train`, `target_train` (60,000) and `data_test`,
        `target_test` (10,000); `target_names`, str of shape (10,); `DESCR`.

    Raises
    ------
    FileNotFoundError
        If a file is missing: the message says which, what it is part of, and where to put it.
    ValueError
        If a file is truncated or foreign; the message names it.

    Examples
    --------
    >>> from hqsearch.datasets import load_fashion_mnist
    >>> load_fashion_mnist("no/such/folder")
    Traceback (most recent call last):
    ...
    FileNotFoundError: ...train-images-idx3-ubyte.gz is missing. It is part of Fashion-MNIST...
    """
    home = DEBIAN_FOLDER if data_home is None else Path(data_home).expanduser()
    train, test = (_read_part(home, prefix) for prefix in ("train", "t10k"))
    return split_bunch(
        [train],
        [test],
        shape=(1, 28, 28),
        target_names=NAMES,
        description=DESCRIPTION,
        return_split=return_split,
    )


def _read_part(home: Path, prefix: str) -> Any:
    path, images = _read_idx(home, f"{prefix}-images-idx3-ubyte", n_dimensions=3)
    _, labels = _read_idx(home, f"{prefix}-labels-idx1-ubyte", n_dimensions=1)
    return check_part(path, images, labels, n_pixels=28 * 28, n_classes=len(NAMES))


def _read_idx(home: Path, name: str, *, n_dimensions: int) -> tuple[Path, np.ndarray]:
    """Read an idx file: two zeros, type, number of dimensions, big-endian sizes, values."""
    packed, plain = home / f"{name}.gz", home / name
    if plain.is_file():
        path, content = plain, plain.read_bytes()
    elif packed.is_file():
        path = packed
        try:
            content = gzip.decompress(packed.read_bytes())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{packed} is truncated or foreign: {error}") from error
    else:
        raise missing_file(packed, SOURCE)
    start = 4 + 4 * n_dimensions
    if content[:4] != bytes([0, 0, UNSIGNED_BYTES, n_dimensions]) or len(content) < start:
        raise ValueError(
            f"{path} is foreign: expected an idx file of unsigned bytes in {n_dimensions} dimensions."
        )
    shape = struct.unpack(f">{n_dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} is truncated or foreign: expected {math.prod(shape)} values for its shape {shape}, got "
            f"{len(content) - start}."
        )
    return path, np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
