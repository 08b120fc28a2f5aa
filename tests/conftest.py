"""Data that several tests share."""

import matplotlib
import numpy as np
import pytest
from sklearn.datasets import load_digits, make_blobs

matplotlib.use("Agg")


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
