"""An encoder of a user's, with no torch in it; scripts of other processes begin with this text."""

import json
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator

from hqsearch.codes import greedy_codes


class PlainEncoder(BaseEstimator):
    """Embeds items as themselves; their first features are the level scores."""

    def __init__(self, n_levels=2, branching_factor=4, sparsity=1, note=None):
        self.n_levels, self.branching_factor, self.sparsity = n_levels, branching_factor, sparsity
        self.note = note

    def fit(self, X, y=None):
        self.n_features_in_ = X.shape[1]
        return self

    def embed(self, X):
        return np.asarray(X, dtype=np.float32)

    def level_scores(self, X):
        size = self.n_levels * self.branching_factor
        return self.embed(X)[:, :size].reshape(-1, self.n_levels, self.branching_factor)

    def encode(self, X):
        return greedy_codes(self.level_scores(X), self.sparsity)

    def save(self, path):
        Path(path).write_text(json.dumps([self.branching_factor, self.sparsity, self.n_features_in_]))

    @classmethod
    def load(cls, path):
        branching_factor, sparsity, n_features = json.loads(Path(path).read_text())
        encoder = cls(branching_factor=branching_factor, sparsity=sparsity)
        encoder.n_features_in_ = n_features
        return encoder
