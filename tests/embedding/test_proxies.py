"""The stages of loss="proxy": their losses by definition, running averages, codes that settle."""

import numpy as np
import pytest
import torch
from sklearn.frozen import FrozenEstimator
from torch import nn

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.assignment import solve_cascades
from hqsearch.embedding.losses import class_cross_entropy, code_cross_entropy
from hqsearch.embedding.networks import StageNetwork, Standardize, new_head
from hqsearch.embedding.proxies import ProxyHashStage, ProxyMetricStage
from hqsearch.embedding.settling import AVERAGE_KEPT
from hqsearch.embedding.stage import StageSettings, TrainingData
from hqsearch.embedding.training import CodeProblem

N_CLASSES, N_LEVELS, D = 7, 2, 6


def make_stage(
    stage, *, groups=1, epochs=1, sparsity=1, solve=None, classes_per_batch=4, n_classes=N_CLASSES
):
    """Initialised stage on items around one centre for each class, always with the same weights."""
    rng = np.random.default_rng(0)
    y = np.arange(84) % n_classes
    X = 4 * rng.normal(size=(n_classes, 5))[y] + rng.normal(size=(84, 5))
    generator = torch.Generator().manual_seed(0)
    network = StageNetwork(
        Standardize(np.zeros(1), np.ones(1)), new_head(5, 8, generator), new_head(8, N_LEVELS * D, generator)
    )
    settings = StageSettings(
        loss="proxy",
        regularization=0.0,
        margin=0.0,
        epochs=epochs,
        learning_rate=1e-2,
        trunk_learning_rate=2e-3,
        batch_size=4 * classes_per_batch,
        classes_per_batch=classes_per_batch,
        class_groups_per_step=groups,
        proxy_scale=3.0,
    )
    data = TrainingData(torch.from_numpy(X.astype(np.float32)), y, np.arange(70), np.arange(0))
    if stage == "metric":
        built = ProxyMetricStage(network, data, settings, seed=0)
    else:
        solve = solve or (lambda scores: solve_cascades(scores, sparsity=sparsity))
        problem = CodeProblem(N_LEVELS, D, sparsity, solve, validate=lambda *_: {})
        built = ProxyHashStage(network, data, settings, problem=problem, seed=0)
    built._initialize()
    if stage == "hash":
        built._start_codes()
    return built


def log_softmax(values):
    """Definition, in float64."""
    values = np.asarray(values, np.float64)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def test_class_cross_entropy_is_the_mean_negative_log_probability_of_each_item():
    rng = np.random.default_rng(0)
    logits, classes = rng.normal(size=(2, 3, 4, 5)), np.array([[0, 4, 2], [3, 1, 0]])
    found = class_cross_entropy(torch.tensor(logits), torch.tensor(classes))
    for group in range(2):
        terms = [-log_softmax(logits[group, row])[:, classes[group, row]] for row in range(3)]
        assert found[group].item() == pytest.approx(np.mean(terms))


@pytest.mark.parametrize("sparsity", [1, 3])
def test_code_cross_entropy_spreads_its_target_over_the_active_buckets(sparsity):
    rng = np.random.default_rng(0)
    scores = log_softmax(rng.normal(size=(2, 3, 4, N_LEVELS, D)))
    codes = np.zeros((2, 3, N_LEVELS, D))
    codes[:, :, 0, 2] = 1
    codes[:, :, 1, :sparsity] = 1
    found = code_cross_entropy(torch.tensor(scores), torch.tensor(codes))
    first, last = scores[..., 0, 2], scores[..., 1, :sparsity].mean(-1)
    np.testing.assert_allclose(found, -(first + last).mean((1, 2)))


def test_the_metric_loss_is_softmax_over_scaled_cosines_to_all_proxies():
    stage = make_stage("metric")
    items = stage._batches.draw()[0]
    outputs = stage.network(stage.data.X).detach().numpy().astype(np.float64)
    proxies = stage._proxies.detach().numpy().astype(np.float64)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (outputs, proxies)]
    terms = log_softmax(3.0 * unit[0] @ unit[1].T)[items.ravel(), stage.data.y[items.ravel()]]
    assert stage._train_step(torch.from_numpy(items))["loss"].item() == pytest.approx(-terms.mean(), rel=1e-5)


