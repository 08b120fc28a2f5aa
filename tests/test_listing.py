"""Items listed by their nearest centroids: leaves that adapt, are parted, dissolved and added."""

import numpy as np
import pytest
from leaf_distances import (
    LEVELS,
    D,
    describe,
    distances_by_definition,
    in_few_leaves,
    of_these,
    refined,
)
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import NearestNeighbors

from hqsearch import HierarchicalHashIndex
from hqsearch import centroids as centroids_module
from hqsearch import items as items_module
from hqsearch import listing as listing_module
from hqsearch.centroids import REFINED_CODE_WEIGHT, LeafCentroids
from hqsearch.codes import greedy_codes
from hqsearch.items import FittedItems
from hqsearch.listing import wanted_leaves


@pytest.mark.parametrize("sparsity", [1, 3])
def test_items_listed_by_centroids_are_in_their_nearest_leaves(sparsity):
    fitted = describe(300, 0, sparsity)
    items = refined(fitted)
    codes = items.table.stored_codes()
    # They are where queries like them are sent, but for level scores rounded to half precision.
    rows = items.centroids.nearest(*fitted[:2], sparsity)
    assert (np.sort(items.centroids.leaf_ids[rows], 1) == codes).all(1).mean() > 0.99
    # After five turns leaves are where their items are, and these not where they began.
    distances, leaf_ids = distances_by_definition((*fitted[:2], codes), fitted, 0, REFINED_CODE_WEIGHT)
    nearest = np.sort(leaf_ids[np.argsort(distances, 1)[:, :sparsity]], 1)
    assert (nearest == codes).all(1).mean() > 0.9
    assert (nearest == np.sort(fitted[2], 1)).all(1).mean() < 0.8
    rows = of_these(items, fitted, codes).nearest(*fitted[:2], len(leaf_ids))
    np.testing.assert_array_equal(rows[:, 0], np.argmin(distances, 1))


def test_listing_by_centroids_gathers_what_codes_scatter():
    # Three groups that the encoder was not trained on: their scores say little, and noisily.
    rng = np.random.default_rng(0)
    y = np.arange(600) % 3
    embedding = (3 * np.eye(3, 8)[y] + 0.5 * rng.normal(size=(600, 8))).astype(np.float32)
    level_scores = rng.normal(size=(600, LEVELS, D)).astype(np.float32)
    described = (embedding, level_scores, greedy_codes(level_scores, 1))
    fitted, queries = (tuple(a[part] for a in described) for part in (slice(500), slice(500, 600)))
    by_codes = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)

    def precision(items):
        found = items.search(queries, 10)
        return (y[found.positions] == y[500:, None]).mean(), found.stats.suf()

    ours, our_suf = precision(refined(fitted))
    theirs, _ = precision(by_codes)
    assert ours > 0.95 > 0.85 > theirs
    assert our_suf > 10


