"""Both stages step by step: labels and losses by definition, rates, one pass and one solve a step."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hqsearch import HierarchicalHashEncoder
from hqsearch.embedding.networks import StageNetwork, Standardize, build_trunk, new_head
from hqsearch.embedding.stage import StageSettings, TrainingData
from hqsearch.embedding.training import CodeProblem, HashStage, MetricStage

LOSSES = ["npairs", "triplet"]
N_FEATURES = 5


def top_buckets(class_scores, sparsity):
    """Best buckets of each class and level on their own: one a level, `sparsity` in the last."""
    codes = np.zeros(class_scores.shape, bool)
    order = np.argsort(-class_scores, axis=-1)
    for level in range(class_scores.shape[2]):
        chosen = order[:, :, level, : sparsity if level == class_scores.shape[2] - 1 else 1]
        np.put_along_axis(codes[:, :, level], chosen, True, -1)
    return codes


def make_stage(
    stage="hash",
    loss="npairs",
    *,
    n_levels=2,
    d=6,
    sparsity=1,
    groups=1,
    epochs=1,
    trunk=None,
    input_shape=(N_FEATURES,),
    solve=None,
):
    """Initialised stage on 60 items of 5 classes, always with the same weights."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    X = torch.from_numpy(rng.normal(size=(60, *input_shape)).astype(np.float32))
    trunk = trunk or new_head(N_FEATURES, 8, generator)
    with torch.no_grad():
        trunk.eval()
        width = trunk(X[:1]).shape[1]
    network = StageNetwork(
        Standardize(np.zeros(1), np.ones(1)), trunk, new_head(width, n_levels * d, generator)
    )
    data = TrainingData(X, np.arange(60) % 5, np.arange(60), np.arange(0))
    settings = StageSettings(
        loss=loss,
        regularization=0.02,
        margin=0.4,
        epochs=epochs,
        learning_rate=1e-2,
        trunk_learning_rate=2e-3,
        batch_size=20,
        classes_per_batch=5,
        class_groups_per_step=groups,
    )
    if stage == "metric":
        built = MetricStage(network, data, settings, seed=0)
    else:
        solve = solve or (lambda class_scores: top_buckets(class_scores, sparsity))
        problem = CodeProblem(n_levels, d, sparsity, solve, validate=lambda *_: {})
        built = HashStage(network, data, settings, problem=problem, seed=0)
    built._initialize()
    return built


