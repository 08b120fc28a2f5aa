"""An embedding out of two layers: distances kept, axes turned back, the same model saved and loaded."""

import numpy as np
import pytest
import torch
from torch import nn

from hqsearch import HierarchicalHashEncoder
from hqsearch.embedding import projection
from hqsearch.embedding.inference import infer
from hqsearch.embedding.networks import StageNetwork, Standardize, new_head
from hqsearch.embedding.projection import with_hidden_layer

N_FEATURES, N_HIDDEN, N_OUTPUTS = 6, 12, 4


@pytest.fixture
def network():
    trunk = new_head(N_FEATURES, N_HIDDEN, torch.Generator().manual_seed(0))
    head = new_head(N_HIDDEN, N_OUTPUTS, torch.Generator().manual_seed(1))
    nn.init.constant_(head.bias, 0.1)
    return StageNetwork(Standardize(np.zeros(N_FEATURES), np.ones(N_FEATURES)), trunk, head).eval()


@pytest.fixture
def X():
    return np.random.default_rng(0).normal(size=(300, N_FEATURES)).astype(np.float32)


def layers(network, X):
    with torch.no_grad():
        hidden = network.hidden(torch.from_numpy(X))
        outputs = network.head(hidden)
    unit = nn.functional.normalize
    return outputs.numpy(), unit(outputs).numpy(), unit(hidden).numpy()


def joined(network, X, weight, *, unit=True, train=None, seed=0):
    train = np.arange(len(X)) if train is None else train
    return infer(with_hidden_layer(network, X, train, weight=weight, unit=unit, seed=seed), X).numpy()


def squared_distances(rows):
    return ((rows[:, None] - rows) ** 2).sum(-1)


@pytest.mark.parametrize("unit", [True, False])
def test_little_weight_leaves_the_trained_embedding_axis_by_axis(network, X, unit):
    outputs, units, _ = layers(network, X)
    expected = units if unit else outputs
    np.testing.assert_allclose(joined(network, X, 1e-6, unit=unit), expected, atol=1e-5)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_squared_lengths_are_those_of_the_best_projection(network, X, weight, unit):
    outputs, units, hidden = layers(network, X)
    trained = units if unit else outputs
    both = np.hstack([trained, weight * np.sqrt((trained**2).sum(1).mean()) * hidden])
    values = np.linalg.svd(both, compute_uv=False)
    rows = joined(network, X, weight, unit=unit)
    assert (rows**2).sum() == pytest.approx((values[:N_OUTPUTS] ** 2).sum(), rel=1e-4)
    # A projection takes from distances, never adds to them.
    assert (squared_distances(rows) <= squared_distances(both) + 1e-4).all()


def test_the_more_weight_the_more_distances_are_those_of_the_layer_below(network, X):
    pairs = np.triu_indices(len(X), 1)
    below = squared_distances(layers(network, X)[2])[pairs]
    alike = [
        np.corrcoef(below, squared_distances(joined(network, X, weight))[pairs])[0, 1]
        for weight in (0.01, 1.0, 100.0)
    ]
    assert alike[0] < 0.6 < alike[1] < 0.8 < alike[2]


def test_axes_are_those_of_the_training_items(network, X):
    train = np.arange(100)
    rows = joined(network, X, 1.0, train=train)
    np.testing.assert_array_equal(
        joined(network, np.vstack([X[:100], X[100:] * 9]), 1.0, train=train)[:100], rows[:100]
    )
    assert (joined(network, X, 1.0) != rows).any()


def test_of_many_items_some_are_drawn_from_the_seed(network, X, monkeypatch):
    seen = []
    monkeypatch.setattr(projection, "infer", lambda network, X: seen.append(X) or infer(network, X))
    monkeypatch.setattr(projection, "_MOST_ITEMS", 50)
    first, again, _ = (joined(network, X, 1.0, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert [len(items) for items in seen] == [50, 50, 50]
    assert (seen[0] != seen[2]).any()


# One item, three, and three of which each comes ten times.
@pytest.mark.parametrize(("n_items", "n_times"), [(1, 1), (3, 1), (3, 10)])
def test_where_items_span_fewer_dimensions_the_rest_is_the_trained_embedding(network, X, n_items, n_times):
    train = np.tile(np.arange(n_items), n_times)
    units = layers(network, X)[1]
    np.testing.assert_allclose(joined(network, X, 1e-6, train=train), units, atol=1e-5)
    axes = with_hidden_layer(network, X, train, weight=1.0, unit=True, seed=0).axes
    np.testing.assert_allclose(axes.T @ axes, np.eye(N_OUTPUTS), atol=1e-5)
    # Whether an item comes once or often.
    once = joined(network, X, 1.0, train=np.arange(n_items))
    np.testing.assert_allclose(joined(network, X, 1.0, train=train), once, atol=1e-4)
    # Nothing of these items is lost.
    _, units, hidden = layers(network, X[:n_items])
    both = np.hstack([units, hidden])
    np.testing.assert_allclose(np.linalg.norm(both @ axes.numpy(), axis=1), np.sqrt(2), atol=1e-4)


def test_a_layer_below_that_is_zero_leaves_the_trained_embedding(network, X):
    nn.init.zeros_(network.trunk.weight)
    units = layers(network, X)[1]
    np.testing.assert_allclose(joined(network, X, 1.0), units, atol=1e-6)


def test_of_a_very_wide_layer_fewer_items_have_to_do(network, X, monkeypatch):
    seen = []
    monkeypatch.setattr(projection, "infer", lambda network, X: seen.append(len(X)) or infer(network, X))
    for most in (2**24, 20 * (N_HIDDEN + N_OUTPUTS), 1):
        monkeypatch.setattr(projection, "_MOST_NUMBERS", most)
        joined(network, X, 1.0)
    assert seen == [300, 20, N_OUTPUTS]


@pytest.mark.parametrize("shared_trunk", [False, True, "frozen"])
@pytest.mark.parametrize("loss", ["proxy", "triplet", "npairs"])
def test_hidden_weight_of_an_encoder(digits, tmp_path, loss, shared_trunk):
    X, y, X_query, _ = digits
    parameters = {"loss": loss, "shared_trunk": shared_trunk, "metric_epochs": 2, "hash_epochs": 1}
    plain, auto, half = (
        HierarchicalHashEncoder(**parameters, random_state=0, hidden_weight=weight).fit(X, y)
        for weight in (0, "auto", 0.5)
    )
    embedding, scores, _ = half.describe(X_query)
    assert embedding.shape == (len(X_query), 64)
    np.testing.assert_array_equal(embedding, half.embed(X_query))
    assert np.allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5) == (loss != "npairs")
    same = (auto.embed(X_query) == plain.embed(X_query)).all()
    assert same == (loss != "proxy")
    assert (embedding != plain.embed(X_query)).any()
    # What is trained is the same. (The codes' kept epoch is chosen by the embedding; here there is one.)
    np.testing.assert_array_equal(scores, plain.level_scores(X_query))
    half.save(tmp_path / "encoder")
    np.testing.assert_array_equal(
        HierarchicalHashEncoder.load(tmp_path / "encoder").embed(X_query), embedding
    )


@pytest.mark.parametrize("hidden_weight", [-1.0, "none", None])
def test_hidden_weight_is_checked(digits, hidden_weight):
    with pytest.raises(ValueError, match="hidden_weight"):
        HierarchicalHashEncoder(hidden_weight=hidden_weight).fit(*digits[:2])