def test_proxies_are_trained_at_their_own_rate_without_weight_decay():
    stage = make_stage("metric")
    (group,) = [g for g in stage._optimizer.param_groups if any(p is stage._proxies for p in g["params"])]
    assert group["initial_lr"] == pytest.approx(0.1)
    assert group["weight_decay"] == 0
    before = stage._proxies.detach().clone()
    stage._train_step(torch.from_numpy(stage._batches.draw()[0]))
    assert (stage._proxies.detach() != before).any(1).all()


def test_class_scores_start_at_the_scores_of_the_mean_hidden_layer_of_each_class():
    stage = make_stage("hash")
    with torch.no_grad():
        hidden = stage.network.hidden(stage.data.X[:70])
        means = torch.stack([hidden[stage.data.y[:70] == c].mean(0) for c in range(N_CLASSES)])
        expected = stage.network.head(means).unflatten(-1, (N_LEVELS, D)).log_softmax(-1)
    torch.testing.assert_close(stage._averages, expected, rtol=1e-4, atol=1e-5)


def test_codes_start_distinct_though_no_item_was_trained_on():
    stage = make_stage("hash")
    paths = stage._codes.flatten(1)
    assert len(np.unique(paths, axis=0)) == N_CLASSES
    assert (stage._codes.sum(-1) == 1).all()


def test_running_averages_move_a_tenth_towards_the_classes_of_a_step_and_leave_the_others():
    stage = make_stage("hash")
    items, classes = stage._batches.draw()
    before = stage._averages.clone()
    with torch.no_grad():
        scores = stage.network(stage.data.X).unflatten(-1, (N_LEVELS, D)).log_softmax(-1)
    stage._train_step(torch.from_numpy(items))
    for c in range(N_CLASSES):
        seen = np.flatnonzero(classes[0] == c)
        expected = before[c]
        if len(seen):
            mean = scores[items[0, seen[0]]].mean(0)
            expected = AVERAGE_KEPT * before[c] + (1 - AVERAGE_KEPT) * mean
        torch.testing.assert_close(stage._averages[c], expected, rtol=1e-4, atol=1e-5)
    assert 0 < len(classes[0]) < N_CLASSES


def test_a_class_of_two_groups_is_averaged_in_twice():
    stage = make_stage("hash", groups=2, classes_per_batch=6)
    items, classes = stage._batches.draw()
    (twice, *_) = np.intersect1d(*classes)
    average = stage._averages[twice].clone()
    with torch.no_grad():
        scores = stage.network(stage.data.X).unflatten(-1, (N_LEVELS, D)).log_softmax(-1)
    stage._train_step(torch.from_numpy(items))
    for group in range(2):
        average += (1 - AVERAGE_KEPT) * (scores[items[group][classes[group] == twice]][0].mean(0) - average)
    torch.testing.assert_close(stage._averages[twice], average, rtol=1e-4, atol=1e-5)


def test_codes_are_solved_over_all_classes_until_half_of_the_epochs_and_then_stay():
    asked = []

    def solve(scores):
        asked.append(scores)
        return solve_cascades(scores)

    stage = make_stage("hash", epochs=8, solve=solve)
    asked.clear()
    codes = stage._codes
    stage.run()
    # Once to begin with, then before epochs 2, 3 and 4.
    assert [scores.shape for scores in asked] == [(1, N_CLASSES, N_LEVELS, D)] * 4
    assert (np.ptp(asked, axis=0) > 0).any()
    assert stage._codes.shape == codes.shape


def test_a_class_stays_on_its_bucket_unless_another_one_is_clearly_better():
    stage = make_stage("hash", epochs=4, n_classes=2)
    own = stage._codes.argmax(-1)
    # Bucket `other` is a little, then much, better for class 0 at level 1; nobody else wants it.
    other = (own[0, 0] + 1 + (own[1, 0] == own[0, 0] + 1)) % D
    for lead, expected in ((0.5 * stage.hysteresis, own[0, 0]), (stage.hysteresis + 0.5, other)):
        stage._averages = torch.full_like(stage._averages, -9.0)
        stage._averages[1] += 8 * stage._codes[1]
        stage._averages[0, 0, own[0, 0]] = -1.0
        stage._averages[0, 0, other] = -1.0 + lead
        stage._solve_again()
        assert stage._codes[0, 0].argmax() == expected