def naive_level_loss(scores, codes, labels, loss, *, regularization=0.02, margin=0.4):
    """Masked loss of one group and level; `scores` (n_classes, per_class, d), `labels` one a class."""
    n_classes, per_class, d = scores.shape

    def masked(first, second, term):
        (c, i), (r, j) = first, second
        return sum(term(scores[c, i, t], scores[r, j, t]) for t in range(d) if codes[c, t] or codes[r, t])

    items = [(c, i) for c in range(n_classes) for i in range(per_class)]
    if loss == "npairs":
        anchors = [item for item in items if item[1] < per_class // 2]
        positives = [item for item in items if item[1] >= per_class // 2]
        total = 0.0
        for a in anchors:
            logits = [masked(a, p, lambda x, y: x * y) for p in positives]
            same = [k for k, p in enumerate(positives) if labels[a[0]] == labels[p[0]]]
            total += np.log(np.exp(logits).sum()) - sum(logits[k] for k in same) / len(same)
        norms = sum(np.mean([scores[item] @ scores[item] for item in half]) for half in (anchors, positives))
        return total / len(anchors) + 0.25 * regularization * norms
    hinges = []
    for first in items:
        away = [masked(first, k, lambda x, y: abs(x - y)) for k in items if labels[k[0]] != labels[first[0]]]
        for second in items:
            if first == second or labels[first[0]] != labels[second[0]] or not away:
                continue
            near = masked(first, second, lambda x, y: abs(x - y))
            farther = [distance for distance in away if distance > near]
            hinges.append(max(0.0, margin + near - (min(farther) if farther else max(away))))
    return sum(hinges) / max(1, len(hinges))


def buckets_of(codes):
    return [frozenset(np.flatnonzero(row)) for row in codes]


def codes_of(paths, d=6):
    """Bool codes (n_classes, n_levels, d) from the buckets of each class and level."""
    codes = np.zeros((len(paths), len(paths[0]), d), bool)
    for c, path in enumerate(paths):
        for level, buckets in enumerate(path):
            codes[c, level, list(buckets)] = True
    return codes


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sparsity", [1, 3])
def test_level_loss_of_each_group_equals_the_triple_loop_over_items(loss, sparsity):
    rng = np.random.default_rng(sparsity)
    # Few sets, so that some are equal; with three buckets others overlap without being equal.
    pool = {1: [(0,), (1,), (4,)], 3: [(0, 1, 2), (0, 1, 3), (3, 4, 5)]}[sparsity]
    chosen = rng.integers(0, len(pool), (3, 5))
    codes = np.stack([codes_of([[pool[k]] for k in row])[:, 0] for row in chosen])
    scores = rng.normal(size=(3, 5, 4, 6))
    found = make_stage(loss=loss)._level_loss(torch.tensor(scores), torch.tensor(codes), sparsity)
    expected = [naive_level_loss(s, z, buckets_of(z), loss) for s, z in zip(scores, codes, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("last", [[(2,), (2,), (2,), (5,)], [(0, 1, 2), (0, 1, 2), (0, 1, 3), (3, 4, 5)]])
def test_classes_of_one_bucket_are_positives_under_different_parents_too(loss, last):
    # Classes 0 and 2 share their parent, class 1 has another one and the same last level as class 0.
    codes = codes_of([[(first,), buckets] for first, buckets in zip((0, 1, 0, 3), last, strict=True)])
    scores = np.random.default_rng(1).normal(size=(4, 4, 2, 6))
    stage = make_stage(loss=loss, sparsity=len(last[0]))
    found = stage._masked_loss(torch.tensor(scores)[None], torch.tensor(codes)[None])

    def summed(labels_of_level):
        return sum(
            naive_level_loss(scores[:, :, level], codes[:, level], labels_of_level(level), loss)
            for level in range(2)
        )

    by_level = summed(lambda level: buckets_of(codes[:, level]))
    by_path = summed(lambda level: [codes[c, : level + 1].tobytes() for c in range(4)])
    assert abs(by_level - by_path) > 1e-3
    assert found.item() == pytest.approx(by_level, rel=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sparsity", [1, 3])
def test_codes_of_one_level_are_trained_with_the_labels_themselves(loss, sparsity):
    # Classes 0 and 1 have the same code.
    codes = codes_of([[{1: (first,), 3: (first, 4, 5)}[sparsity]] for first in (2, 2, 0, 3)])
    scores = np.random.default_rng(3).normal(size=(2, 4, 4, 1, 6))
    stage = make_stage(loss=loss, sparsity=sparsity, n_levels=1)
    found = stage._masked_loss(torch.tensor(scores), torch.tensor(np.stack([codes, codes])))
    expected, by_code = (
        [naive_level_loss(group[:, :, 0], codes[:, 0], labels, loss) for group in scores]
        for labels in (range(4), buckets_of(codes[:, 0]))
    )
    assert np.abs(np.subtract(expected, by_code)).min() > 1e-3
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_classes_that_all_share_a_bucket_have_no_negative_whatever_their_parents():
    codes = codes_of([[(0,), (3,)], [(1,), (3,)], [(2,), (3,)]])
    scores = torch.tensor(np.random.default_rng(2).normal(size=(1, 3, 4, 6)))
    assert make_stage(loss="triplet")._level_loss(scores, torch.tensor(codes[None, :, 1]), 1).item() == 0


@pytest.mark.parametrize("name", ["conv", "nin"])
def test_head_and_trunk_learn_at_their_own_rates_with_the_papers_weight_decay(name):
    trunk = build_trunk(name, (1, 16, 16), torch.Generator().manual_seed(0))
    stage = make_stage(trunk=trunk, input_shape=(1, 16, 16))
    found = {
        parameter: (group["initial_lr"], group["weight_decay"])
        for group in stage._optimizer.param_groups
        for parameter in group["params"]
    }
    expected = {}
    for part, rate in ((stage.network.head, 1e-2), (stage.network.trunk, 2e-3)):
        for module in part.modules():
            for which, parameter in module.named_parameters(recurse=False):
                decay = 0.0
                if which == "weight" and isinstance(module, nn.Linear):
                    decay = 5e-4
                elif which == "weight" and isinstance(module, nn.Conv2d):
                    decay = 4e-5
                expected[parameter] = (rate, decay)
    assert found == expected
    assert set(found) == set(stage.network.parameters())
    assert len({*found.values()}) == (5 if name == "conv" else 4)


@pytest.mark.parametrize("stage_name", ["metric", "hash"])
def test_rates_warm_up_and_then_follow_a_cosine_to_zero(stage_name):
    stage = make_stage(stage_name, epochs=20)
    peaks = np.array([group["initial_lr"] for group in stage._optimizer.param_groups])
    rates = []
    apply = stage._apply

    def recording():
        rates.append([group["lr"] for group in stage._optimizer.param_groups])
        apply()

    stage._apply = recording
    stage.run()
    shares = np.array(rates) / peaks
    np.testing.assert_allclose(shares, np.broadcast_to(shares[:, :1], shares.shape))
    n_steps = len(shares)
    assert n_steps == 20 * 3
    cosine = [0.5 * (1 + math.cos(math.pi * step / n_steps)) for step in range(n_steps)]
    warmup = [min(1.0, (step + 1) / 11) for step in range(n_steps)]
    np.testing.assert_allclose(shares[:, 0], np.multiply(cosine, warmup))
    assert shares[0, 0] < 0.1 < 0.9 < shares.max()
    assert shares[-1, 0] < 1e-3
    assert max(group["lr"] for group in stage._optimizer.param_groups) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n_levels", [1, 3])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_step_runs_the_network_once_and_hands_over_its_class_scores_once(loss, n_levels, groups):
    passes, solved = [], []

    def solve(class_scores):
        solved.append(class_scores)
        return top_buckets(class_scores, 2)

    stage = make_stage(loss=loss, n_levels=n_levels, groups=groups, sparsity=2, solve=solve)
    forward = stage.network.forward
    stage.network.forward = lambda x: passes.append(len(x)) or forward(x)
    items = stage._batches.draw()[0]
    stage._train_step(torch.from_numpy(items))
    assert passes == [items.size]
    (class_scores,) = solved
    assert isinstance(class_scores, np.ndarray)
    assert class_scores.dtype == np.float32
    assert class_scores.shape == (groups, 5, n_levels, 6)


@pytest.mark.parametrize("stage_name", ["metric", "hash"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_step_is_the_mean_of_its_groups_losses(stage_name, loss):
    items = torch.from_numpy(make_stage(groups=3)._batches.draw()[0])
    together = make_stage(stage_name, loss, groups=3)._train_step(items)["loss"]
    alone = [make_stage(stage_name, loss)._train_step(group[None])["loss"].item() for group in items]
    assert np.ptp(alone) > 1e-4
    assert together.item() == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_class_scores_are_the_means_of_the_level_scores_of_their_items(loss):
    solved = []
    stage = make_stage(loss=loss, groups=2, solve=lambda u: solved.append(u) or top_buckets(u, 1))
    items = stage._batches.draw()[0]
    with torch.no_grad():
        outputs = stage.network(stage.data.X).numpy().astype(np.float64)
    stage._train_step(torch.from_numpy(items))
    for group, row in enumerate(items):
        for c, members in enumerate(row):
            blocks = [outputs[item].reshape(2, 6) for item in members]
            if loss == "triplet":
                blocks = [block / np.linalg.norm(block, axis=1, keepdims=True) for block in blocks]
            np.testing.assert_allclose(solved[0][group, c], sum(blocks) / len(blocks), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_network_in_network_encoder_trains_both_stages_on_bytes(loss):
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (40, 1, 16, 16), dtype=np.uint8)
    encoder = HierarchicalHashEncoder(
        network="nin",
        loss=loss,
        branching_factor=8,
        sparsity=2,
        metric_epochs=1,
        hash_epochs=1,
        random_state=0,
    ).fit(X, np.arange(40) % 4)
    assert [record["stage"] for record in encoder.history_] == ["metric", "hash"]
    assert all(np.isfinite(record["loss"]) for record in encoder.history_)
    scores = encoder.level_scores(X)
    assert scores.shape == (40, 2, 8)
    assert np.isfinite(scores).all()
    assert np.isfinite(encoder.embed(X)).all()
    assert np.unique(scores.astype(np.float64), axis=0).shape[0] == 40


@pytest.mark.parametrize("stage_name", ["metric", "hash"])
def test_a_loss_that_is_not_finite_raises_and_names_stage_and_epoch(stage_name):
    stage = make_stage(stage_name, epochs=3)
    plain = stage._loss
    stage._loss = lambda outputs, classes: (
        plain(outputs, classes) * (math.nan if len(stage.history) == 1 else 1.0)
    )
    with pytest.raises(FloatingPointError, match=f"loss of the {stage_name} stage is nan in epoch 2"):
        stage.run()


@pytest.mark.parametrize(
    ("criteria", "errors", "kept"),
    [
        # All alike, and the last has trained longest.
        ([0.90, 0.88, 0.89], [0.03, 0.03, 0.03], 3),
        # The error is that of the best.
        ([0.90, 0.86, 0.80], [0.03, 0.20, 0.20], 1),
        ([0.90, 0.95, 0.93, 0.91], [0.09, 0.03, 0.09, 0.09], 3),
        ([0.50, 0.90, 0.60], [0.0, 0.0, 0.0], 2),
        ([0.90, 0.90], [0.0, 0.0], 2),
    ],
)
def test_the_last_epoch_within_a_standard_error_of_the_best_is_kept(monkeypatch, criteria, errors, kept):
    stage = make_stage("metric", epochs=len(criteria))
    stage.data = replace(stage.data, validation=np.arange(10))
    states = []

    def validate(stage):
        states.append(copy.deepcopy(stage.network.state_dict()))
        epoch = len(stage.history)
        return {"criterion": criteria[epoch], "standard_error": errors[epoch]}

    monkeypatch.setattr(MetricStage, "_validate", validate)
    stage.run()
    equal = [
        all(
            torch.equal(a, b)
            for a, b in zip(state.values(), stage.network.state_dict().values(), strict=True)
        )
        for state in states
    ]
    assert equal == [epoch == kept for epoch in range(1, len(criteria) + 1)]
