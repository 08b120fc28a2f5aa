"""Changing the fitted items of an index: adding, removing, closing the gaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from hqsearch.items import Described, FittedItems, IndexState


class UpdatesMixin:
    """Changes of an index: each puts a new snapshot of its items in the place of the old one."""

    _items: FittedItems
    _state: IndexState
    _describe: Callable[[Any], Described]

    def add(self, X: Any, y: Any = None) -> np.ndarray:
        """Append items.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Items.
        y : array-like of shape (n_samples,), default=None
            Their labels. Without them `labels_` is None from then on.

        Returns
        -------
        ndarray of shape (n_samples,), dtype int64
            Their positions, `n_positions_` and following. No other item is renumbered.

        Raises
        ------
        ValueError
            If X does not fit the encoder, or y is of the wrong length or kind.
        """
        check_is_fitted(self)
        labels = check_labels(X, y)
        described = self._describe(X)
        with self._state.changing:
            first = self._items.table.n_items
            self._items = self._items.add(*described, labels)
            return np.arange(first, self._items.table.n_items)

    def remove(self, positions: Any) -> Self:
        """Take items out. Their positions stay vacant: nothing is renumbered until `compact`.

        Parameters
        ----------
        positions : array-like of shape (n_removed,), dtype int64
            Positions of items; one that is listed twice is removed once.

        Returns
        -------
        HierarchicalHashIndex
            This index.

        Raises
        ------
        ValueError
            If a position was never given or is removed already. Nothing is removed then.
        """
        check_is_fitted(self)
        with self._state.changing:
            self._items = self._items.remove(positions)
        return self

    def compact(self) -> np.ndarray:
        """Close the gaps that `remove` left.

        Returns
        -------
        ndarray of shape (n_samples_fit_,), dtype int64
            The old position of each item; its new one is its place in this array.
        """
        check_is_fitted(self)
        with self._state.changing:
            left = self._items.table.live_positions()
            self._items = self._items.compact()
        return left


def check_labels(X: Any, y: Any) -> np.ndarray | None:
    """Validate and copy labels of items, one for each of X; None where there are none."""
    if y is None:
        return None
    y = column_or_1d(y, warn=True)
    check_consistent_length(X, y)
    # What the caller does with theirs later is no change of the index.
    return y.copy()
