"""Classes parted into clusters: which items go together, and what the hash stage makes of it."""

import numpy as np
import pytest

from hqsearch import HierarchicalHashEncoder
from hqsearch.embedding.clusters import ITEMS_PER_CLUSTER, part_classes
from hqsearch.search import LeafTable

N_MODES = 3


@pytest.fixture(scope="module")
def modes():
    """Four classes, of three far apart clouds of twenty items each: X, class, cloud."""
    rng = np.random.default_rng(0)
    cloud = np.repeat(np.arange(4 * N_MODES), 20)
    centres = rng.normal(scale=20, size=(4 * N_MODES, 6))
    X = (centres[cloud] + rng.normal(size=(len(cloud), 6))).astype(np.float32)
    order = rng.permutation(len(cloud))
    return X[order], (cloud // N_MODES)[order], cloud[order]


def partition(labels):
    """The sets of positions that share a label."""
    return {frozenset(np.flatnonzero(labels == value)) for value in np.unique(labels)}


def test_clouds_are_found_and_clusters_know_their_class(modes):
    X, y, cloud = modes
    clusters, class_of = part_classes(X, y, np.arange(len(y)), N_MODES, seed=0)
    assert partition(clusters) == partition(cloud)
    np.testing.assert_array_equal(class_of, np.repeat(np.arange(4), N_MODES))
    np.testing.assert_array_equal(class_of[clusters], y)
    again, _ = part_classes(X, y, np.arange(len(y)), N_MODES, seed=0)
    np.testing.assert_array_equal(again, clusters)


def test_held_out_items_play_no_part(modes):
    X, y, _ = modes
    train, held_out = np.arange(180), np.arange(180, len(y))
    clusters, class_of = part_classes(X, y, train, N_MODES, seed=0)
    moved = X.copy()
    moved[held_out] += 100
    np.testing.assert_array_equal(part_classes(moved, y, train, N_MODES, seed=0)[0], clusters)
    np.testing.assert_array_equal(class_of[clusters], y)
    # Each cluster can be trained on.
    assert set(clusters[train]) == set(range(len(class_of)))


def test_small_classes_get_fewer_clusters():
    rng = np.random.default_rng(0)
    sizes = [1, ITEMS_PER_CLUSTER, 2 * ITEMS_PER_CLUSTER - 1, 2 * ITEMS_PER_CLUSTER, 100]
    y = np.repeat(np.arange(5), sizes)
    clusters, class_of = part_classes(rng.normal(size=(len(y), 3)), y, np.arange(len(y)), 4, seed=0)
    assert np.bincount(class_of).tolist() == [1, 1, 1, 2, 4]
    np.testing.assert_array_equal(class_of[clusters], y)


def test_equal_items_are_one_cluster():
    y = np.repeat([0, 1], 40)
    X = np.zeros((80, 3), np.float32)
    X[60:] = 1
    clusters, class_of = part_classes(X, y, np.arange(80), 4, seed=0)
    assert class_of.tolist() == [0, 1, 1]
    assert partition(clusters) == {frozenset(range(40)), frozenset(range(40, 60)), frozenset(range(60, 80))}


@pytest.mark.parametrize("shared_trunk", [False, True])
@pytest.mark.parametrize("loss", ["npairs", "triplet", "proxy"])
def test_the_speed_up_passes_the_number_of_classes(modes, loss, shared_trunk):
    X, y, _ = modes
    sufs = {}
    for n_clusters in (1, N_MODES):
        encoder = HierarchicalHashEncoder(
            loss=loss, clusters_per_class=n_clusters, shared_trunk=shared_trunk, branching_factor=8,
            embedding_dim=8, batch_size=48, metric_epochs=2, hash_epochs=15, validation_fraction=0.1,
            learning_rate=3e-3, hash_learning_rate=3e-3, random_state=0,
        )  # fmt: skip
        embedding, scores, codes = encoder.fit(X, y).describe(X)
        table = LeafTable.build(embedding, codes, branching_factor=8, n_levels=2)
        found = table.search(embedding, scores, codes, 1, exclude=np.arange(len(y)))
        sufs[n_clusters] = found.stats.suf()
        assert np.mean(y[found.positions[:, 0]] == y) > 0.95
    # 4 classes, 12 clouds.
    assert 3 < sufs[1] < 6
    assert sufs[N_MODES] > 9


@pytest.mark.parametrize("loss", ["npairs", "triplet", "proxy"])
def test_the_embedding_that_is_trained_along_knows_labels_not_clusters(modes, monkeypatch, loss):
    from hqsearch.embedding import proxies, training

    X, y, _ = modes
    seen = []
    module, name, place = (proxies, "proxy_loss", 2) if loss == "proxy" else (training, "metric_loss", 1)
    function = getattr(module, name)

    def watch(*arguments):
        seen.append(arguments[place])
        return function(*arguments)

    encoder = HierarchicalHashEncoder(
        loss=loss, clusters_per_class=N_MODES, shared_trunk=True, branching_factor=8, embedding_dim=8,
        batch_size=24, classes_per_batch=12, metric_epochs=0, hash_epochs=1, random_state=0,
    )  # fmt: skip
    monkeypatch.setattr(module, name, watch)
    encoder.fit(X, y)
    assert seen
    for labels in seen:
        assert np.bincount(labels[0].numpy()).tolist() == [N_MODES] * 4
