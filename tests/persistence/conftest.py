"""What several tests of saved estimators share, fitted once a module."""

import numpy as np
import pytest
from plain_encoder import PlainEncoder
from saved_estimators import small_encoder
from sklearn.frozen import FrozenEstimator

from hqsearch import HierarchicalHashIndex


@pytest.fixture(scope="module")
def encoder(digits):
    return small_encoder().fit(digits[0][:300], digits[1][:300])


@pytest.fixture(scope="module")
def index(encoder, digits):
    return HierarchicalHashIndex(FrozenEstimator(encoder), sparsity=2).fit(digits[0], digits[1])


@pytest.fixture(scope="module")
def items():
    return np.random.default_rng(0).normal(size=(400, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def plain(items):
    return HierarchicalHashIndex(PlainEncoder()).fit(items, np.arange(400) % 5)