@pytest.mark.parametrize("sparsity", [1, 3])
def test_the_hash_loss_is_that_of_the_levels_plus_that_of_the_class_among_all_by_its_leaves(sparsity):
    stage = make_stage("hash", sparsity=sparsity)
    items, classes = stage._batches.draw()
    with torch.no_grad():
        scores = stage.network(stage.data.X).unflatten(-1, (N_LEVELS, D)).log_softmax(-1).numpy()
    codes = stage._codes.numpy()
    terms = []
    for c, members in zip(classes[0], items[0], strict=True):
        for item in members:
            leaf = [
                sum(scores[item, v][codes[other, v] > 0].mean() for v in range(N_LEVELS))
                for other in range(N_CLASSES)
            ]
            terms.append(-leaf[c] - log_softmax(leaf)[c])
    loss = stage._train_step(torch.from_numpy(items))["loss"].item()
    assert loss == pytest.approx(np.mean(terms), rel=1e-4)


@pytest.mark.parametrize("n_classes", [2, 20])
def test_more_or_fewer_classes_than_buckets_have_buckets_to_start_from(n_classes):
    stage = make_stage("hash", n_classes=n_classes, classes_per_batch=2)
    assert torch.isfinite(stage.network.head.weight).all()
    assert torch.isfinite(stage._averages).all()
    assert len(np.unique(stage._codes.flatten(1), axis=0)) == n_classes


def test_a_trunk_whose_output_is_constant_gives_finite_scores():
    stage = make_stage("hash")
    with torch.no_grad():
        stage.network.trunk.weight.zero_()
    stage._start_codes()
    assert torch.isfinite(stage._averages).all()
    assert np.isfinite(stage._train_step(torch.from_numpy(stage._batches.draw()[0]))["loss"].item())


def test_the_global_random_state_is_not_asked():
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        stage = make_stage("hash", epochs=2)
        losses.append([record["loss"] for record in stage.run()])
    assert losses[0] == losses[1]


def test_ctrl_c_while_the_codes_are_started_leaves_a_usable_encoder(blobs, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ProxyHashStage, "_class_means", interrupt)
    encoder = HierarchicalHashEncoder(loss="proxy", metric_epochs=1, hash_epochs=2, random_state=0)
    with pytest.warns(UserWarning, match="hash stage was interrupted after 0 epochs"):
        encoder.fit(*blobs)
    assert encoder.encode(blobs[0]).shape == (240, 1)


def test_without_epochs_nothing_is_started(blobs, monkeypatch):
    monkeypatch.setattr(ProxyHashStage, "_class_means", lambda self: pytest.fail("was asked"))
    HierarchicalHashEncoder(loss="proxy", metric_epochs=1, hash_epochs=0, random_state=0).fit(*blobs)


@pytest.mark.parametrize("sparsity", [1, 3])
def test_a_proxy_encoder_gives_unit_embeddings_and_log_probabilities(digits, sparsity):
    X, y, X_query, y_query = digits
    encoder = HierarchicalHashEncoder(
        loss="proxy", branching_factor=8, sparsity=sparsity, metric_epochs=8, hash_epochs=8, random_state=0
    ).fit(X, y)
    np.testing.assert_allclose(np.linalg.norm(encoder.embed(X_query), axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.exp(encoder.level_scores(X_query)).sum(-1), 1, rtol=1e-5)
    index = HierarchicalHashIndex(FrozenEstimator(encoder), n_neighbors=4).fit(X, y)
    assert index.score(X_query, y_query) > 0.85
    assert index.suf() > 6


def test_the_hidden_layer_is_what_the_linear_layer_gets():
    stage = make_stage("hash")
    x = stage.data.X[:5]
    torch.testing.assert_close(stage.network(x), stage.network.head(stage.network.hidden(x)))
    torch.testing.assert_close(stage.network.hidden(x), nn.functional.relu(stage.network.trunk(x)))
