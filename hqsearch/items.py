"""The fitted items of an index: an immutable snapshot, and the lock and counts around it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hqsearch.codes import CellScores
from hqsearch.search import LeafTable, SearchStats


@dataclass(frozen=True)
class FittedItems:
    """All that is known of the items in an index. A change gives a new one; readers keep the one they hold.

    Attributes
    ----------
    table : LeafTable
        Their vectors and leaves.
    cell_scores : CellScores
        Mean level scores of the items that share a code; shared by all snapshots.
    labels : ndarray of shape (table.n_items,) or None
        Label of each position; None when some item came without one.
    """

    table: LeafTable
    cell_scores: CellScores
    labels: np.ndarray | None

    def add(
        self, embedding: np.ndarray, level_scores: np.ndarray, codes: np.ndarray, labels: np.ndarray | None
    ) -> FittedItems:
        """Append items; see `LeafTable.add`."""
        if self.labels is None or labels is None:
            joined = None
        else:
            _check_same_kind(self.labels, labels)
            joined = np.concatenate([self.labels, labels])
        table = self.table.add(embedding, codes)
        self.cell_scores.add(codes, level_scores)
        return FittedItems(table, self.cell_scores, joined)

    def remove(self, positions: np.ndarray) -> FittedItems:
        """Take items out; their positions stay vacant."""
        return replace(self, table=self.table.remove(positions))

    def compact(self) -> FittedItems:
        """Renumber the items that are left 0, 1, 2, ... in the order of their positions."""
        left = self.table.live_positions()
        labels = None if self.labels is None else self.labels[left]
        return FittedItems(self.table.compact(), self.cell_scores, labels)


class IndexState:
    """What the threads that use an index share besides its items: a lock for changes, and counts.

    It is neither pickled nor copied with its values: a copy has locks of its own and counts from zero.
    """

    def __init__(self) -> None:
        self.changing = threading.Lock()
        self._counting = threading.Lock()
        self._total = SearchStats()

    def count(self, stats: SearchStats) -> None:
        """Add the counts of one search."""
        with self._counting:
            self._total = self._total + stats

    def total(self) -> SearchStats:
        """Return the counts so far."""
        return self._total

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def _check_same_kind(first: np.ndarray, second: np.ndarray) -> None:
    """Refuse to mix strings and numbers, which numpy would turn into strings without a word."""
    text = [labels.dtype.kind in "USO" for labels in (first, second)]
    if text[0] != text[1]:
        raise ValueError(
            f"Expected labels of the same kind as the fitted ones, {first.dtype}, got {second.dtype}."
        )
