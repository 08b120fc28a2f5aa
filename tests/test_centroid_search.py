"""Which leaves queries open by their centroids, and what is found there."""

import numpy as np
import pytest
from leaf_distances import (
    LEVELS,
    D,
    describe,
    search_by_definition,
)

from hqsearch import HierarchicalHashIndex
from hqsearch import items as items_module
from hqsearch.codes import greedy_codes
from hqsearch.items import FittedItems


@pytest.mark.parametrize("epsilon", [0.0, 0.02, 0.1, 0.5])
@pytest.mark.parametrize(
    ("sparsity", "k", "n_probes"), [(1, 3, None), (1, 3, 4), (1, 60, 2), (3, 3, None), (3, 5, 7)]
)
def test_a_search_opens_the_nearest_leaves_that_hold_items(sparsity, k, n_probes, epsilon):
    fitted, queries = describe(300, 0, sparsity), describe(40, 1, sparsity)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    n_opened = sparsity if n_probes is None else n_probes
    live = np.ones(300, dtype=bool)
    for _ in range(3):
        expected, n_candidates = search_by_definition(fitted, queries, live, k, n_opened, epsilon=epsilon)
        result = items.search(queries, k, n_probes=n_probes, epsilon=epsilon)
        np.testing.assert_array_equal(result.positions, expected)
        assert (result.stats.candidates, result.stats.empty_leaves) == (n_candidates, 0)
        # Empty the leaves that most queries open: they are passed by.
        busiest = np.bincount(fitted[2][expected[:, 0]].ravel()).argmax()
        gone = np.flatnonzero((fitted[2] == busiest).any(1) & live)
        live[gone] = False
        items = items.remove(gone)
    masked = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    np.testing.assert_array_equal(
        masked.search(queries, k, n_probes=n_probes, epsilon=epsilon, allowed=live).positions,
        items.search(queries, k, n_probes=n_probes, epsilon=epsilon).positions,
    )


def test_a_query_that_is_an_item_leaves_itself_out_and_still_finds_enough():
    fitted = describe(300, 0)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    for k in (1, 5, 20):
        result = items.search(fitted, k, exclude=np.arange(300))
        # Leaves by their centroids to the last, none by its scores.
        expected, n_candidates = search_by_definition(
            fitted, fitted, np.ones(300, bool), k, 1, exclude=np.arange(300)
        )
        np.testing.assert_array_equal(result.positions, expected)
        assert (result.stats.candidates, result.stats.empty_leaves) == (n_candidates, 0)


def test_masks_count_with_what_was_removed_and_may_leave_nothing():
    fitted, queries = describe(300, 0), describe(40, 1)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    allowed = np.arange(300) < 40
    fewer = items.remove(np.arange(0, 300, 2))
    expected, _ = search_by_definition(fitted, queries, allowed & (np.arange(300) % 2 == 1), 3, 1)
    np.testing.assert_array_equal(fewer.search(queries, 3, allowed=allowed).positions, expected)
    assert (items.search(queries, 3, allowed=np.zeros(300, bool)).positions == -1).all()
    none = tuple(a[:0] for a in queries)
    assert items.search(none, 3).positions.shape == (0, 3)
    everything = items.search(queries, 3, n_probes=1000)
    assert everything.stats.leaves_opened == 40 * len(np.unique(fitted[2]))


def test_a_new_leaf_is_found_by_its_centroid():
    fitted, more = describe(300, 0), describe(50, 3)
    early = fitted[2][:, 0] < 15
    items = FittedItems.from_blocks([tuple(a[early] for a in fitted)], branching_factor=D, n_levels=LEVELS)
    late = more[2][:, 0] >= 15
    added = items.add(*(a[late] for a in more), None)
    n_before = items.table.n_items
    found = added.search(tuple(a[late] for a in more), 1).positions[:, 0]
    assert (found >= n_before).mean() > 0.8


def test_the_papers_order_is_left_to_the_table():
    fitted, queries = describe(300, 0), describe(40, 1)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    ours = items.search(queries, 5, n_probes=6, probing="lexicographic").positions
    theirs = items.table.search(*queries, 5, n_probes=6, probing="lexicographic").positions
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != items.table.search(*queries, 5, n_probes=6).positions).any()


def test_a_radius_search_opens_the_same_leaves():
    fitted, queries = describe(300, 0), describe(40, 1)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    within = items.radius_search(queries, 1e6, n_probes=2)
    _, n_candidates = search_by_definition(fitted, queries, np.ones(300, bool), 0, 2)
    assert within.indptr[-1] == within.stats.candidates == n_candidates


