"""Leaves that are opened because they are hardly farther than the nearest."""

import pickle

import numpy as np
import pytest
from leaf_distances import LEVELS, D, describe, distances_by_definition, refined, search_by_definition
from plain_encoder import PlainEncoder

from hqsearch import HierarchicalHashIndex
from hqsearch import items as items_module
from hqsearch.gallery import Gallery
from hqsearch.items import FittedItems


def test_each_query_opens_as_many_as_are_near_to_it():
    fitted, queries = describe(300, 0), describe(40, 1)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    distances = np.sqrt(distances_by_definition(fitted, queries)[0])
    n_near = (distances <= 1.1 * distances.min(1, keepdims=True)).sum(1)
    assert len(set(n_near.tolist())) > 3
    for i, n_leaves in enumerate(n_near):
        alone = items.search(tuple(a[i : i + 1] for a in queries), 1, epsilon=0.1)
        assert alone.stats.leaves_opened == n_leaves
    together = items.search(queries, 1, epsilon=0.1)
    assert together.stats.leaves_opened == n_near.sum()


def test_none_is_in_reserve_where_the_near_ones_hold_enough():
    fitted, queries = describe(300, 0), describe(40, 1)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    for n_wanted, needed in ((1, False), (40, True)):
        opened, _ = items.leaves_to_open(queries, n_wanted, n_probes=None, probing="centroids", epsilon=0.1)
        in_reserve = ~opened[2][opened[2] < 0]
        assert (in_reserve != items_module._NOWHERE).any() == needed
        assert (opened[2] != ~items_module._NOWHERE).any(0).all()


def test_queries_do_not_depend_on_each_other_or_on_how_many_leaves_are_ranked(monkeypatch):
    fitted, queries = describe(3000, 0), describe(400, 1)
    items = refined(fitted)
    whole = items.search(queries, 20, epsilon=0.3)
    assert whole.stats.leaves_opened > 2 * 400
    for few in (1, 7, 1000):
        monkeypatch.setattr(items_module, "_FEW_RANKED", few)
        for options in ({}, {"n_jobs": 2}):
            again = items.search(queries, 20, epsilon=0.3, **options)
            np.testing.assert_array_equal(again.positions, whole.positions)
            assert again.stats == whole.stats
    parts = [tuple(a[part] for a in queries) for part in (slice(150), slice(150, None))]
    halves = [items.search(part, 20, epsilon=0.3) for part in parts]
    np.testing.assert_array_equal(np.concatenate([half.positions for half in halves]), whole.positions)
    assert halves[0].stats + halves[1].stats == whole.stats


@pytest.mark.parametrize("listing", ["codes", "centroids"])
@pytest.mark.parametrize("sparsity", [1, 3])
def test_after_changes_it_opens_what_is_near_and_holds_items(listing, sparsity):
    fitted, more, queries = (describe(n, seed, sparsity) for seed, n in enumerate((900, 700, 30)))
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS, listing=listing)
    # Into a segment of its own.
    items = items.add(*more, None).remove(np.arange(0, 1600, 3))
    vectors = np.concatenate([fitted[0], more[0]])
    sizes = np.array([len(items.table.items_in_leaf(leaf)) for leaf in items.centroids.leaf_ids])
    rows, distances = items.centroids.rank(*queries[:2], int((sizes > 0).sum()), allowed=sizes > 0)
    for k in (2, 60):
        found = items.search(queries, k, epsilon=0.2)
        n_candidates = 0
        for i, query in enumerate(queries[0]):
            n_near = int((distances[i] <= 1.2 * distances[i, 0]).sum())
            n_opened, candidates = 0, np.empty(0, dtype=np.int64)
            while n_opened < max(n_near, sparsity) or len(candidates) < k:
                leaf = items.centroids.leaf_ids[rows[i, n_opened]]
                candidates = np.union1d(candidates, items.table.items_in_leaf(leaf))
                n_opened += 1
            gaps = np.square(vectors[candidates] - query).sum(1)
            np.testing.assert_array_equal(found.positions[i], candidates[np.argsort(gaps)[:k]])
            n_candidates += len(candidates)
        assert found.stats.candidates == n_candidates


def test_the_64_nearest_leaves_at_most():
    fitted, queries = describe(30_000, 0), describe(20, 1)
    items = refined(fitted)
    assert len(items.centroids.leaf_ids) > 64
    assert items.search(queries, 1, epsilon=1e6).stats.leaves_opened == 64 * 20


def test_an_item_leaves_itself_out_and_opens_no_further_leaf_for_that():
    fitted = describe(300, 0)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    for k in (1, 5, 20):
        result = items.search(fitted, k, epsilon=0.05, exclude=np.arange(300))
        expected, n_candidates = search_by_definition(
            fitted, fitted, np.ones(300, bool), k, 1, exclude=np.arange(300), epsilon=0.05
        )
        np.testing.assert_array_equal(result.positions, expected)
        assert result.stats.candidates == n_candidates


def test_a_radius_search_opens_the_same_leaves():
    fitted, queries = describe(300, 0), describe(40, 1)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    within = items.radius_search(queries, 1e6, epsilon=0.1)
    _, n_candidates = search_by_definition(fitted, queries, np.ones(300, bool), 0, 1, epsilon=0.1)
    assert within.indptr[-1] == within.stats.candidates == n_candidates


