"""ImageNet downsampled to 32 x 32 pixels, as published for Python."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from sklearn.datasets import get_data_home
from sklearn.utils import Bunch

from hqsearch.datasets.bunch import check_part, missing_file, split_bunch
from hqsearch.datasets.restricted_pickle import read_pickled_dict

TRAIN_FILES = tuple(f"train_data_batch_{i}" for i in range(1, 11))
TEST_FILE = "val_data"
SOURCE = (
    'the "Downsampled ImageNet" data set in 32 x 32 pixels (Imagenet32_train and Imagenet32_val) of '
    "image-net.org/download-images, which asks for a login"
)
N_CLASSES = 1000

DESCRIPTION = """ImageNet-32

ImageNet (ILSVRC 2012) in colour images of 32 x 32 pixels, 1,000 classes; the published validation part serves
as test part. Class names are the published labels, "1" to "1000". Channels are red, green, blue.

Source: P. Chrabaszcz, I. Loshchilov, F. Hutter, "A Downsampled Variant of ImageNet as an Alternative to the
CIFAR datasets", 2017, arXiv:1707.08819.
"""


def fetch_imagenet32(
    data_home: str | os.PathLike | None = None, *, return_split: bool = False
) -> Bunch | tuple:
    """Read ImageNet-32 from a folder; the published validation part is the test part.

    Pickles are read by an unpickler that admits arrays, numbers and strings only.

    Parameters
    ----------
    data_home : path-like, default=None
        The folder that holds `train_data_batch_1` to `train_data_batch_10` and `val_data`. None:
        scikit-learn's data folder, `sklearn.datasets.get_data_home()`.
    return_split : bool, default=False
        Whether to return (data_train, data_test, target_train, target_test) alone.

    Returns
    -------
    Bunch
        `data`, uint8 of shape (1331167, 3, 32, 32) (4.1e9 bytes), training images first; `target`, int64 of
        shape (1331167,), 0 to 999; their parts `data_train`, `target_train` (1,281,167) and `data_test`,
        `target_test` (50,000); `target_names`, str of shape (1000,); `DESCR`.

    Raises
    ------
    FileNotFoundError
        If a file is missing: the message says which, what it is part of, and where to put it.
    ValueError
        If a file is truncated or foreign; the message names it.

    Examples
    --------
    >>> from hqsearch.datasets import fetch_imagenet32
    >>> fetch_imagenet32("no/such/folder")
    Traceback (most recent call last):
    ...
    FileNotFoundError: ...train_data_batch_1 is missing. It is part of the "Downsampled ImageNet" data set...
    """
    home = Path(get_data_home() if data_home is None else data_home).expanduser()
    # Before gigabytes are read.
    for name in (*TRAIN_FILES, TEST_FILE):
        if not (home / name).is_file():
            raise missing_file(home / name, SOURCE)
    return split_bunch(
        [_read_part(home / name) for name in TRAIN_FILES],
        [_read_part(home / TEST_FILE)],
        shape=(3, 32, 32),
        target_names=[str(label) for label in range(1, N_CLASSES + 1)],
        description=DESCRIPTION,
        return_split=return_split,
    )


def _read_part(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        content = read_pickled_dict(file, path)
    # The file's mean image is left aside: encoders standardise by the items that they are trained on.
    return check_part(
        path,
        content.get("data"),
        content.get("labels"),
        n_pixels=3 * 32 * 32,
        n_classes=N_CLASSES,
        first_label=1,
    )
