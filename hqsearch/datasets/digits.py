"""Handwritten digits that scikit-learn ships, with a fixed split."""

from __future__ import annotations

import numpy as np
from sklearn import datasets
from sklearn.utils import Bunch

from hqsearch.datasets.bunch import split_bunch

N_TEST = 500

DESCRIPTION = """Digits

Grey images of handwritten digits, 8 x 8 pixels of 0 to 16, 10 classes: `sklearn.datasets.load_digits`, of
which the last 500 images are the test part.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
1998.
"""


def load_digits(*, return_split: bool = False) -> Bunch | tuple:
    """Read scikit-learn's digits in the form of the other data sets, with a fixed split.

    Parameters
    ----------
    return_split : bool, default=False
        Whether to return (data_train, data_test, target_train, target_test) alone.

    Returns
    -------
    Bunch
        `data`, uint8 of shape (1797, 1, 8, 8), values 0 to 16, training images first; `target`, int64 of
        shape (1797,), 0 to 9; their parts `data_train`, `target_train` (1,297) and `data_test`,
        `target_test` (500); `target_names`, str of shape (10,); `DESCR`.

    Examples
    --------
    >>> from hqsearch.datasets import load_digits
    >>> X_train, X_test, y_train, y_test = load_digits(return_split=True)
    >>> X_train.shape, X_test.shape
    ((1297, 1, 8, 8), (500, 1, 8, 8))
    """
    digits = datasets.load_digits()
    images = digits.images.astype(np.uint8)
    return split_bunch(
        [(images[:-N_TEST], digits.target[:-N_TEST])],
        [(images[-N_TEST:], digits.target[-N_TEST:])],
        shape=(1, 8, 8),
        target_names=digits.target_names,
        description=DESCRIPTION,
        return_split=return_split,
    )
