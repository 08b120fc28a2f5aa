"""The papers' losses with codes that settle; what all settling stages share is tested with the proxy loss."""

import numpy as np
import pytest
import torch

from hqsearch.assignment import solve_cascades
from hqsearch.embedding.networks import StageNetwork, Standardize, new_head
from hqsearch.embedding.settling import SettledHashStage
from hqsearch.embedding.stage import StageSettings, TrainingData
from hqsearch.embedding.training import CodeProblem, HashStage

N_CLASSES, N_LEVELS, D = 7, 2, 6


def make_stage(kind, loss, *, solve=solve_cascades, epochs=1):
    """Stage on items around one centre for each class, always with the same weights."""
    rng = np.random.default_rng(0)
    y = np.arange(84) % N_CLASSES
    X = 4 * rng.normal(size=(N_CLASSES, 5))[y] + rng.normal(size=(84, 5))
    generator = torch.Generator().manual_seed(0)
    network = StageNetwork(
        Standardize(np.zeros(1), np.ones(1)), new_head(5, 8, generator), new_head(8, N_LEVELS * D, generator)
    )
    settings = StageSettings(
        loss=loss, regularization=0.01, margin=0.4, epochs=epochs, learning_rate=1e-2,
        trunk_learning_rate=2e-3, batch_size=16, classes_per_batch=4,
    )  # fmt: skip
    data = TrainingData(torch.from_numpy(X.astype(np.float32)), y, np.arange(84), np.arange(0))
    problem = CodeProblem(N_LEVELS, D, 1, solve, validate=lambda *_: {})
    return kind(network, data, settings, problem=problem, seed=0)


@pytest.mark.parametrize("loss", ["npairs", "triplet"])
def test_the_loss_is_that_of_the_codes_that_settle(loss):
    stage = make_stage(SettledHashStage, loss)
    stage._initialize()
    stage._start_codes()
    items, classes = stage._batches.draw()
    # The same batch with the same codes, but found for the batch.
    codes = stage._codes[torch.from_numpy(classes)].bool().numpy()
    batch = make_stage(HashStage, loss, solve=lambda scores: codes)
    batch._initialize()
    batch.network.load_state_dict(stage.network.state_dict())
    losses = [s._train_step(torch.from_numpy(items))["loss"].item() for s in (stage, batch)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] > 0


def test_codes_that_are_solved_anew_stay_at_their_place_in_memory():
    # Where a captured step reads them.
    stage = make_stage(SettledHashStage, "npairs")
    stage._initialize()
    stage._start_codes()
    codes, before = stage._codes, stage._codes.clone()
    stage._averages.copy_(stage._averages.roll(1, 0))
    stage._solve_again()
    assert stage._codes is codes
    assert not torch.equal(codes, before)


@pytest.mark.parametrize("loss", ["npairs", "triplet"])
def test_training_separates_the_classes_under_codes_that_moved_before_they_settled(loss):
    asked = []

    def solve(scores):
        asked.append(solve_cascades(scores))
        return asked[-1]

    stage = make_stage(SettledHashStage, loss, solve=solve, epochs=150)
    stage.run()
    assert [codes.shape for codes in asked] == [(1, N_CLASSES, N_LEVELS, D)] * 75
    with torch.no_grad():
        scores = stage._split(stage.network(stage.data.X)).numpy()
    leaves = (scores.argmax(-1) * (D, 1)).sum(-1)
    settled = (asked[-1][0].argmax(-1) * (D, 1)).sum(-1)
    assert len(set(settled)) == N_CLASSES
    assert np.mean(leaves == settled[stage.data.y]) > 0.9
