"""Level scores to codes: order, ties, sparse rows, and the scores kept for fitted items."""

import pickle

import numpy as np
import pytest

from hqsearch.codes import CellScores, code_matrix, greedy_codes


def naive_codes(scores, sparsity):
    n_levels, d = scores.shape
    path = 0
    for level in range(n_levels - 1):
        best = max(range(d), key=lambda t: (scores[level, t], -t))
        path = path * d + best
    last = sorted(range(d), key=lambda t: (-scores[-1, t], t))[:sparsity]
    return [path * d + t for t in last]


SHAPES = [(1, 1, 1), (1, 6, 6), (2, 5, 1), (3, 4, 2), (1, 12, 8), (1, 12, 9)]


@pytest.mark.parametrize(("n_levels", "d", "sparsity"), SHAPES)
@pytest.mark.parametrize("kind", ["all different", "tied", "integers", "mostly infinite"])
def test_codes_are_greedy_paths_with_ties_to_the_lower_bucket(n_levels, d, sparsity, kind):
    rng = np.random.default_rng(0)
    shape = (50, n_levels, d)
    scores = rng.normal(size=shape) if kind == "all different" else rng.integers(0, 3, shape)
    if kind != "integers":
        scores = scores.astype(np.float32)
    if kind == "mostly infinite":
        scores[scores < 2] = -np.inf
    expected = [naive_codes(item, sparsity) for item in scores]
    before = scores.copy()
    np.testing.assert_array_equal(greedy_codes(scores, sparsity), expected)
    np.testing.assert_array_equal(scores, before)


def test_bucket_ids_pass_32_bits():
    scores = np.zeros((1, 4, 1000), dtype=np.float32)
    scores[:, :, -1] = 1
    assert greedy_codes(scores, 1)[0, 0] == 1000**4 - 1


@pytest.mark.parametrize("sparsity", [0, 5])
def test_a_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=f"sparsity = {sparsity}, branching_factor = 4"):
        greedy_codes(np.zeros((2, 2, 4)), sparsity)


def test_code_rows_hold_a_one_for_each_leaf():
    codes = np.array([[5, 2], [0, 7]])
    np.testing.assert_array_equal(
        code_matrix(codes, 8).toarray(), [[0, 0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]]
    )


def test_items_of_one_cell_get_its_mean_scores_and_its_codes_best_first():
    scores = np.array(
        [[[1, 0, 0], [0, 2, 4]], [[3, 0, 0], [0, 6, 2]], [[0, 0, 5], [1, 0, 0]]], dtype=np.float32
    )
    codes = greedy_codes(scores, 2)
    np.testing.assert_array_equal(codes, [[2, 1], [1, 2], [6, 7]])
    cells = CellScores(codes, scores)
    found_scores, found_codes = cells.of(codes[[1, 0, 2]])
    np.testing.assert_array_equal(found_scores[0], [[2, 0, 0], [0, 4, 3]])
    np.testing.assert_array_equal(found_scores[1], found_scores[0])
    np.testing.assert_array_equal(found_scores[2], scores[2])
    np.testing.assert_array_equal(found_codes, [[1, 2], [1, 2], [6, 7]])


def test_cells_are_added_once_and_keep_their_scores():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 2, 5)).astype(np.float32)
    codes = greedy_codes(scores, 2)
    cells = CellScores(codes[:10], scores[:10])
    first = cells.of(codes[:10])
    for item in range(10, 400):
        cells.add(codes[item : item + 1], scores[item : item + 1])
    for found, expected in zip(cells.of(codes[:10]), first, strict=True):
        np.testing.assert_array_equal(found, expected)
    _, found_codes = cells.of(codes)
    np.testing.assert_array_equal(np.sort(found_codes, 1), np.sort(codes, 1))
    back = pickle.loads(pickle.dumps(cells))
    np.testing.assert_array_equal(back.of(codes)[0], cells.of(codes)[0])


def test_mean_scores_of_items_that_come_in_blocks_equal_those_of_all_at_once():
    rng = np.random.default_rng(0)
    codes = rng.permuted(np.tile(np.arange(6), (50, 1)), axis=1)[:, :2].astype(np.int64)
    scores = rng.normal(size=(50, 1, 6)).astype(np.float32)
    whole = CellScores(codes, scores)
    for size in (1, 7, 50):
        parts = [slice(start, start + size) for start in range(0, 50, size)]
        blocks = CellScores.from_blocks((codes[part], scores[part]) for part in parts)
        for found, expected in zip(blocks.of(codes), whole.of(codes), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_mean_scores_of_many_buckets_are_those_of_the_items_in_a_cell():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 2, 300)).astype(np.float32)
    codes = rng.integers(0, 6, (40, 1))
    found, _ = CellScores(codes, scores).of(codes)
    expected = [scores[codes[:, 0] == code].mean(0, dtype=np.float64) for code in codes[:, 0]]
    np.testing.assert_array_equal(found, np.array(expected).astype(np.float32))
