import threading

import numpy as np
import pytest

from hqsearch.assignment import solve_cascade, solve_cascades, solve_level


@pytest.fixture
def batch():
    return np.random.default_rng(0).normal(size=(10, 12, 3, 6))


def test_each_level_sees_which_classes_chose_the_same_path(batch):
    for scores in batch:
        codes = solve_cascade(scores, sparsity=2)
        paths = np.zeros(12, int)
        for level in range(3):
            expected = solve_level(
                scores[:, level], None if level == 0 else paths, sparsity=2 if level == 2 else 1
            )
            np.testing.assert_array_equal(codes[:, level], expected)
            paths = paths * 6 + codes[:, level].argmax(axis=1)


def test_siblings_never_share_a_bucket_when_there_is_room():
    rng = np.random.default_rng(1)
    scores = np.tile(rng.normal(size=(1, 2, 8)), (16, 1, 1))
    codes = solve_cascade(scores, sparsity=2, orthogonality_penalty=0.3)
    parents = codes[:, 0].argmax(axis=1)
    for parent in set(parents):
        family = codes[parents == parent, 1]
        assert len(family) * 2 <= 8
        assert family.sum(axis=0).max() == 1


@pytest.mark.parametrize("sparsity", [1, 3])
def test_codes_do_not_depend_on_the_number_of_threads(batch, sparsity):
    expected = np.stack([solve_cascade(scores, sparsity=sparsity) for scores in batch])
    for n_jobs in (None, 1, 2, 5, -1):
        np.testing.assert_array_equal(solve_cascades(batch, sparsity=sparsity, n_jobs=n_jobs), expected)


def test_cascades_of_different_sizes_come_back_in_order():
    rng = np.random.default_rng(2)
    several = [rng.normal(size=(n, 2, 5)) for n in (3, 7, 0, 1)]
    for n_jobs in (1, 2):
        for scores, codes in zip(several, solve_cascades(several, n_jobs=n_jobs), strict=True):
            np.testing.assert_array_equal(codes, solve_cascade(scores))


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (3, 0, 2, 3)])
def test_empty_batches_give_empty_codes(shape):
    assert solve_cascades(np.zeros(shape), n_jobs=2).shape == shape


@pytest.mark.parametrize("solver", ["scipy", "networkx"])
def test_other_solvers_choose_the_same_cascades(batch, solver):
    expected = solve_cascades(batch[:2], sparsity=2)
    np.testing.assert_array_equal(solve_cascades(batch[:2], sparsity=2, solver=solver), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int8])
def test_any_real_dtype_is_taken(dtype):
    scores = np.random.default_rng(3).integers(-9, 9, (5, 2, 4))
    np.testing.assert_array_equal(solve_cascade(scores.astype(dtype)), solve_cascade(scores.astype(float)))


def test_scores_are_left_as_they_were(batch):
    before = batch.copy()
    solve_cascades(batch, n_jobs=2)
    np.testing.assert_array_equal(batch, before)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (np.zeros((3, 4)), {}, "Expected scores of shape .n_classes, n_levels, branching_factor., got"),
        (np.zeros((3, 0, 4)), {}, "Expected scores with n_levels >= 1"),
        (np.zeros((3, 2, 4)), {"sparsity": 5}, "sparsity = 5, branching_factor = 4"),
        (np.zeros((3, 2, 0)), {}, "branching_factor = 0"),
        (np.full((3, 2, 4), np.nan), {}, "Input scores contains NaN or infinity"),
        (np.zeros((3, 2, 4)), {"solver": "best"}, "Expected solver to be one of"),
        (
            np.zeros((3, 2, 4)),
            {"orthogonality_penalty": -1},
            "Expected orthogonality_penalty to be a finite number",
        ),
        (np.array([[["a"]]]), {}, "real floating or integer dtype"),
    ],
)
def test_wrong_input_is_refused_with_what_was_expected(scores, options, message):
    with pytest.raises(ValueError, match=message):
        solve_cascade(scores, **options)
    with pytest.raises(ValueError, match=message.replace(".n_classes", ".n_batch, n_classes")):
        solve_cascades(scores[None], **options)


def test_nan_in_one_cascade_is_seen_from_any_thread(batch):
    batch[7, 3, 1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        solve_cascades(batch, n_jobs=2)


def test_many_threads_may_solve_cascades_at_once(batch):
    expected = solve_cascades(batch)
    results = [None] * 4

    def solve(i):
        results[i] = solve_cascades(batch, n_jobs=2)

    threads = [threading.Thread(target=solve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for codes in results:
        np.testing.assert_array_equal(codes, expected)