def test_large_leaves_are_parted_as_an_inverted_file_would():
    fitted = in_few_leaves(1500, 16)
    items = refined(fitted, branching_factor=16)
    codes = items.table.stored_codes()
    leaf_ids, sizes = np.unique(codes, return_counts=True)
    assert 0.9 * wanted_leaves(1500) < len(leaf_ids) <= wanted_leaves(1500) + 3
    assert sizes.max() < 5 * sizes.mean()
    # A part is a leaf below the one that it came from, and has its code.
    assert items.table.n_levels == LEVELS + 1
    assert set(leaf_ids // 16) == {0, 17, 255}
    assert (codes // 16 == fitted[2]).mean() > 0.95
    code_of = dict(zip(leaf_ids, leaf_ids // 16, strict=True))
    distances, _ = distances_by_definition((*fitted[:2], codes), fitted, 0, REFINED_CODE_WEIGHT, code_of)
    rows = of_these(items, fitted, codes).nearest(*fitted[:2], len(leaf_ids))
    np.testing.assert_array_equal(rows[:, 0], np.argmin(distances, 1))
    assert (codes[:, 0] == leaf_ids[rows[:, 0]]).mean() > 0.9
    # The same items, the same leaves.
    np.testing.assert_array_equal(refined(fitted, branching_factor=16).table.stored_codes(), codes)


def test_leaves_are_of_like_size_where_large_ones_are_farther(monkeypatch):
    # Half of the items are close together, the others far apart.
    embedding, level_scores, codes = in_few_leaves(3000, 16)
    embedding[::2] *= 0.4
    fitted = (embedding, level_scores, codes)

    crowded, crowd = [], LeafCentroids.crowded
    monkeypatch.setattr(LeafCentroids, "crowded", lambda *given: crowded.append(crowd(*given)) or crowded[-1])

    def sizes():
        items = refined(fitted, branching_factor=16)
        # Where queries go, and items at last: to the nearest, however many are there.
        assert len(crowded) > 0
        assert all(items.centroids is not other for other in crowded)
        listed = items.table.stored_codes()
        rows = items.centroids.nearest(embedding, level_scores, 1)
        assert (items.centroids.leaf_ids[rows] == listed).mean() > 0.99
        return np.unique(listed, return_counts=True)[1]

    ours = sizes()
    monkeypatch.setattr(listing_module, "CROWDING", 0.0)
    theirs = sizes()
    assert len(ours) > 0.95 * len(theirs)
    # Looked at by a query of the same distribution.
    assert np.square(ours).sum() < 0.97 * np.square(theirs).sum()
    assert ours.max() < theirs.max()


def test_with_several_codes_there_are_as_many_leaves():
    embedding, level_scores, codes = in_few_leaves(1500, 16)
    codes = np.hstack([codes, np.array([[34, 51, 68]]).repeat(500, 0).reshape(1500, 1)])
    items = refined((embedding, level_scores, np.sort(codes, 1)), branching_factor=16)
    stored = items.table.stored_codes()
    assert (stored[:, 0] < stored[:, 1]).all()
    assert 0.8 * wanted_leaves(1500) < len(items.table.occupied_leaves()) <= wanted_leaves(1500) + 6
    rows = items.centroids.nearest(embedding, level_scores, 2)
    assert (np.sort(items.centroids.leaf_ids[rows], 1) == stored).all(1).mean() > 0.99


def test_a_small_tree_gets_as_many_levels_for_parts_as_they_need(monkeypatch):
    described = in_few_leaves(1500, 2)
    items = refined(described, branching_factor=2)
    n_leaves = len(items.table.occupied_leaves())
    assert 0.8 * wanted_leaves(1500) < n_leaves <= wanted_leaves(1500) + 3
    assert items.n_levels == LEVELS
    assert items.table.n_levels == LEVELS + 5
    # Searches for more than the ranked leaves hold go on below them.
    monkeypatch.setattr(items_module, "_MOST_RANKED", 2)
    found = items.search(described, 1500)
    np.testing.assert_array_equal(np.sort(found.positions, 1), np.tile(np.arange(1500), (1500, 1)))
    # Added items go there too, new codes and all.
    embedding, level_scores, _ = in_few_leaves(60, 2)
    level_scores[:, 1] *= -1
    added = items.add(embedding, level_scores, greedy_codes(level_scores, 1), None)
    stored = added.table.stored_codes()[1500:, 0]
    assert np.isin(stored, added.centroids.leaf_ids).all()


def test_no_more_leaves_come_than_there_may_be_or_where_all_items_are_equal(monkeypatch):
    embedding, level_scores, codes = in_few_leaves(900, 4)
    monkeypatch.setattr(listing_module, "MOST_LEAVES", 9)
    items = refined((embedding, level_scores, codes), branching_factor=4)
    assert 7 <= len(items.table.occupied_leaves()) <= 9
    monkeypatch.undo()
    monkeypatch.setattr(centroids_module, "LARGEST_TREE", 64)
    items = refined((embedding, level_scores, codes), branching_factor=4)
    assert items.table.n_levels == LEVELS + 1
    assert len(items.table.occupied_leaves()) <= 12
    monkeypatch.undo()
    equal = tuple(a[:1].repeat(900, 0) for a in (embedding, level_scores, codes))
    items = refined(equal, branching_factor=4)
    assert len(items.table.occupied_leaves()) == 1
    assert items.search(equal, 5).n_found == 5
    # One bucket has no levels below.
    one = (embedding, level_scores[:, :, :1], np.zeros_like(codes))
    assert len(refined(one, branching_factor=1).table.occupied_leaves()) == 1


def test_items_added_to_leaves_by_centroids_go_to_the_nearest():
    fitted, more = describe(300, 0), describe(50, 3)
    items = refined(fitted)
    own = items.search(more, 1)
    added = items.add(*more, None)
    codes = added.table.stored_codes()[300:]
    leaf_ids = added.centroids.leaf_ids
    np.testing.assert_array_equal(codes, leaf_ids[added.centroids.nearest(*more[:2], 1)])
    # Items that were there stay where they were, and are found there.
    np.testing.assert_array_equal(added.table.stored_codes()[:300], items.table.stored_codes())
    np.testing.assert_array_equal(added.remove(np.arange(300, 350)).search(more, 1).positions, own.positions)
    assert added.search(more, 1).positions[:, 0].tolist() == list(range(300, 350))
    # The items themselves may be queries, the added ones too.
    for positions, described in added.own_queries():
        found = added.search(described, 3, exclude=positions)
        assert found.n_found == 3


def test_fewer_leaves_than_an_item_needs_stay_as_they_are():
    embedding, level_scores, _ = describe(20, 0)
    codes = np.tile([[3, 7, 9]], (20, 1))
    items = refined((embedding, level_scores, codes))
    assert len(items.table.occupied_leaves()) == 3
    np.testing.assert_array_equal(items.table.stored_codes(), codes)


@pytest.mark.parametrize(("listing", "frozen", "by_codes"), [
    ("auto", False, False), ("auto", True, False), ("codes", True, True), ("centroids", False, False),
])  # fmt: skip
def test_an_index_lists_items_where_queries_look_for_them(grid_encoder, listing, frozen, by_codes):
    points = np.random.default_rng(0).uniform(-0.5, 3.5, (2000, 2))
    encoder = grid_encoder()
    if frozen:
        encoder.fitted_ = True
        encoder = FrozenEstimator(encoder)
    index = HierarchicalHashIndex(encoder, listing=listing).fit(points)
    assert (index.table_.stored_codes() == index.encoder_.encode(points)).all() == by_codes
    assert (index.table_.n_levels == index.encoder_.n_levels) == by_codes
    found = index.kneighbors(points, 3, n_probes=1000, return_distance=False)
    expected = NearestNeighbors(n_neighbors=3).fit(points).kneighbors(points, return_distance=False)
    np.testing.assert_array_equal(found, expected)
    assert index.kneighbors(n_neighbors=3)[1].shape == (2000, 3)
    if not by_codes:
        # An item is where a query like it is sent.
        assert (index.kneighbors(points, 1)[1][:, 0] == np.arange(2000)).mean() > 0.99
    # Changes, masks and radii count parts as they do leaves.
    index.remove(np.arange(500))
    index.compact()
    index.add(points[:500])
    there, own = np.r_[points[500:], points[:500]], np.arange(2000) % 3 == 0
    found = index.kneighbors(points, 3, n_probes=1000, allowed=own, return_distance=False)
    expected = NearestNeighbors(n_neighbors=3).fit(there[own]).kneighbors(points, return_distance=False)
    np.testing.assert_array_equal(found, np.flatnonzero(own)[expected])
    within = index.radius_neighbors(points[:50], 0.2, n_probes=1000, return_distance=False)
    expected = NearestNeighbors(radius=0.2).fit(there).radius_neighbors(points[:50], return_distance=False)
    assert [sorted(row) for row in within] == [sorted(row) for row in expected]
    # Who opens the leaves of a query's code looks for items in those of theirs.
    index = HierarchicalHashIndex(encoder, probing="best_first").fit(points)
    np.testing.assert_array_equal(index.table_.stored_codes(), index.encoder_.encode(points))


def test_leaves_of_a_few_items_gone_astray_draw_no_queries():
    # Two classes of a hundred items; two items between them have a code of their own.
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    side = np.where(y == 0, -1.0, 1.0)
    embedding = np.stack([side, np.zeros(200)], 1) + 0.3 * rng.normal(size=(200, 2))
    level_scores = np.eye(D)[y][:, None].repeat(LEVELS, 1) + 0.1 * rng.normal(size=(200, LEVELS, D))
    embedding[:2], level_scores[:2] = 0, 0
    level_scores[:2, 0, 0] = level_scores[:2, 1, 1] = 1
    # Queries on their own side, whose scores lean to that of the two.
    queries = embedding[2:].astype(np.float32) * 0.25, level_scores[2:].astype(np.float32)
    queries[1][:, 1, 1] += 0.8
    fitted = (embedding.astype(np.float32), level_scores.astype(np.float32))
    fitted = (*fitted, greedy_codes(fitted[1], 1))
    assert len(np.unique(fitted[2])) == 3
    queries = (*queries, greedy_codes(queries[1], 1))
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    opened = items.search(queries, 1).stats.candidates / 198
    assert opened > 95
    # The two are a leaf of their own no more; the others' leaves are parted.
    centroids = refined([np.concatenate([a] + [a[2:]] * 2) for a in fitted]).centroids
    assert centroids.n_part_levels > 0
    assert set(centroids.leaf_ids // D**centroids.n_part_levels) == {0, 6}


def grouped(n_items, seed, n_groups, n_fitted_groups):
    """Groups of items with codes of their own: what a trained encoder makes of classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_groups, n_items)
    embedding = (np.eye(n_groups)[y] + 0.3 * rng.normal(size=(n_items, n_groups))).astype(np.float32)
    level_scores = (0.3 * rng.normal(size=(n_items, LEVELS, D))).astype(np.float32)
    level_scores[np.arange(n_items), 0, y % D] += 3
    level_scores[np.arange(n_items), 1, y // D] += 3
    described = (embedding, level_scores, greedy_codes(level_scores, 1))
    early = y < n_fitted_groups
    return tuple(a[early] for a in described), tuple(a[~early] for a in described), y


def test_a_leaf_that_comes_item_by_item_is_found_like_one_that_comes_at_once():
    fitted, late, _ = grouped(3000, 0, 6, 5)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    at_once, one_by_one = items.add(*late, None), items
    for i in range(len(late[0])):
        one_by_one = one_by_one.add(*(a[i : i + 1] for a in late), None)
    _, queries, _ = grouped(600, 1, 6, 5)
    found = [each.search(queries, 10).positions for each in (at_once, one_by_one)]
    for positions in found:
        assert (positions >= len(fitted[0])).mean() > 0.92
    # A later leaf is where all of its items are, however they came.
    assert len(at_once.centroids.leaf_ids) > len(items.centroids.leaf_ids)
    ours, theirs = one_by_one.centroids, at_once.centroids
    np.testing.assert_array_equal(ours.leaf_ids, theirs.leaf_ids)
    np.testing.assert_allclose(ours._table.stored_vectors()[1], theirs._table.stored_vectors()[1], atol=1e-6)


@pytest.mark.parametrize("sparsity", [1, 2])
def test_few_leaves_come_by_centroids_and_none_beyond_those_of_a_fit(sparsity):
    fitted, more = describe(30, 0, sparsity), describe(300, 3, sparsity)
    items = refined(fitted)
    n_before = len(items.centroids.leaf_ids)
    assert n_before >= wanted_leaves(330)
    assert len(items.add(*more, None).centroids.leaf_ids) == n_before
    few = items.add(*(a[:1] for a in more), None)
    assert len(few.centroids.leaf_ids) == n_before
    start = refined(describe(4, 0, sparsity))
    added = start.add(*more, None)
    assert len(added.centroids.leaf_ids) == max(len(start.centroids.leaf_ids), 304 // 48)
    nothing = items.add(*(a[:0] for a in more), None)
    assert nothing.table.n_items == 30


def test_small_classes_beside_a_large_one_keep_their_leaves():
    # A thousand items of one code, and twenty times thirteen of others.
    codes = np.r_[np.zeros(1000, int), np.arange(1, 21).repeat(13)][:, None]
    rng = np.random.default_rng(0)
    embedding = (np.eye(21)[codes[:, 0]] + 0.1 * rng.normal(size=(1260, 21))).astype(np.float32)
    level_scores = 0.1 * rng.normal(size=(1260, LEVELS, D)).astype(np.float32)
    level_scores[np.arange(1260), 0, codes[:, 0] // D] += 1
    level_scores[np.arange(1260), 1, codes[:, 0] % D] += 1
    items = refined((embedding, level_scores, codes))
    stored = items.table.stored_codes() // D**items.centroids.n_part_levels
    assert (stored == codes).all()


def test_codes_of_any_integer_type_and_trees_of_numpys_do():
    embedding, level_scores, codes = in_few_leaves(3000, 16)
    expected = refined((embedding, level_scores, codes), branching_factor=16)
    # The leaves of parts are beyond the type of the codes.
    assert expected.centroids.n_part_levels == 2
    items = refined((embedding, level_scores, codes.astype(np.uint8)), branching_factor=np.int32(16))
    np.testing.assert_array_equal(items.table.stored_codes(), expected.table.stored_codes())
    more = tuple(a[:30] for a in (embedding, level_scores, codes.astype(np.uint8)))
    added = (each.add(*more, None).table.stored_codes() for each in (items, expected))
    np.testing.assert_array_equal(*added)


def test_a_new_code_gets_a_leaf_beside_parts_and_a_known_one_none():
    described = in_few_leaves(1500, 16)
    items = refined(described, branching_factor=16)
    embedding, level_scores, codes = (a.copy() for a in described)
    # As many again, half of them of a code that nobody had.
    embedding[::2] += 9
    level_scores[::2] = -level_scores[::2]
    level_scores[::2, :, 5] += 40
    codes = greedy_codes(level_scores, 1).astype(np.uint8)
    added = items.add(embedding, level_scores, codes, None)
    new = np.setdiff1d(added.centroids.leaf_ids, items.centroids.leaf_ids)
    assert new.tolist() == [(5 * 16 + 5) * 16]
    assert len(np.unique(added.centroids.leaf_ids)) == len(added.centroids.leaf_ids)
    assert (added.table.stored_codes()[1500::2] == new).mean() > 0.99


def test_a_tree_as_deep_as_there_may_be_is_not_parted():
    rng = np.random.default_rng(0)
    level_scores = rng.normal(size=(400, 13, 24)).astype(np.float32)
    level_scores[:, :, 3] += 9
    described = rng.normal(size=(400, 3)).astype(np.float32), level_scores, greedy_codes(level_scores, 1)
    # Powers of numpy's integers wrap.
    items = FittedItems.from_blocks(
        [described], branching_factor=np.int64(24), n_levels=np.int64(13), listing="centroids"
    )
    assert items.table.n_levels == 13
    assert items.search(described, 3).n_found == 3


@pytest.mark.parametrize("listing", ["codes", "centroids"])
def test_scores_that_are_not_finite_and_too_many_leaves_are_probed_by_codes(listing, monkeypatch):
    embedding, level_scores, codes = describe(300, 0)
    forbidden = level_scores.copy()
    forbidden[:, 0, 4] = -np.inf
    cases = [(embedding, forbidden, greedy_codes(forbidden, 1)), (embedding, level_scores, codes)]
    for i, fitted in enumerate(cases):
        monkeypatch.setattr(centroids_module, "MOST_LEAVES", [1000, 20][i])
        blocks = [cases[1], fitted]
        items = FittedItems.from_blocks(blocks, branching_factor=D, n_levels=LEVELS, listing=listing)
        assert (items.centroids, items.listing) == (None, "codes")
        np.testing.assert_array_equal(
            items.search(fitted, 3).positions, items.table.search(*fitted, 3).positions
        )
