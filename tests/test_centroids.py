"""Centroids of leaves: their distances by the definition, and the leaves that queries open by them."""

import numpy as np
import pytest
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import NearestNeighbors

from hqsearch import HierarchicalHashIndex
from hqsearch import centroids as centroids_module
from hqsearch import items as items_module
from hqsearch import listing as listing_module
from hqsearch.centroids import PRIOR, REFINED_CODE_WEIGHT, CentroidSums
from hqsearch.codes import greedy_codes
from hqsearch.items import FittedItems
from hqsearch.listing import wanted_leaves

D, LEVELS = 5, 2


def describe(n_items, seed, sparsity=1, dim=3):
    """Random embeddings and level scores, and the codes of these."""
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(n_items, dim)).astype(np.float32)
    level_scores = rng.normal(size=(n_items, LEVELS, D)).astype(np.float32)
    return embedding, level_scores, greedy_codes(level_scores, sparsity)


def centroids_of(*blocks, branching_factor=D, n_levels=LEVELS):
    sums = CentroidSums(branching_factor=branching_factor, n_levels=n_levels)
    for block in blocks:
        sums.add(*block)
    return sums.finish()


def unit(scores):
    centred = scores.astype(np.float64) - scores.astype(np.float64).mean(-1, keepdims=True)
    flat = centred.reshape(len(scores), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def distances_by_definition(fitted, queries, prior=PRIOR, weight=1.0, code_of=None):
    """Squared distances, (n_queries, n_leaves), and the leaves in ascending order.

    `weight` is that of the code's distance, `code_of` the leaf whose code each leaf has.
    """
    embedding, level_scores, codes = fitted
    leaf_ids = np.unique(codes)
    deviation = embedding - embedding.mean(0)
    scale = 1 / np.sqrt((deviation.astype(np.float64) ** 2).sum(1).mean())
    total = []
    d = level_scores.shape[2]
    for leaf in leaf_ids:
        members = (codes == leaf).any(1)
        own = leaf if code_of is None else code_of[leaf]
        code = np.zeros((1, LEVELS, d))
        code[0, 0, own // d] = code[0, 1, own % d] = 1
        terms = [
            (weight, unit(queries[1]), unit(code)[0]),
            (2 - weight, unit(queries[1]), unit(level_scores[members]).mean(0)),
            (1, queries[0] * scale, embedding[members].mean(0) * scale),
        ]
        total.append(sum(w * ((ours - theirs) ** 2).sum(1) for w, ours, theirs in terms))
    sizes = np.array([(codes == leaf).sum() for leaf in leaf_ids])
    return np.array(total).T + prior * np.log(sizes.max() / sizes), leaf_ids


@pytest.mark.parametrize("sparsity", [1, 3])
def test_leaves_are_ranked_by_the_sum_of_three_distances(sparsity):
    fitted, queries = describe(300, 0, sparsity), describe(40, 1, sparsity)
    expected, leaf_ids = distances_by_definition(fitted, queries)
    centroids = centroids_of(fitted)
    np.testing.assert_array_equal(centroids.leaf_ids, leaf_ids)
    rows = centroids.nearest(*queries[:2], len(leaf_ids))
    np.testing.assert_array_equal(rows, np.argsort(expected, axis=1, kind="stable"))
    np.testing.assert_array_equal(centroids.nearest(*queries[:2], 2, n_jobs=2), rows[:, :2])


def test_items_may_come_in_blocks():
    fitted, queries = describe(300, 0, 2), describe(40, 1)
    parts = [tuple(a[i : i + 70] for a in fitted) for i in range(0, 300, 70)]
    whole, pieces = centroids_of(fitted), centroids_of(*parts)
    np.testing.assert_array_equal(whole.leaf_ids, pieces.leaf_ids)
    np.testing.assert_array_equal(whole.nearest(*queries[:2], 9), pieces.nearest(*queries[:2], 9))


def test_units_and_offsets_do_not_count():
    fitted, queries = describe(300, 0), describe(40, 1)
    offsets = np.array([[[-2.0], [1.0]]], dtype=np.float32)

    def changed(described):
        embedding, level_scores, codes = described
        return embedding * 64 + 8, level_scores * 32 + offsets, codes

    ours = centroids_of(fitted).nearest(*queries[:2], 6)
    theirs = centroids_of(changed(fitted)).nearest(*changed(queries)[:2], 6)
    np.testing.assert_array_equal(ours, theirs)


def test_equal_embeddings_equal_scores_and_huge_ones_are_no_trouble():
    embedding, level_scores, codes = describe(50, 0)
    rows = centroids_of((np.ones_like(embedding), level_scores, codes)).nearest(embedding, level_scores, 1)
    # Their scores alone say where they belong.
    assert (np.unique(codes)[rows] == codes).mean() > 0.8
    flat = centroids_of((embedding, np.zeros_like(level_scores), codes))
    assert flat.nearest(embedding, np.zeros_like(level_scores), 3).shape == (50, 3)
    level_scores /= np.abs(level_scores).max()
    # Its first is farther from the mean than float32 reaches, once they are huge.
    level_scores[0, 0] = [1, -1, -1, -1, -1]
    usual = centroids_of((embedding, level_scores, codes)).nearest(embedding, level_scores, 3)
    huge = level_scores * np.float32(3.3e38)
    assert (centroids_of((embedding, huge, codes)).nearest(embedding, huge, 3) == usual).mean() > 0.99
    # So small that their inverse is infinite: as if they were all equal.
    tiny = level_scores * np.float32(1e-39)
    assert centroids_of((embedding, tiny, codes)).nearest(embedding, tiny, 3).shape == (50, 3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        centroids_of((embedding, level_scores, codes)).nearest(embedding, level_scores * np.nan, 1)


def test_further_items_bring_their_leaves_and_move_no_centroid():
    embedding, level_scores, codes = describe(300, 0)
    early = codes[:, 0] < 15
    first = (embedding[early], level_scores[early], codes[early])
    before = centroids_of(first)
    n_before = len(before.leaf_ids)
    more = before.add(embedding, level_scores, codes)
    assert len(before.leaf_ids) == n_before < len(more.leaf_ids) == len(np.unique(codes))
    assert before.add(*first) is before
    queries = describe(40, 1)
    np.testing.assert_array_equal(
        more.nearest(*queries[:2], 4, allowed=np.arange(len(more.leaf_ids)) < n_before),
        before.nearest(*queries[:2], 4),
    )
    late = codes[:, 0] >= 15
    own = more.leaf_ids[more.nearest(embedding[late], level_scores[late], 1)]
    assert (own == codes[late]).mean() > 0.5


def search_by_definition(fitted, queries, live, k, n_probes, exclude=None):
    """Positions of the k nearest live items in the nearest leaves that hold live ones."""
    distances, leaf_ids = distances_by_definition(fitted, queries)
    found, n_candidates = [], 0
    exclude = np.full(len(distances), -1) if exclude is None else exclude
    for query, row, own in zip(queries[0], distances, exclude, strict=True):
        candidates, opened = np.zeros(len(live) + 1, dtype=bool), 0
        for leaf in leaf_ids[np.argsort(row, kind="stable")]:
            if opened >= n_probes and candidates.sum() >= k:
                break
            here = (fitted[2] == leaf).any(1) & live
            candidates[:-1] |= here
            candidates[own] = False
            opened += here.any()
        positions = np.flatnonzero(candidates)
        n_candidates += len(positions)
        gaps = ((fitted[0][positions] - query) ** 2).sum(1)
        found.append(positions[np.argsort(gaps, kind="stable")[:k]])
    return np.array(found), n_candidates


@pytest.mark.parametrize(
    ("sparsity", "k", "n_probes"), [(1, 3, None), (1, 3, 4), (1, 60, 2), (3, 3, None), (3, 5, 7)]
)
def test_a_search_opens_the_nearest_leaves_that_hold_items(sparsity, k, n_probes):
    fitted, queries = describe(300, 0, sparsity), describe(40, 1, sparsity)
    items = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    n_opened = sparsity if n_probes is None else n_probes
    live = np.ones(300, dtype=bool)
    for _ in range(3):
        expected, n_candidates = search_by_definition(fitted, queries, live, k, n_opened)
        result = items.search(queries, k, n_probes=n_probes)
        np.testing.assert_array_equal(result.positions, expected)
        assert (result.stats.candidates, result.stats.empty_leaves) == (n_candidates, 0)
        # Empty the leaves that most queries open: they are passed by.
        busiest = np.bincount(fitted[2][expected[:, 0]].ravel()).argmax()
        gone = np.flatnonzero((fitted[2] == busiest).any(1) & live)
        live[gone] = False
        items = items.remove(gone)
    masked = FittedItems.from_blocks([fitted], branching_factor=D, n_levels=LEVELS)
    np.testing.assert_array_equal(
        masked.search(queries, k, n_probes=n_probes, allowed=live).positions,
        items.search(queries, k, n_probes=n_probes).positions,
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
    for n_probes in (None, 5):
        _, lists = index.faiss_lists(points[:50], 3, n_probes=n_probes)
        _, _, stats = index.kneighbors(points[:50], 3, n_probes=n_probes, return_stats=True)
        sizes = np.append(index.table_._directory.cell_live, 0)
        assert sizes[lists].sum() == stats.candidates


def refined(fitted, branching_factor=D):
    return FittedItems.from_blocks(
        [tuple(a[i : i + 70] for a in fitted) for i in range(0, len(fitted[0]), 70)],
        branching_factor=branching_factor, n_levels=LEVELS, listing="centroids",
    )  # fmt: skip


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


def of_these(items, fitted, codes):
    """Centroids of items that are listed by centroids, made of all that are in each leaf."""
    return items.centroids.of_items(fitted[0], unit(fitted[1]), codes)


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


def in_few_leaves(n_items, d):
    """Items of three codes in a tree of d * d leaves."""
    rng = np.random.default_rng(0)
    codes = np.array([0, d + 1, d * d - 1])[rng.integers(0, 3, n_items)][:, None]
    level_scores = rng.normal(size=(n_items, LEVELS, d)).astype(np.float32)
    level_scores[np.arange(n_items), 0, codes[:, 0] // d] += 8
    level_scores[np.arange(n_items), 1, codes[:, 0] % d] += 8
    return rng.normal(size=(n_items, 3)).astype(np.float32), level_scores, codes


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


def test_centroids_saved_before_leaves_were_parted_rank_as_they_did():
    embedding, level_scores, codes = describe(300, 0)
    early = codes[:, 0] < 15
    centroids = centroids_of((embedding[early], level_scores[early], codes[early]))
    state = centroids.__getstate__()
    del state["_code_weight"], state["_n_part_levels"]
    earlier = type(centroids).__new__(type(centroids))
    earlier.__setstate__(state)
    # Later leaves are placed as those of the fit were.
    more = describe(40, 1)
    ours, theirs = (each.add(*more) for each in (centroids, earlier))
    assert len(ours.leaf_ids) > len(centroids.leaf_ids)
    np.testing.assert_array_equal(ours.nearest(*more[:2], 5), theirs.nearest(*more[:2], 5))


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
