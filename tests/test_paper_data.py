"""Splits and settings of the papers' experiments: what is trained on, what is searched, what is chosen on."""

import numpy as np
import pytest
from paper_data import limited, make_task
from paper_presets import PRESETS, value_of

from hqsearch import HierarchicalHashEncoder


@pytest.fixture
def data():
    """Items that are numbers of their own, 10 classes: 400 for training, 100 for queries."""
    y_train, y_test = np.repeat(np.arange(10), 40), np.repeat(np.arange(10), 10)
    return np.arange(400)[:, None], 1000 + np.arange(100)[:, None], y_train, y_test


def everything_of(*parts):
    return set(np.concatenate([part.ravel() for part in parts]).tolist())


def test_the_closed_set_is_the_published_split(data):
    task = make_task(data, "closed")
    for found, expected in zip((task.X, task.query_X, task.y, task.query_y), data, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(task.gallery_X, data[0])
    np.testing.assert_array_equal(task.gallery_y, data[2])


def test_unseen_classes_are_the_last_three_tenths_and_none_is_trained_on(data):
    task = make_task(data, "unseen")
    assert set(task.y) == set(range(7))
    assert set(task.gallery_y) == set(task.query_y) == {7, 8, 9}
    np.testing.assert_array_equal(task.X, data[0][data[2] < 7])
    np.testing.assert_array_equal(task.gallery_X, data[0][data[2] >= 7])
    np.testing.assert_array_equal(task.query_X, data[1][data[3] >= 7])


@pytest.mark.parametrize("protocol", ["closed", "unseen"])
def test_choices_see_no_test_item_and_no_class_that_the_experiment_leaves_out(data, protocol):
    task = make_task(data, protocol, validation_only=True)
    parts = task.X, task.gallery_X, task.query_X
    seen = everything_of(*parts)
    assert seen <= set(range(400))
    trained, asked = everything_of(task.X), everything_of(task.query_X)
    assert not trained & asked
    for X, y in ((task.X, task.y), (task.gallery_X, task.gallery_y), (task.query_X, task.query_y)):
        np.testing.assert_array_equal(data[2][X.ravel()], y)
    if protocol == "closed":
        # A stratified tenth takes the test items' place.
        assert seen == set(range(400))
        assert np.bincount(task.query_y).tolist() == [4] * 10
        np.testing.assert_array_equal(task.gallery_X, task.X)
    else:
        # Of the first seven classes the last two are left out of training once more.
        assert set(task.y) == set(range(5))
        assert set(task.gallery_y) == set(task.query_y) == {5, 6}
        assert not everything_of(task.gallery_X) & (trained | asked)


def test_a_limit_draws_each_class_alike_and_keeps_labels_at_their_items(data):
    X, _, y, _ = data
    few, few_y = limited(X, y, 100)
    assert np.bincount(few_y).tolist() == [10] * 10
    np.testing.assert_array_equal(y[few.ravel()], few_y)
    assert limited(X, y, None)[0] is X
    assert limited(X, y, 400)[0] is X


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_what_its_name_says_and_an_encoder_takes_it(name):
    parameters, by_sparsity = PRESETS[name]
    for sparsity, more in (by_sparsity or {1: {}}).items():
        encoder = HierarchicalHashEncoder(**(parameters | more), sparsity=sparsity)
        encoder._validate_params()
    if name.startswith(("cvpr19", "icml18")):
        assert parameters["loss"] == name.rpartition("-")[2]
        assert parameters["network"] == "nin"
        assert parameters["sibling_penalty"] == 100


@pytest.mark.parametrize(
    ("name", "n_levels", "branching_factor"),
    [
        ("cvpr19-cifar100-npairs", 2, 32),
        ("cvpr19-cifar100-triplet", 2, 64),
        ("icml18-cifar100-npairs", 1, 64),
        ("icml18-imagenet32-npairs", 1, 512),
    ],
)
def test_presets_have_the_published_trees(name, n_levels, branching_factor):
    parameters, _ = PRESETS[name]
    assert (parameters["n_levels"], parameters["branching_factor"]) == (n_levels, branching_factor)


@pytest.mark.parametrize(
    ("loss", "sparsity", "published"),
    [
        ("npairs", 1, {"hash_regularization": 0.03, "orthogonality_penalty": 0.07}),
        ("npairs", 2, {"hash_regularization": 0.01, "orthogonality_penalty": 0.1}),
        ("npairs", 3, {"hash_regularization": 0.003, "orthogonality_penalty": 0.1}),
        ("npairs", 4, {"hash_regularization": 0.001, "orthogonality_penalty": 0.1}),
        ("triplet", 1, {"hash_margin": 0.5, "orthogonality_penalty": 1.0}),
        ("triplet", 2, {"hash_margin": 0.3, "orthogonality_penalty": 1.0}),
        ("triplet", 3, {"hash_margin": 0.5, "orthogonality_penalty": 1.0}),
        ("triplet", 4, {"hash_margin": 0.5, "orthogonality_penalty": 1.0}),
    ],
)
def test_presets_set_for_each_sparsity_what_was_published(loss, sparsity, published):
    parameters, by_sparsity = PRESETS[f"cvpr19-cifar100-{loss}"]
    assert published.items() <= (parameters | by_sparsity[sparsity]).items()


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("0.5", 0.5), ("[1, 2]", [1, 2]), ("new", "new")])
def test_settings_of_the_command_line_are_numbers_lists_or_words(text, value):
    assert value_of(text) == value
