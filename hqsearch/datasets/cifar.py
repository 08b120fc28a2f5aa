"""CIFAR-100, as published for Python."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

from sklearn.datasets import get_data_home
from sklearn.utils import Bunch

from hqsearch.datasets.bunch import check_part, missing_file, split_bunch
from hqsearch.datasets.restricted_pickle import read_pickled_dict

FOLDER = "cifar-100-python"
ARCHIVE = "cifar-100-python.tar.gz"
SOURCE = f'the archive {ARCHIVE}, the "CIFAR-100 python version" of www.cs.toronto.edu/~kriz/cifar.html'
N_CLASSES = 100

DESCRIPTION = """CIFAR-100

Colour images of 32 x 32 pixels, 100 classes ("fine labels"), as published: 500 training and 100 test images
of each class. Channels are red, green, blue.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""


def fetch_cifar100(
    data_home: str | os.PathLike | None = None, *, return_split: bool = False
) -> Bunch | tuple:
    """Read CIFAR-100 from a folder, with the published split.

    Pickles are read by an unpickler that admits arrays, numbers and strings only.

    Parameters
    ----------
    data_home : path-like, default=None
        The folder that holds `cifar-100-python.tar.gz`, or unpacked from it `cifar-100-python` with the files
        `train`, `test` and `meta`. None: scikit-learn's data folder, `sklearn.datasets.get_data_home()`.
    return_split : bool, default=False
        Whether to return (data_train, data_test, target_train, target_test) alone.

    Returns
    -------
    Bunch
        `data`, uint8 of shape (60000, 3, 32, 32), training images first; `target`, int64 of shape
        (60000,), 0 to 99; their parts `data_train`, `target_train` (50,000) and `data_test`,
        `target_test` (10,000); `target_names`, str of shape (100,); `DESCR`.

    Raises
    ------
    FileNotFoundError
        If a file is missing: the message says which, what it is part of, and where to put it.
    ValueError
        If a file is truncated or foreign; the message names it.

    Notes
    -----
    The papers train on all training images; hyperparameters are to be chosen on a part held out of them.

    Examples
    --------
    >>> from hqsearch.datasets import fetch_cifar100
    >>> fetch_cifar100("no/such/folder")
    Traceback (most recent call last):
    ...
    FileNotFoundError: ...cifar-100-python/meta is missing. It is part of the archive...
    """
    home = Path(get_data_home() if data_home is None else data_home).expanduser()
    meta_path, meta = _read(home, "meta")
    names = meta.get("fine_label_names")
    if not isinstance(names, list) or len(names) != N_CLASSES:
        raise ValueError(f"{meta_path} is foreign: expected fine_label_names, a list of {N_CLASSES} names.")
    train, test = (_part(*_read(home, name)) for name in ("train", "test"))
    return split_bunch(
        [train],
        [test],
        shape=(3, 32, 32),
        target_names=[name.decode("utf-8") if isinstance(name, bytes) else name for name in names],
        description=DESCRIPTION,
        return_split=return_split,
    )


def _part(path: Path, content: dict[str, Any]) -> Any:
    return check_part(
        path,
        content.get("data"),
        content.get("fine_labels"),
        n_pixels=3 * 32 * 32,
        n_classes=N_CLASSES,
    )


def _read(home: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Read one of the files: the unpacked one, else from the archive."""
    path = home / FOLDER / name
    if path.is_file():
        with path.open("rb") as file:
            return path, read_pickled_dict(file, path)
    archive = home / ARCHIVE
    if not archive.is_file():
        raise missing_file(path, SOURCE)
    try:
        with tarfile.open(archive, "r:gz") as members:
            member = members.extractfile(f"{FOLDER}/{name}")
            content = None if member is None else member.read()
    except (tarfile.TarError, EOFError, zlib.error, KeyError) as error:
        raise ValueError(f"{archive} is truncated or foreign, reading {FOLDER}/{name}: {error}") from error
    if content is None:
        raise ValueError(f"{archive} is foreign: {FOLDER}/{name} is no file.")
    return archive / FOLDER / name, read_pickled_dict(io.BytesIO(content), archive / FOLDER / name)
