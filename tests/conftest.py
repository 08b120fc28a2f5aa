"""Data, and an encoder, that several tests share."""

import matplotlib
import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator
from sklearn.datasets import load_digits, make_blobs

from hqsearch.codes import greedy_codes

matplotlib.use("Agg")

_cuda_is_available = torch.cuda.is_available


@pytest.fixture(scope="session", autouse=True)
def _auto_is_the_cpu():
    """Hide CUDA: many tests compare bits, which are promised on a CPU only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(autouse=True)
def _gpu_tests_see_the_gpu(request, monkeypatch):
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", _cuda_is_available)


@pytest.fixture(scope="session")
def digits():
    """600 handwritten digits to fit on and 200 to query with: X, y, X_query, y_query."""
    X, y = load_digits(return_X_y=True)
    return X[:600], y[:600], X[600:800], y[600:800]


@pytest.fixture(scope="session")
def blobs():
    """240 points in 6 far apart clusters of 5 features."""
    X, y = make_blobs(240, 5, centers=6, cluster_std=0.5, random_state=0)
    return X.astype(np.float64), y


class GridEncoder(BaseEstimator):
    """A user's own encoder with no torch in it: buckets are cells of a 4 x 4 grid over the plane of X."""

    n_levels = 2
    branching_factor = 4

    def __init__(self, sparsity=1):
        self.sparsity = sparsity

    def fit(self, X, y=None):
        return self

    def embed(self, X):
        return np.asarray(X, dtype=np.float32)

    def level_scores(self, X):
        return -np.abs(np.asarray(X, dtype=np.float32)[:, :, None] - np.arange(4, dtype=np.float32))

    def encode(self, X):
        return greedy_codes(self.level_scores(X), self.sparsity)


@pytest.fixture(scope="session")
def grid_encoder():
    """The class."""
    return GridEncoder
