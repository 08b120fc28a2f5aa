"""Class-balanced mini-batches: which items a training step sees."""

from __future__ import annotations

from typing import Any

import numpy as np


class ClassBalancedBatches:
    """Draws mini-batches that hold the same number of items of each of a few classes.

    Items of a class, and the classes themselves, are drawn without replacement until they are used up, then
    shuffled anew. A class with fewer items than a batch asks for repeats them.

    Parameters
    ----------
    y : ndarray of shape (n_samples,), dtype int64
        Class index of each item, 0 to n_classes - 1, each class at least once.
    classes_per_batch : int
        Classes in one group; at most n_classes are taken.
    batch_size : int
        Items in one group. It is rounded so that each class has the same, even number of items (at least
        two), because the npairs loss needs an anchor for each positive.
    rng : numpy.random.Generator
        Source of all shuffles.
    groups_per_step : int, default=1
        Class groups drawn at once.
    """

    def __init__(
        self,
        y: np.ndarray,
        *,
        classes_per_batch: int,
        batch_size: int,
        rng: np.random.Generator,
        groups_per_step: int = 1,
    ):
        self._rng = rng
        sizes = np.bincount(y)
        self.n_classes = len(sizes)
        self.n_groups = groups_per_step
        self.classes_per_group, self.items_per_class = _group_shape(
            self.n_classes, classes_per_batch, batch_size
        )
        per_step = items_per_step(self.n_classes, classes_per_batch, batch_size, groups_per_step)
        self.steps_per_epoch = max(1, round(len(y) / per_step))
        members = np.split(np.argsort(y, kind="stable"), np.cumsum(sizes)[:-1])
        self._queues = [_ShuffledQueue(items, rng) for items in members]
        self._class_queue = _ShuffledQueue(np.arange(self.n_classes), rng)

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Draw the items of one step.

        Returns
        -------
        items : ndarray of shape (n_groups, classes_per_group, items_per_class), dtype int64
            Positions in `y`.
        classes : ndarray of shape (n_groups, classes_per_group), dtype int64
            Their classes; those of one group differ.
        """
        classes = np.stack([self._class_queue.take(self.classes_per_group) for _ in range(self.n_groups)])
        items = np.stack([self._queues[c].take(self.items_per_class) for c in classes.ravel()])
        return items.reshape(*classes.shape, self.items_per_class), classes

    def get_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Where the draws stand.

        Returns
        -------
        arrays : dict of str to ndarray, dtype int64
            Order of each queue, one after the other, the classes' queue last; values taken from each.
        generator : dict
            State of the generator, which JSON can hold.
        """
        queues = [*self._queues, self._class_queue]
        arrays = {
            "orders": np.concatenate([queue._order for queue in queues]),
            "taken": np.array([queue._next for queue in queues], dtype=np.int64),
        }
        return arrays, dict(self._rng.bit_generator.state)

    def set_state(self, arrays: dict[str, np.ndarray], generator: dict[str, Any]) -> None:
        """Go on from what `get_state` gave, of batches over the same `y`.

        Raises
        ------
        ValueError
            If the arrays are of batches over other items or classes.
        """
        queues = [*self._queues, self._class_queue]
        stops = np.cumsum([len(queue._order) for queue in queues])
        if len(arrays["orders"]) != stops[-1] or len(arrays["taken"]) != len(queues):
            raise ValueError("the batches were drawn from other items or classes")
        orders = np.split(arrays["orders"], stops[:-1])
        for queue, order, taken in zip(queues, orders, arrays["taken"].tolist(), strict=True):
            queue._order, queue._next = order, taken
        self._rng.bit_generator.state = generator


def items_per_step(n_classes: int, classes_per_batch: int, batch_size: int, groups_per_step: int = 1) -> int:
    """Items that `ClassBalancedBatches` of these parameters draws at once."""
    classes_per_group, items_per_class = _group_shape(n_classes, classes_per_batch, batch_size)
    return groups_per_step * classes_per_group * items_per_class


def _group_shape(n_classes: int, classes_per_batch: int, batch_size: int) -> tuple[int, int]:
    """Classes of a group, and items of each."""
    classes_per_group = min(classes_per_batch, n_classes)
    return classes_per_group, max(2, batch_size // classes_per_group // 2 * 2)


class _ShuffledQueue:
    """Endless sequence of shuffled rounds over `values`; a single `take` repeats a value only if it must."""

    def __init__(self, values: np.ndarray, rng: np.random.Generator):
        self._rng = rng
        self._order = rng.permutation(values)
        self._next = 0

    def take(self, n: int) -> np.ndarray:
        taken = self._order[self._next : self._next + n]
        self._next += len(taken)
        while len(taken) < n:
            order = self._rng.permutation(self._order)
            # What this draw holds already goes to the end of the new round.
            seen = np.isin(order, taken)
            self._order = np.concatenate([order[~seen], order[seen]])
            self._next = min(n - len(taken), len(order))
            taken = np.concatenate([taken, self._order[: self._next]])
        return taken


def split_validation(
    y: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into a training part and a stratified validation part.

    A class always keeps at least one item in training, so a class of one item is never held out. Within a
    class the number held out is `fraction` of it, rounded up or down at random with the right mean.

    Parameters
    ----------
    y : ndarray of shape (n_samples,), dtype int64
        Class indices.
    fraction : float
        Share to hold out, in [0, 1).
    rng : numpy.random.Generator
        Source of the choice.

    Returns
    -------
    train, validation : ndarray of int64
        Ascending positions; together all of them.
    """
    sizes = np.bincount(y)
    wanted = np.floor(sizes * fraction + rng.random(len(sizes))).astype(np.int64)
    wanted = np.minimum(wanted, np.maximum(sizes - 1, 0)) if fraction > 0 else np.zeros_like(wanted)
    order = rng.permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank_in_class = np.arange(len(y)) - np.repeat(starts, sizes)
    held_out = rank_in_class < np.repeat(wanted, sizes)
    return np.sort(order[~held_out]), np.sort(order[held_out])