def test_what_the_scores_confuse_the_embedding_tells_apart():
    # Two groups of points far apart; the scores of some queries say the other group.
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    embedding = (10 * y[:, None] + rng.normal(size=(200, 2))).astype(np.float32)
    level_scores = np.eye(D, dtype=np.float32)[y][:, None].repeat(LEVELS, 1)
    fitted = (embedding, level_scores, greedy_codes(level_scores, 1))
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    wrong = np.zeros((20, LEVELS, D), dtype=np.float32)
    wrong[:, :, 0], wrong[:, :, 1] = 1.0, 0.9
    queries = (embedding[y == 1][:20], wrong, greedy_codes(wrong, 1))
    assert (y[items.search(queries, 5).positions] == 1).all()
    assert (y[items.search(queries, 5, probing="best_first").positions] == 0).all()


def test_a_tree_of_many_buckets_has_no_centroids_and_is_probed_best_first(monkeypatch):
    fitted, queries = describe(300, 0), describe(40, 1)
    monkeypatch.setattr(items_module, "MOST_BUCKETS", D * LEVELS - 1)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    assert items.centroids is None
    np.testing.assert_array_equal(
        items.search(queries, 5, n_probes=3).positions,
        items.search(queries, 5, n_probes=3, probing="best_first").positions,
    )
    more = items.add(*queries, None)
    assert more.centroids is None
    assert more.table.n_items == 340
    old = items.__getstate__()
    del old["centroids"]
    again = object.__new__(FittedItems)
    again.__setstate__(old)
    assert again.centroids is None


def test_an_index_probes_by_centroids_unless_told_otherwise(grid_encoder):
    points = np.random.default_rng(0).uniform(-0.5, 3.5, (400, 2))
    index = HierarchicalHashIndex(grid_encoder(), listing="codes").fit(points)
    by_default = index.kneighbors(points, 40, n_probes=2)[1]
    encoder = index.encoder_
    described = encoder.embed(points), encoder.level_scores(points), encoder.encode(points)
    expected = index._items.search(described, 40, n_probes=2, probing="centroids").positions
    np.testing.assert_array_equal(by_default, expected)
    own = index.set_params(probing="best_first").kneighbors(points, 40, n_probes=2)[1]
    np.testing.assert_array_equal(own, index.table_.search(*described, 40, n_probes=2).positions)
    assert (own != by_default).any()


@pytest.mark.parametrize("n_items", [400, 3000])
def test_lists_for_faiss_are_those_of_the_search(grid_encoder, n_items):
    points = np.random.default_rng(0).uniform(-0.5, 3.5, (n_items, 2))
    index = HierarchicalHashIndex(grid_encoder(), sparsity=2).fit(points)
    for options in ({}, {"n_probes": 5}, {"epsilon": 0.4}):
        _, lists = index.faiss_lists(points[:50], 3, **options)
        _, _, stats = index.kneighbors(points[:50], 3, **options, return_stats=True)
        sizes = np.append(index.table_._directory.cell_live, 0)
        assert sizes[lists].sum() == stats.candidates


def test_a_query_gets_the_same_alone_and_in_any_company():
    fitted, queries = describe(300, 0, sparsity=2), describe(60, 1, sparsity=2)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    for k in (1, 20, 60):
        together = items.search(queries, k).positions
        expected, _ = search_by_definition(fitted, queries, np.ones(300, bool), k, 2)
        np.testing.assert_array_equal(together, expected)
        for i in range(0, 60, 7):
            alone = items.search(tuple(a[i : i + 1] for a in queries), k).positions
            np.testing.assert_array_equal(alone[0], together[i])


def test_items_in_several_leaves_are_counted_once():
    # Twelve groups of ten, each in two leaves of its own: two leaves hold ten items, not twenty.
    embedding, level_scores, _ = describe(120, 0)
    codes = np.arange(120)[:, None] % 12 * 2 + [[0, 1]]
    queries = (*describe(40, 1)[:2], codes[:40])
    fitted = (embedding, level_scores, codes)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    expected, _ = search_by_definition(fitted, queries, np.ones(120, bool), 16, 2)
    np.testing.assert_array_equal(items.search(queries, 16).positions, expected)


def test_wrong_arguments_are_named(grid_encoder):
    points = np.random.default_rng(0).uniform(-0.5, 3.5, (100, 2))
    index = HierarchicalHashIndex(grid_encoder()).fit(points)
    for wrong in (0, -1, 2.5, "3"):
        with pytest.raises(ValueError, match="n_probes to be an integer >= 1"):
            index.kneighbors(points, n_probes=wrong)
    items = index._items
    with pytest.raises(ValueError, match=r"queries of shape \(n_queries, 2\)"):
        items.search((points[:, :1], np.zeros((100, 2, 4)), np.zeros((100, 1), int)), 3)
    by_centroids = HierarchicalHashIndex(grid_encoder(), listing="centroids").fit(points)
    with pytest.raises(ValueError, match="Expected probing='centroids' for items that are listed by"):
        by_centroids.set_params(probing="best_first").kneighbors(points)
