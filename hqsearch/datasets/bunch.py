"""The form that every data set comes in, and the error for a file that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils import Bunch


def split_bunch(
    train: list[tuple[np.ndarray, np.ndarray]],
    test: list[tuple[np.ndarray, np.ndarray]],
    *,
    shape: tuple[int, ...],
    target_names: Any,
    description: str,
    return_split: bool,
    **more: Any,
) -> Bunch | tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Join the parts of a data set: training items first, then test items, each in the order of its files.

    Parameters
    ----------
    train, test : list of (items, labels)
        Parts: uint8 arrays that can be reshaped to (n, *shape), and class indices of shape (n,). The lists
        are emptied, so that large parts need not be in memory twice.
    shape : tuple of int
        Of one item: channels, height and width of an image, or the number of features.
    target_names : array-like of str
        Names of the classes.
    description : str
        Becomes `DESCR`.
    return_split : bool
        Whether to return the four split arrays alone.
    **more : object
        Further entries of the bunch.

    Returns
    -------
    Bunch
        With `data`, uint8 of shape (n_samples, *shape); `target`, int64 of shape (n_samples,); their parts
        `data_train`, `target_train`, `data_test`, `target_test`, which are views; `target_names`, an array of
        str; `DESCR`. With `return_split=True` the tuple (data_train, data_test, target_train, target_test) in
        the order of `sklearn.model_selection.train_test_split`.
    """
    n_train = sum(len(labels) for _, labels in train)
    target = np.concatenate([labels for _, labels in train + test]).astype(np.int64)
    data = np.empty((len(target), *shape), dtype=np.uint8)
    start = 0
    for parts in (train, test):
        while parts:
            items, labels = parts.pop(0)
            data[start : start + len(labels)] = items.reshape(-1, *shape)
            start += len(labels)
            del items
    split = data[:n_train], data[n_train:], target[:n_train], target[n_train:]
    if return_split:
        return split
    return Bunch(
        data=data,
        target=target,
        data_train=split[0],
        data_test=split[1],
        target_train=split[2],
        target_test=split[3],
        target_names=np.asarray(target_names, dtype=np.str_),
        DESCR=description,
        **more,
    )


def check_part(
    path: Path, images: Any, labels: Any, *, n_pixels: int, n_classes: int, first_label: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Check images and labels as a file holds them; labels then begin at 0.

    Raises
    ------
    ValueError
        If they are of another type, shape or range than the data set's; the message names the file.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim < 2 or images[:1].size not in (0, n_pixels):
        raise ValueError(
            f"{path} is foreign: expected uint8 images of {n_pixels} values, got {images.dtype} of shape "
            f"{images.shape}."
        )
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not len(labels) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path} is foreign: expected {len(images)} integer labels, at least one, got {labels.dtype} of "
            f"shape {labels.shape}."
        )
    last_label = first_label + n_classes - 1
    if labels.min() < first_label or labels.max() > last_label:
        raise ValueError(
            f"{path} is foreign: expected labels {first_label} to {last_label}, got {labels.min()} to "
            f"{labels.max()}."
        )
    return images, labels.astype(np.int64) - first_label


def missing_file(path: Path, source: str) -> FileNotFoundError:
    """Error for a file that is not there: its name, where it comes from, where to put it."""
    return FileNotFoundError(
        f"{path} is missing. It is part of {source}; nothing is downloaded here, so put it into "
        f"{path.parent}, or name another place."
    )
