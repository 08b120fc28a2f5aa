"""The UCI letters, from Debian's package of R data sets or from the repository's own file."""

from __future__ import annotations

import os
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from sklearn.utils import Bunch

from hqsearch.datasets.bunch import missing_file, split_bunch

# Where Debian's package r-cran-mlbench puts its file.
DEBIAN_FILE = Path("/usr/lib/R/site-library/mlbench/data/LetterRecognition.rda")
UCI_NAME = "letter-recognition.data"
SOURCE = f"the UCI letter recognition data (Debian's package r-cran-mlbench, or {UCI_NAME} of the repository)"
N_TRAIN, N_SAMPLES, N_FEATURES = 16_000, 20_000, 16
N_VALUES = 16

DESCRIPTION = """Letter recognition

Distorted capital letters of 20 fonts, 26 classes, by 16 integer features of 0 to 15: moments and edge counts
of the black pixels. The first 16,000 are the training part and the last 4,000 the test part, as the data's
authors split them.

Source: P. W. Frey, D. J. Slate, "Letter Recognition Using Holland-Style Adaptive Classifiers", Machine
Learning 6(2), 1991; UCI Machine Learning Repository.
"""


def load_letters(path: str | os.PathLike | None = None, *, return_split: bool = False) -> Bunch | tuple:
    """Read the UCI letters, with the official split.

    Parameters
    ----------
    path : path-like, default=None
        `letter-recognition.data` of the UCI repository, `LetterRecognition.rda` of R's package mlbench, or a
        folder that holds one of them. None is where Debian's package `r-cran-mlbench` puts the latter.
        Reading it needs the package `rdata` (the extra `letters`), but not R.
    return_split : bool, default=False
        Whether to return (data_train, data_test, target_train, target_test) alone.

    Returns
    -------
    Bunch
        `data`, uint8 of shape (20000, 16), values 0 to 15, training items first; `target`, int64 of shape
        (20000,), 0 to 25; their parts `data_train`, `target_train` (16,000) and `data_test`, `target_test`
        (4,000); `target_names`, "A" to "Z"; `DESCR`.

    Raises
    ------
    FileNotFoundError
        If the file is missing: the message says which, what it is part of, and where to put it.
    ImportError
        If the file is an .rda and rdata is not installed.
    ValueError
        If the file is truncated or foreign; the message names it.

    Notes
    -----
    Both files hold the same rows in the same order, from T,2,8,3,5,1,8,13,0,6,6,10,8,0,8,0,8 to
    A,4,9,6,6,2,9,5,3,1,8,1,8,2,7,2,8, so the split of the one is that of the other.

    Examples
    --------
    >>> from hqsearch.datasets import load_letters
    >>> load_letters("no/such/folder")
    Traceback (most recent call last):
    ...
    FileNotFoundError: ...letter-recognition.data is missing. It is part of the UCI letter recognition data...
    """
    file = _find_file(DEBIAN_FILE if path is None else Path(path).expanduser())
    letters, values = _read_rda(file) if file.suffix == ".rda" else _read_text(file)
    target = _check(file, letters, values)
    return split_bunch(
        [(values[:N_TRAIN], target[:N_TRAIN])],
        [(values[N_TRAIN:], target[N_TRAIN:])],
        shape=(N_FEATURES,),
        target_names=list(ascii_uppercase),
        description=DESCRIPTION,
        return_split=return_split,
    )


def _find_file(path: Path) -> Path:
    places = (path, path / UCI_NAME, path / DEBIAN_FILE.name)
    for place in places:
        if place.is_file():
            return place
    # A path without a suffix was meant as a folder.
    raise missing_file(path if path.suffix in (".rda", ".data") else places[1], SOURCE)


def _read_text(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read lines of a letter and its features, with commas between them."""
    try:
        rows = np.array([line.split(",") for line in path.read_text(encoding="ascii").splitlines()])
        return rows[:, 0], rows[:, 1:].astype(np.int64)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is truncated or foreign: {error}") from error


def _read_rda(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read R's data frame: a factor and numeric columns."""
    try:
        import rdata
    except ImportError as error:
        raise ImportError(
            f"Reading {path} needs rdata: install hqsearch[letters], or name a {UCI_NAME} instead."
        ) from error
    try:
        # The file names no encoding, of which rdata would warn.
        frame: Any = rdata.read_rda(path, default_encoding="ascii")["LetterRecognition"]
        return frame["lettr"].to_numpy(dtype=np.str_), frame.drop(columns="lettr").to_numpy(dtype=np.float64)
    except Exception as error:
        # A parser of damaged bytes stumbles in any way: over a length, a kind or a name that is none.
        raise ValueError(f"{path} is truncated or foreign: {error!r}") from error


def _check(path: Path, letters: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Check what a file holds; return the positions of the letters in the alphabet."""
    if values.shape != (N_SAMPLES, N_FEATURES):
        raise ValueError(
            f"{path} is truncated or foreign: expected {N_SAMPLES} rows of {N_FEATURES} features, got "
            f"features of shape {values.shape}."
        )
    for found, expected in ((letters, list(ascii_uppercase)), (values, np.arange(N_VALUES))):
        foreign = ~np.isin(found, expected)
        if foreign.any():
            raise ValueError(
                f"{path} is foreign: expected {expected[0]} to {expected[-1]}, got {found[foreign][0]}."
            )
    return np.searchsorted(list(ascii_uppercase), letters)
