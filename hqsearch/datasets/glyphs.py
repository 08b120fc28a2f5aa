"""glyph100: characters in many fonts, the stand-in for CIFAR-100."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
from sklearn.utils import Bunch

from hqsearch.datasets.bunch import check_part, missing_file, split_bunch

SOURCE = "glyph100, made of Debian's fonts for the benchmarks; it is not published, nor in the package"
ARRAYS = ("X", "y", "family", "is_test", "classes")

DESCRIPTION = """glyph100

Grey images of 100 characters (digits, Latin letters, signs, letters with diacritics), 32 x 32 pixels,
rendered from 175 font families with rotation, scale, shift, contrast, inversion and noise. Fonts of the test
part never occur in the training part. A few families draw placeholder boxes: real label noise.
"""


def load_glyph100(path: str | os.PathLike, *, return_split: bool = False) -> Bunch | tuple:
    """Read glyph100 from its npz file, split by font family.

    Parameters
    ----------
    path : path-like
        The file `glyph100.npz`.
    return_split : bool, default=False
        Whether to return (data_train, data_test, target_train, target_test) alone.

    Returns
    -------
    Bunch
        `data`, uint8 of shape (38895, 1, 32, 32), training images first, each part in the order of the file;
        `target`, int64 of shape (38895,), 0 to 99; their parts `data_train`, `target_train` (27,195) and
        `data_test`, `target_test` (11,700); `family`, int64 of shape (38895,), the font family of each
        image; `target_names`, str of shape (100,); `DESCR`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is truncated or foreign. Arrays of objects are refused, as reading them runs code.

    Examples
    --------
    >>> from hqsearch.datasets import load_glyph100
    >>> load_glyph100("no/such/glyph100.npz")
    Traceback (most recent call last):
    ...
    FileNotFoundError: ...glyph100.npz is missing. It is part of glyph100...
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise missing_file(path, SOURCE)
    try:
        # Opened here: np.load would leave a file open that turns out to be none of its own.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            X, y, family, is_test, classes = (arrays[name] for name in ARRAYS)
    except (KeyError, TypeError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or foreign: {error}") from error
    if classes.ndim != 1 or classes.dtype.kind != "U":
        raise ValueError(f"{path} is foreign: expected classes to be an array of str, got {classes.dtype}.")
    X, y = check_part(path, X, y, n_pixels=32 * 32, n_classes=len(classes))
    if is_test.shape != y.shape or is_test.dtype != np.bool_ or family.shape != y.shape:
        raise ValueError(f"{path} is foreign: expected family and a bool is_test of shape {y.shape}.")
    return split_bunch(
        [(X[~is_test], y[~is_test])],
        [(X[is_test], y[is_test])],
        shape=(1, 32, 32),
        target_names=classes,
        description=DESCRIPTION,
        return_split=return_split,
        family=np.concatenate([family[~is_test], family[is_test]]).astype(np.int64),
    )
