"""Settings side by side on held-out items: what is varied, and that figures are of the named direction."""

import compare
import numpy as np
import pytest
from plain_encoder import PlainEncoder
from sklearn.frozen import FrozenEstimator

from hqsearch import HierarchicalHashIndex


def test_every_combination_is_compared():
    found = compare.combinations(["sparsity=1,2", "loss=npairs,proxy"])
    assert found == [{"sparsity": s, "loss": loss} for s in (1, 2) for loss in ("npairs", "proxy")]
    assert compare.combinations([]) == [{}]


def index_of(rows):
    """Index and items in two leaves, of one bucket each; the first two features are the scores."""
    X = np.array(rows, np.float32)
    encoder = FrozenEstimator(PlainEncoder(n_levels=1, branching_factor=2).fit(X))
    return HierarchicalHashIndex(encoder, probing="best_first", listing="codes").fit(X), X


@pytest.fixture
def index():
    return index_of([[9, 0, 0.0], [9, 0, 0.1], [0, 9, 0.0], [0, 9, 0.1]])


def test_queries_are_searched_among_the_items(index, monkeypatch):
    monkeypatch.setattr(compare, "KS", (1, 2))
    # Nearest to the first two items, but of their leaf's second class at 2; the scan finds the same.
    queries = np.array([[9, 0, -0.1]], np.float32)
    figures = compare.measure(*index, np.array([0, 1, 1, 1]), queries, np.array([0]))
    assert figures == pytest.approx((100, 50, 100, 50, 2))


def test_without_queries_no_item_is_its_own_neighbour(index, monkeypatch):
    monkeypatch.setattr(compare, "KS", (1, 1))
    figures = compare.measure(*index, np.array([0, 1, 2, 2]), None, None)
    # The first two have only each other in their leaf, of the other class; one of three is compared.
    assert figures == pytest.approx((50, 50, 50, 50, 3))


def test_the_scan_looks_beyond_the_leaf_and_comes_first(monkeypatch):
    monkeypatch.setattr(compare, "KS", (1, 1))
    # In the first leaf by its scores, and nearest to an item of the second.
    queries = np.array([[5, 4.9, 50]], np.float32)
    found = index_of([[9, 0, 0], [9, 0, 0.1], [0, 9, 0], [0, 9, 50]])
    figures = compare.measure(*found, np.array([0, 0, 0, 1]), queries, np.array([1]))
    assert figures == pytest.approx((100, 100, 0, 0, 2))
