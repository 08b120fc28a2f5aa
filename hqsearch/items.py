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
    label_parts : tuple of ndarray, or None
        Labels by position, in a few parts, the earlier ones the larger; None when some item came without.
    """

    table: LeafTable
    cell_scores: CellScores
    label_parts: tuple[np.ndarray, ...] | None

    @property
    def labels(self) -> np.ndarray | None:
        """Label of each position, of shape (table.n_items,), or None."""
        if self.label_parts is None:
            return None
        return self.label_parts[0] if len(self.label_parts) == 1 else np.concatenate(self.label_parts)

    def __getstate__(self) -> dict[str, Any]:
        return {"table": self.table, "cell_scores": self.cell_scores, "labels": self.labels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        labels = state["labels"]
        parts = None if labels is None else (labels,)
        vars(self).update(table=state["table"], cell_scores=state["cell_scores"], label_parts=parts)

    def add(
        self, embedding: np.ndarray, level_scores: np.ndarray, codes: np.ndarray, labels: np.ndarray | None
    ) -> FittedItems:
        """Append items; see `LeafTable.add`."""
        parts = None
        if self.label_parts is not None and labels is not None:
            _check_same_kind(self.label_parts[0], labels)
            parts = (*self.label_parts, labels)
            # As a binary counter carries, so that an item is copied a few times, however singly items come.
            while len(parts) > 1 and len(parts[-2]) <= 2 * len(parts[-1]):
                parts = (*parts[:-2], np.concatenate(parts[-2:]))
        table = self.table.add(embedding, codes)
        self.cell_scores.add(codes, level_scores)
        return FittedItems(table, self.cell_scores, parts)

    def remove(self, positions: np.ndarray) -> FittedItems:
        """Take items out; their positions stay vacant."""
        return replace(self, table=self.table.remove(positions))

    def compact(self) -> FittedItems:
        """Renumber the items that are left 0, 1, 2, ... in the order of their positions."""
        left = self.table.live_positions()
        labels = self.labels
        parts = None if labels is None else (labels[left],)
        return FittedItems(self.table.compact(), self.cell_scores, parts)


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
