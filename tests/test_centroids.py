"""Centroids of leaves: their distances by the definition."""

import numpy as np
import pytest
from leaf_distances import D, centroids_of, describe, distances_by_definition, unit

from hqsearch.centroids import PRIOR


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


@pytest.mark.parametrize("sparsity", [1, 3])
def test_crowded_leaves_are_farther_by_the_logarithm_of_their_share(sparsity):
    fitted, queries = describe(300, 0, sparsity), describe(40, 1)
    distances, leaf_ids = distances_by_definition(fitted, queries)
    sizes = np.array([(fitted[2] == leaf).sum() for leaf in leaf_ids])
    assert sizes.max() > 1.2 * sizes.mean() > 1.5 * sizes.min()
    squared = np.random.default_rng(2).exponential(size=300)
    centroids = centroids_of(fitted)
    crowded = centroids.crowded(fitted[2], squared, 0.7)
    # Of those whose nearest leaf it is, but not more than the mean of all.
    first = [squared[fitted[2][:, 0] == leaf] for leaf in leaf_ids]
    spread = np.array([np.minimum(own.mean(), squared.mean()) if len(own) else 0 for own in first])
    assert (spread < squared.mean()).any()
    assert (spread == squared.mean()).any()
    farther = 0.7 * spread * np.log(np.maximum(sizes / sizes.mean(), 1))
    rows, ranked = crowded.rank(*queries[:2], len(leaf_ids))
    np.testing.assert_array_equal(rows, np.argsort(distances + farther, axis=1, kind="stable"))
    np.testing.assert_allclose(ranked, np.sqrt(np.sort(distances + farther, axis=1)), rtol=1e-5)
    codes, listed = crowded.list_items(*queries[:2], sparsity)
    np.testing.assert_array_equal(codes, leaf_ids[rows[:, :sparsity]])
    np.testing.assert_array_equal(listed, ranked[:, :sparsity])
    # Distances beyond float32 crowd nothing.
    squared[0] = np.inf
    same = centroids.crowded(fitted[2], squared, 0.7).rank(*queries[:2], 4)
    np.testing.assert_array_equal(same[1], centroids.rank(*queries[:2], 4)[1])


def test_squared_distances_leave_out_what_is_the_leafs_own():
    fitted, queries = describe(300, 0), describe(40, 1)
    distances, leaf_ids = distances_by_definition(fitted, queries)
    sizes = np.array([(fitted[2] == leaf).sum() for leaf in leaf_ids])
    # Of squared distances to code and mean scores a part is the leaf's own: half that between the two.
    ideal = np.eye(D)[np.stack([leaf_ids // D, leaf_ids % D], 1)]
    means = np.stack([unit(fitted[1])[fitted[2][:, 0] == leaf].mean(0) for leaf in leaf_ids])
    own = np.square(unit(ideal) - means).sum(1) / 2 + PRIOR * np.log(sizes.max() / sizes)
    centroids = centroids_of(fitted)
    codes, listed = centroids.list_items(*queries[:2], 3)
    rows = centroids.rows_of(codes[:, 2])
    expected = (distances - own)[np.arange(40), rows]
    found = centroids.squared_distances(codes[:, 2], listed[:, 2])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    # Neither are they less for a leaf that is farther for its size.
    crowded = centroids.crowded(fitted[2], np.ones(300), 0.7)
    np.testing.assert_allclose(
        crowded.squared_distances(*(a[:, 0] for a in crowded.list_items(*queries[:2], 1))),
        (distances - own)[np.arange(40), crowded.nearest(*queries[:2], 1)[:, 0]],
        rtol=1e-4,
        atol=1e-6,
    )


def test_items_are_listed_in_later_leaves_too():
    embedding, level_scores, codes = describe(300, 0)
    early = codes[:, 0] < 15
    before = centroids_of((embedding[early], level_scores[early], codes[early]))
    more = before.add(embedding, level_scores, codes)
    listed, distances = more.list_items(embedding, level_scores, 2)
    rows, ranked = more.rank(embedding, level_scores, 2)
    np.testing.assert_array_equal(listed, more.leaf_ids[rows])
    np.testing.assert_array_equal(distances, ranked)
    assert np.isin(listed[:, 0], codes[~early]).any()
