"""How an encoder looks at the items of an index, where their classes are not those of its training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gallery:
    """What `HierarchicalHashEncoder.gallery_of` says of items to be searched.

    Attributes
    ----------
    hidden_weight : float
        Of the hidden layer in the embedding.
    embedding_weight : float
        How much an index weighs the embedding's squared distance beside those of the level scores when it
        ranks leaves by their centroids; it is 1 among classes of the training.
    axes : ndarray of shape (embedding_dim + n_hidden, embedding_dim), dtype float32
        Projection of the trained embedding and of the hidden layer, side by side, to the embedding.
    epsilon : float
        How much farther than the nearest leaf those may be that a search opens beside it, see
        `HierarchicalHashIndex`; it is 0 among classes of the training.
    """

    hidden_weight: float
    embedding_weight: float
    axes: np.ndarray
    # Those of before had none.
    epsilon: float = 0.0
