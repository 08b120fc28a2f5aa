"""Where the trunk of the hash stage starts: at that of the metric stage, or anew."""

import numpy as np
import pytest
import torch
from torch import nn

from hqsearch import HierarchicalHashEncoder
from hqsearch.embedding import automatic, resolve_hash_start
from hqsearch.embedding.training import HashStage, MetricStage


def make(**parameters):
    return HierarchicalHashEncoder(**{"metric_epochs": 2, "hash_epochs": 2, "random_state": 0} | parameters)


@pytest.fixture
def starts(monkeypatch):
    """Weights of the trunk that each hash stage starts with, stage by stage."""
    seen = []
    run = HashStage.run

    def watched(stage):
        seen.append({name: value.clone() for name, value in stage.network.trunk.state_dict().items()})
        return run(stage)

    monkeypatch.setattr(HashStage, "run", watched)
    return seen


def is_at(start, network):
    trained = network.trunk.state_dict()
    assert start.keys() == trained.keys()
    return all(torch.equal(value, trained[name]) for name, value in start.items())


@pytest.mark.parametrize(
    ("hash_trunk", "epochs", "loss", "shared_trunk", "n_steps", "expected"),
    [
        ("auto", "auto", "proxy", False, 100, (True, 30)),
        ("auto", 30, "proxy", False, 100, (True, 30)),
        ("auto", 40, "proxy", False, 100, (True, 40)),
        ("auto", 29, "proxy", False, 100, (False, 29)),
        ("auto", "auto", "proxy", False, 40, (True, 30)),
        ("auto", "auto", "proxy", False, 20, (False, 30)),
        ("auto", "auto", "proxy", True, 100, (False, 20)),
        ("auto", "auto", "npairs", False, 100, (False, 20)),
        ("auto", 40, "triplet", False, 100, (False, 40)),
        ("new", "auto", "triplet", False, 100, (True, 30)),
        ("new", 5, "proxy", False, 100, (True, 5)),
        ("new", 0, "proxy", False, 100, (False, 0)),
        ("metric", "auto", "proxy", False, 100, (False, 20)),
        ("metric", 40, "proxy", False, 100, (False, 40)),
    ],
)
def test_auto_is_a_new_trunk_with_proxy_where_epochs_and_items_suffice(
    hash_trunk, epochs, loss, shared_trunk, n_steps, expected
):
    items = {"n_items": 128 * n_steps, "items_per_step": 128}
    assert resolve_hash_start(hash_trunk, epochs, loss=loss, shared_trunk=shared_trunk, **items) == expected


@pytest.mark.parametrize("loss", ["proxy", "npairs", "triplet"])
def test_a_new_trunk_starts_anew_and_leaves_the_embedding_alone(digits, starts, loss):
    X, y, X_query, _ = digits
    embeddings = []
    for hash_trunk in ("metric", "new"):
        encoder = make(loss=loss, hash_trunk=hash_trunk).fit(X, y)
        assert is_at(starts.pop(), encoder._model.metric_network) == (hash_trunk == "metric")
        embeddings.append(encoder.embed(X_query))
        assert np.isfinite(encoder.level_scores(X_query)).all()
    np.testing.assert_array_equal(*embeddings)


def test_a_new_trunk_is_drawn_from_the_random_state(digits, starts):
    X, y, X_query, _ = digits
    scores = [make(hash_trunk="new", random_state=s).fit(X, y).level_scores(X_query) for s in (0, 0, 1)]
    for name, value in starts[0].items():
        assert torch.equal(value, starts[1][name])
    assert any((value != starts[2][name]).any() for name, value in starts[0].items())
    np.testing.assert_array_equal(scores[0], scores[1])


def test_defaults_train_a_new_trunk_where_an_epoch_has_steps_enough(starts, monkeypatch):
    monkeypatch.setattr(automatic, "_EPOCHS", {"metric": 1, "hash": 2})
    monkeypatch.setattr(automatic, "_FEWEST_EPOCHS", {"metric": 1, "hash": 1})
    y = np.arange(600) % 4
    X = np.random.default_rng(0).normal(size=(600, 5)) + y[:, None]
    # Of the 540 that are not held out a step takes 12: 45 steps.
    encoder = HierarchicalHashEncoder(batch_size=12, random_state=0).fit(X, y)
    assert [record["stage"] for record in encoder.history_] == ["metric"] + ["hash"] * 3
    assert not is_at(starts.pop(), encoder._model.metric_network)
    encoder = HierarchicalHashEncoder(batch_size=16, random_state=0).fit(X, y)
    assert [record["stage"] for record in encoder.history_] == ["metric"] + ["hash"] * 2
    assert is_at(starts.pop(), encoder._model.metric_network)


def test_without_epochs_the_trunk_is_the_trained_one(digits, starts):
    encoder = make(hash_trunk="new", hash_epochs=0).fit(*digits[:2])
    assert is_at(starts[0], encoder._model.metric_network)


def test_after_an_interruption_the_trunk_is_the_trained_one(digits, starts, monkeypatch):
    def interrupted(stage):
        raise KeyboardInterrupt

    monkeypatch.setattr(MetricStage, "_run_epoch", interrupted)
    with pytest.warns(UserWarning, match="metric stage was interrupted"):
        encoder = make(hash_trunk="new", hidden_weight=0).fit(*digits[:2])
    assert [record["stage"] for record in encoder.history_] == ["hash"]
    assert is_at(starts[0], encoder._model.metric_network)


def test_a_users_module_starts_as_it_was_given(digits, starts):
    module = nn.Sequential(nn.Linear(64, 16), nn.ReLU())
    encoder = make(hash_trunk="new", network=module).fit(*digits[:2])
    for name, value in module.state_dict().items():
        assert torch.equal(starts[0][name], value)
    assert not is_at(starts[0], encoder._model.metric_network)


def test_a_function_that_always_returns_one_module_starts_both_stages_as_that_is(digits, starts):
    X, y, X_query, _ = digits
    module = nn.Sequential(nn.Linear(64, 16), nn.ReLU())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    embeddings = []
    for network in (module, lambda shape: module):
        encoder = make(hash_trunk="new", network=network).fit(X, y)
        start = starts.pop()
        for name, value in before.items():
            assert torch.equal(start[name], value)
            assert torch.equal(module.state_dict()[name], value)
        embeddings.append(encoder.embed(X_query))
    np.testing.assert_array_equal(*embeddings)


def test_a_function_whose_modules_differ_in_width_trains(digits):
    widths = iter([16, 16, 24])

    def network(shape):
        return nn.Sequential(nn.Linear(*shape, next(widths)), nn.ReLU())

    encoder = make(hash_trunk="new", network=network).fit(*digits[:2])
    assert np.isfinite(encoder.level_scores(digits[2])).all()


@pytest.mark.parametrize("shared", [True, "frozen"])
def test_one_trunk_for_both_stages_cannot_be_new(blobs, shared):
    expected = (
        rf"Expected hash_trunk='auto' or 'metric' with shared_trunk={shared!r}, .* got hash_trunk='new'"
    )
    with pytest.raises(ValueError, match=expected):
        make(hash_trunk="new", shared_trunk=shared).fit(*blobs)
    with pytest.raises(ValueError, match="shared_trunk"):
        make(shared_trunk="thawed").fit(*blobs)
    with pytest.raises(ValueError, match="hash_trunk"):
        make(hash_trunk="old").fit(*blobs)