@pytest.fixture(scope="module")
def items_of_ten_classes():
    rng = np.random.default_rng(0)
    y = np.arange(600) % 10
    centres = 2 * np.eye(10)
    return centres[y] + rng.normal(size=(600, 10)), y, centres[y[:50]] + rng.normal(size=(50, 10))


@pytest.fixture
def index(items_of_ten_classes):
    X, y, _ = items_of_ten_classes
    return HierarchicalHashIndex(PlainEncoder(), n_neighbors=3).fit(X, y)


def opened(index, X, **options):
    return index.kneighbors(X, return_stats=True, **options)[2].leaves_opened


def test_an_index_takes_it_as_a_parameter_and_from_a_call(index, items_of_ten_classes):
    X = items_of_ten_classes[2]
    one, more = opened(index, X), opened(index, X, epsilon=0.3)
    assert one == 50 < more
    assert opened(index, X, n_probes=1, epsilon=0.3) == more
    assert opened(index, X, n_probes=3, epsilon=0.3) > max(more, opened(index, X, n_probes=3))
    index.set_params(epsilon=0.3)
    assert opened(index, X) == more
    assert opened(index, X, epsilon=0) == one
    wider = index.kneighbors(X)[1]
    graph = index.set_params(epsilon="auto").kneighbors_graph(X, epsilon=0.3)
    np.testing.assert_array_equal(graph.indices.reshape(50, 3), wider)
    few, many = (index.radius_neighbors(X, 1e6, return_distance=False, epsilon=e) for e in (0, 0.3))
    assert sum(map(len, few)) < sum(map(len, many))


def test_auto_is_what_the_gallery_says_where_probes_are_not_counted(index, items_of_ten_classes):
    X = items_of_ten_classes[2]
    index.encoder_.describe = lambda X, gallery=None: (
        index.encoder_.embed(X), index.encoder_.level_scores(X), index.encoder_.encode(X)
    )  # fmt: skip
    one, more = opened(index, X), opened(index, X, epsilon=0.3)
    index.gallery_ = Gallery(3.0, 4.0, np.eye(2), epsilon=0.3)
    assert opened(index, X) == more
    assert opened(index, X, n_probes=1) == opened(index, X, epsilon=0.0) == one
    assert opened(index, X, n_probes=1, epsilon=0.3) == more
    # One of before.
    index.gallery_ = Gallery(3.0, 4.0, np.eye(2))
    assert opened(index, X) == one


def test_fitted_items_as_queries_open_further_leaves_too(index):
    one, more = (index.kneighbors(epsilon=e, return_stats=True)[2].leaves_opened for e in (0.0, 3.0))
    assert one == 600 < more


def test_an_index_that_was_pickled_before_opens_none(index, items_of_ten_classes):
    del index.epsilon
    earlier = pickle.loads(pickle.dumps(index))
    assert opened(earlier, items_of_ten_classes[2]) == 50
    assert earlier.get_params()["epsilon"] == 0


def test_without_centroids_there_is_nothing_to_compare(items_of_ten_classes, monkeypatch):
    X, y, queries = items_of_ten_classes
    monkeypatch.setattr(items_module, "MOST_BUCKETS", 7)
    index = HierarchicalHashIndex(PlainEncoder(), epsilon=0.3).fit(X, y)
    assert index._items.centroids is None
    expected = index.kneighbors(queries, epsilon=0.0)[1]
    np.testing.assert_array_equal(index.kneighbors(queries)[1], expected)


def test_leaves_by_codes_have_no_distances(items_of_ten_classes):
    X, y, queries = items_of_ten_classes
    index = HierarchicalHashIndex(PlainEncoder(), probing="best_first").fit(X, y)
    index.gallery_ = Gallery(3.0, 4.0, np.eye(2), epsilon=0.3)
    index.encoder_.describe = lambda X, gallery=None: (
        index.encoder_.embed(X), index.encoder_.level_scores(X), index.encoder_.encode(X)
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Expected epsilon=0 with probing='best_first', got 0.1"):
        index.kneighbors(queries, epsilon=0.1)
    expected = index.kneighbors(queries)[1]
    np.testing.assert_array_equal(index.kneighbors(queries, epsilon=0)[1], expected)
    with pytest.raises(ValueError, match=r"Expected epsilon=0 with probing='best_first', got 0.1"):
        index.set_params(epsilon=0.1).fit(X, y)


@pytest.mark.parametrize("epsilon", [-0.1, np.nan, np.inf, "few"])
def test_other_values_are_refused(epsilon, index, items_of_ten_classes):
    with pytest.raises(ValueError, match="epsilon"):
        index.kneighbors(items_of_ten_classes[2], epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [-0.1, "few"])
def test_other_parameters_are_refused(epsilon, items_of_ten_classes):
    X, y, _ = items_of_ten_classes
    with pytest.raises(ValueError, match="epsilon"):
        HierarchicalHashIndex(PlainEncoder(), epsilon=epsilon).fit(X, y)
