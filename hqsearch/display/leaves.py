"""Which leaves are occupied, by which items, of which labels."""

from dataclasses import dataclass

import numpy as np
from sklearn.utils.validation import check_is_fitted


def encoder_of(index):
    """Return the encoder of a fitted index, or the argument when it is an encoder itself."""
    if hasattr(index, "encoder_"):
        return index.encoder_
    if hasattr(index, "encode"):
        return index
    if hasattr(index, "fit"):
        check_is_fitted(index)
    raise TypeError(f"Expected an index with encoder_ or an encoder with encode, but got {index!r}")


def occupied_leaves(encoder, X):
    """Encode items and list the leaves that they lie in.

    Returns
    -------
    leaf_ids : ndarray of shape (n_leaves,), int64
        Bucket ids of the occupied leaves, ascending.
    items : list of ndarray of int64
        Positions in `X` of the items in each leaf, ascending. An item with several buckets lies in
        several leaves.
    """
    codes = np.asarray(encoder.encode(X), dtype=np.int64)
    n_buckets = int(encoder.branching_factor) ** int(encoder.n_levels)
    if codes.min() < 0 or codes.max() >= n_buckets:
        raise ValueError(
            f"Expected bucket ids below branching_factor**n_levels = {n_buckets}, but the encoder gave ids "
            f"from {codes.min()} to {codes.max()}"
        )
    leaf_ids, leaf_of_entry = np.unique(codes, return_inverse=True)
    by_leaf = np.argsort(leaf_of_entry.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(leaf_of_entry.ravel()))
    # row-major: entry e belongs to item e // sparsity
    return leaf_ids, np.split(by_leaf // codes.shape[1], ends[:-1])


@dataclass(frozen=True)
class LeafContent:
    """Items of one leaf, those of its most frequent label first.

    `ranks` says for each item how frequent its label is in the leaf, 0 for the most frequent one;
    `counts` holds the labels in that order and how many items have each, and is empty without labels.
    """

    items: np.ndarray
    ranks: np.ndarray
    counts: list[tuple[str, int]]

    @classmethod
    def of(cls, items, y):
        """Sort `items`, positions in `y`, by how frequent their labels are among them."""
        if y is None:
            return cls(items, np.zeros(len(items), dtype=np.int64), [])
        labels = y[items]
        # what can't be sorted, None beside names, can be as it is written in the picture
        labels = labels.astype(str) if labels.dtype == object else labels
        labels, label_of_item, counts = np.unique(labels, return_inverse=True, return_counts=True)
        most_frequent_first = np.argsort(-counts, kind="stable")
        ranks = np.argsort(most_frequent_first)[label_of_item]
        order = np.argsort(ranks, kind="stable")
        named = [(str(labels[label]), int(counts[label])) for label in most_frequent_first]
        return cls(items[order], ranks[order], named)

    @property
    def size(self):
        """Number of items."""
        return len(self.items)

    def sample(self, n_items):
        """Draw items evenly over the labels: their (item, rank) pairs, all of them if there are fewer."""
        n_items = min(n_items, self.size)
        chosen = ((np.arange(n_items) + 0.5) * self.size / n_items).astype(int)
        return list(zip(self.items[chosen].tolist(), self.ranks[chosen].tolist(), strict=True))
