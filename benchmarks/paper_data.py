"""Data sets of the papers' experiments, parted into training items, gallery and queries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from hqsearch import datasets

GLYPHS = Path(__file__).parents[2] / "shared" / "data" / "glyph100.npz"
# The deep-metric-learning custom: train on the first classes, search among the others.
SEEN_SHARE = 0.7
PROTOCOLS = ("closed", "unseen")


@dataclass(frozen=True)
class Task:
    """What is trained on and what is searched.

    Attributes
    ----------
    X, y : ndarray
        Training items and labels.
    gallery_X, gallery_y : ndarray
        Items that test->train searches: the training items, or in the unseen protocol training-part items of
        other classes.
    query_X, query_y : ndarray
        Queries; they are the gallery of test->test too.
    """

    X: np.ndarray
    y: np.ndarray
    gallery_X: np.ndarray
    gallery_y: np.ndarray
    query_X: np.ndarray
    query_y: np.ndarray


def load(name, data_home=None):
    """Read (X_train, X_test, y_train, y_test) of a data set; vectors are flattened for the mlp."""
    loaders = {
        "digits": lambda: datasets.load_digits(return_split=True),
        "letters": lambda: datasets.load_letters(data_home, return_split=True),
        "fashion_mnist": lambda: datasets.load_fashion_mnist(data_home, return_split=True),
        "glyph100": lambda: datasets.load_glyph100(data_home or GLYPHS, return_split=True),
        "cifar100": lambda: datasets.fetch_cifar100(data_home, return_split=True),
        "imagenet32": lambda: datasets.fetch_imagenet32(data_home, return_split=True),
    }
    X_train, X_test, y_train, y_test = loaders[name]()
    if name == "digits":
        # 8 x 8 pixels are features rather than images.
        X_train, X_test = (X.reshape(len(X), -1) for X in (X_train, X_test))
    return X_train, X_test, y_train, y_test


NAMES = ("digits", "letters", "fashion_mnist", "glyph100", "cifar100", "imagenet32")


def limited(X, y, n_items, seed=0):
    """Draw a stratified subset of at most `n_items`."""
    if n_items is None or n_items >= len(y):
        return X, y
    X, _, y, _ = train_test_split(X, y, train_size=n_items, random_state=seed, stratify=y)
    return X, y


def make_task(data, protocol, *, validation_only=False):
    """Part a data set.

    Parameters
    ----------
    data : tuple
        (X_train, X_test, y_train, y_test).
    protocol : {"closed", "unseen"}
        Whether queries are of the training classes.
    validation_only : bool, default=False
        Whether a stratified tenth of the training items stands in for the test items, so that choices can be
        made on it. The unseen protocol then also parts the seen classes only.

    Returns
    -------
    Task
    """
    X_train, X_test, y_train, y_test = data
    if validation_only:
        n_seen = round(SEEN_SHARE * (int(y_train.max()) + 1))
        if protocol == "unseen":
            X_train, y_train = X_train[y_train < n_seen], y_train[y_train < n_seen]
        X_train, X_test, y_train, y_test = train_test_split(
            X_train, y_train, test_size=0.1, random_state=0, stratify=y_train
        )
    if protocol == "closed":
        return Task(X_train, y_train, X_train, y_train, X_test, y_test)
    n_seen = round(SEEN_SHARE * (int(y_train.max()) + 1))
    seen, test = y_train < n_seen, y_test >= n_seen
    return Task(X_train[seen], y_train[seen], X_train[~seen], y_train[~seen], X_test[test], y_test[test])
