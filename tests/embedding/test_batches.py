"""Class-balanced batches and the validation split."""

import numpy as np
import pytest

from hqsearch.embedding.batches import ClassBalancedBatches, split_validation


def batches_of(y, *, classes_per_batch=4, batch_size=16, groups=1, seed=0):
    return ClassBalancedBatches(
        y,
        classes_per_batch=classes_per_batch,
        batch_size=batch_size,
        groups_per_step=groups,
        rng=np.random.default_rng(seed),
    )


def test_every_class_of_a_batch_has_the_same_even_number_of_its_own_items():
    y = np.random.default_rng(0).integers(0, 10, 500)
    batches = batches_of(y, classes_per_batch=5, batch_size=34)
    items, classes = batches.draw()
    assert items.shape == (1, 5, 6)
    assert len(set(classes[0])) == 5
    np.testing.assert_array_equal(y[items[0]], np.repeat(classes[0][:, None], 6, 1))


def test_items_of_a_class_come_back_only_when_all_were_drawn():
    y = np.repeat([0, 1], [12, 12])
    batches = batches_of(y, classes_per_batch=2, batch_size=8)
    drawn = np.concatenate([batches.draw()[0].ravel() for _ in range(3)])
    assert sorted(drawn) == list(range(24))


def test_classes_come_back_only_when_all_were_drawn():
    batches = batches_of(np.repeat(np.arange(12), 4), classes_per_batch=4)
    classes = np.concatenate([batches.draw()[1].ravel() for _ in range(3)])
    assert sorted(classes) == list(range(12))


def test_a_round_that_ends_within_a_draw_does_not_repeat_an_item_of_the_draw():
    y = np.repeat([0, 1], 7)
    batches = batches_of(y, classes_per_batch=2, batch_size=12)
    for _ in range(50):
        items, _ = batches.draw()
        for row in items[0]:
            assert len(set(row)) == 6


@pytest.mark.parametrize("sizes", [(1, 1), (1, 1000), (1, 2, 3, 4, 5, 1000)])
def test_tiny_classes_and_heavy_imbalance_fill_their_rows(sizes):
    y = np.repeat(np.arange(len(sizes)), sizes)
    batches = batches_of(y, classes_per_batch=64, batch_size=128)
    items, classes = batches.draw()
    assert batches.classes_per_group == len(sizes)
    np.testing.assert_array_equal(y[items], np.broadcast_to(classes[..., None], items.shape))


def test_groups_of_a_step_hold_different_classes_where_there_are_enough():
    batches = batches_of(np.repeat(np.arange(12), 8), classes_per_batch=4, groups=3)
    items, classes = batches.draw()
    assert items.shape == (3, 4, 4)
    assert sorted(classes.ravel()) == list(range(12))


def test_the_split_is_stratified_and_keeps_an_item_of_every_class():
    y = np.repeat([0, 1, 2, 3], [100, 50, 1, 2])
    train, validation = split_validation(y, 0.1, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(np.r_[train, validation]), np.arange(len(y)))
    assert set(y[train]) == {0, 1, 2, 3}
    counts = np.bincount(y[validation], minlength=4)
    np.testing.assert_array_equal(counts[:3], [10, 5, 0])


def test_classes_too_small_for_the_fraction_are_held_out_now_and_then():
    y = np.repeat(np.arange(400), 2)
    _, validation = split_validation(y, 0.1, np.random.default_rng(0))
    assert 40 < len(validation) < 120


def test_a_fraction_of_zero_holds_nothing_out():
    train, validation = split_validation(np.array([0, 1, 1]), 0.0, np.random.default_rng(0))
    assert len(validation) == 0
    assert len(train) == 3
