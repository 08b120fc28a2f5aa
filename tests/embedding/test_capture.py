"""Training steps as CUDA graphs: which are captured, and that they train what steps one by one train."""

import gc
import weakref

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed
from simulated_graphs import simulate
from torch import nn

import hqsearch.fitting
from hqsearch import HierarchicalHashEncoder
from hqsearch.baselines import SoftmaxHashEncoder
from hqsearch.embedding import capture, checkpoints
from hqsearch.embedding.automatic import resolve_captured
from hqsearch.embedding.capture import CapturedStep
from hqsearch.embedding.networks import Dropout, StageNetwork, Standardize
from hqsearch.embedding.stage import Stage, StageSettings, TrainingData, make_optimizer
from hqsearch.embedding.training import MetricStage

# Five steps an epoch of digits, of which the first three of a stage run as they are.
STEPS = {"validation_fraction": 0, "precision": "float32"}
N_REPLAYS = 4 * 5 - 3
CUDA = torch.device("cuda")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make(**parameters):
    return HierarchicalHashEncoder(
        **{"metric_epochs": 4, "hash_epochs": 4, "random_state": 0, **STEPS} | parameters
    )


def losses_of(encoder):
    return [record["loss"] for record in encoder.history_]


def assert_close(losses, expected, share=0.02):
    """Equal up to a share of each stage's first loss: rounding grows, and some losses fall to nearly none."""
    for stage in (slice(0, 4), slice(4, 8)):
        assert losses[stage] == pytest.approx(expected[stage], abs=share * expected[stage][0])


@pytest.mark.parametrize(
    ("network", "device", "expected"),
    [
        ("auto", CUDA, True),
        ("nin", CUDA, True),
        ("mlp", torch.device("cpu"), False),
        (nn.Linear(2, 2), CUDA, False),
        (lambda shape: nn.Linear(2, 2), CUDA, False),
    ],
)
def test_steps_of_our_own_networks_on_a_gpu_may_be_captured(network, device, expected):
    assert resolve_captured(network, device) is expected


def test_the_rates_of_captured_steps_stay_in_place_and_follow_the_schedule():
    # Fused and capturable, as on a GPU; none of that is asked for before a step.
    weight = nn.Parameter(torch.zeros(2))
    groups = [{"params": [weight], "lr": np.float64(0.5)}]
    optimizer = make_optimizer(groups, torch.device("cpu"), captured=True)
    rate = optimizer.param_groups[0]["lr"]
    # The only type that the fused Adam takes.
    assert (rate.item(), rate.dtype) == (0.5, torch.float32)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    optimizer._opt_called = True  # or the schedule warns that no step came before it
    for expected in (0.05, 0.005):
        schedule.step()
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(expected)


def test_a_stage_is_gone_with_its_data_once_nobody_holds_it():
    # Not when cycles are looked for: on a GPU that would be all items, for an unknown time.
    network = StageNetwork(Standardize(np.zeros(1), np.ones(1)), nn.Linear(3, 4), nn.Linear(4, 2))
    data = TrainingData(torch.randn(16, 3), np.arange(16) % 2, np.arange(16), np.arange(0))
    stage = MetricStage(network, data, StageSettings("npairs", 0.0, 0.0, 1, 1e-3, 1e-3, 8, 2), seed=0)
    gc.disable()
    try:
        stage.run()
        gone = weakref.ref(stage)
        del stage
        assert gone() is None
    finally:
        gc.enable()


def test_no_gradients_stay_with_a_network_whose_training_failed(digits, monkeypatch):
    X, y, *_ = digits
    run_epoch, networks = Stage._run_epoch, []

    def failing(stage):
        networks.append(stage.network)
        run_epoch(stage)
        raise OSError("the disk is full")

    monkeypatch.setattr(Stage, "_run_epoch", failing)
    with pytest.raises(OSError, match="disk is full"):
        make(metric_epochs=1).fit(X, y)
    assert all(parameter.grad is None for parameter in networks[0].parameters())


def test_no_gradients_stay_with_a_trained_network(digits):
    X, y, *_ = digits
    encoder = make(metric_epochs=1, hash_epochs=1).fit(X, y)
    for network in (encoder._model.metric_network, encoder._model.hash_network):
        assert all(parameter.grad is None for parameter in network.parameters())


def share_of(network, loss, assignment):
    """By how much two trainings may differ: negatives and codes change with the last bit of a score."""
    # A millionth on the initial weights makes 0.11 on a CPU, and no other of these that settle above 0.005.
    if (network, loss, assignment) == ("conv", "triplet", "settled"):
        return 0.25
    return 0.02 if assignment == "settled" else 0.05


def on_network(network, X, loss, assignment):
    """X as a network takes it, and an encoder's parameters."""
    asked = {"loss": loss, "network": network, "code_assignment": assignment, "device": "cuda"}
    if network == "mlp":
        return X, asked
    # Without normalisation a network in network amplifies what differs, unless it takes small steps.
    slow = {"learning_rate": 1e-4, "hash_learning_rate": 1e-4} if network == "nin" else {}
    return X.reshape(-1, 1, 8, 8), asked | slow


@pytest.mark.parametrize(
    ("network", "loss", "assignment", "n_graphs"),
    [
        ("mlp", "proxy", "settled", 2),
        ("mlp", "npairs", "settled", 2),
        # The metric stage's step, and the hash stage's before and after the flow problems.
        ("mlp", "npairs", "batch", 3),
        # With random numbers, for dropout.
        ("nin", "proxy", "settled", 2),
    ],
)
@pytest.mark.parametrize("shared_trunk", [False, "frozen"])
def test_simulated_captures_train_to_the_bit_what_steps_one_by_one_train(
    digits, monkeypatch, network, loss, assignment, n_graphs, shared_trunk
):
    X, y, *_ = digits
    X, asked = on_network(network, X, loss, assignment)
    asked |= {"device": "cpu", "metric_epochs": 2, "hash_epochs": 2, "shared_trunk": shared_trunk}
    graphs = simulate(monkeypatch)
    monkeypatch.setattr(hqsearch.fitting, "resolve_captured", lambda network, device: True)
    captured = make(**asked).fit(X, y)
    assert len(graphs) == n_graphs
    # The optimiser of steps that are captured, but none is.
    monkeypatch.setattr(capture, "N_STEPS_BEFORE", 1000)
    plain = make(**asked).fit(X, y)
    assert len(graphs) == n_graphs
    assert losses_of(captured) == losses_of(plain)


@pytest.fixture
def n_replays(monkeypatch):
    """Count the steps that are replayed, each stage's in a number of its own."""
    counts = {}
    step = CapturedStep.__call__

    def counting(self, items):
        loss = step(self, items)
        counts[self] = counts.get(self, 0) + (self._results is not None)
        return loss

    monkeypatch.setattr(CapturedStep, "__call__", counting)
    return lambda: sorted(counts.values())


@pytest.mark.parametrize(
    ("loss", "assignment"),
    [
        ("proxy", "settled"),
        ("npairs", "settled"),
        ("triplet", "settled"),
        # Steps in two parts, with the flow problems between them.
        ("npairs", "batch"),
        ("triplet", "batch"),
    ],
)
@pytest.mark.parametrize("network", ["mlp", "conv", "nin"])
class TestOnGpu:
    pytestmark = on_gpu

    def test_captured_steps_train_what_steps_one_by_one_train(
        self, digits, n_replays, monkeypatch, loss, assignment, network
    ):
        X, y, *_ = digits
        X, asked = on_network(network, X, loss, assignment)
        captured = make(**asked).fit(X, y)
        assert n_replays() == [N_REPLAYS] * 2
        monkeypatch.setattr(hqsearch.fitting, "resolve_captured", lambda network, device: False)
        plain = make(**asked).fit(X, y)
        assert len(n_replays()) == 2
        assert_close(losses_of(captured), losses_of(plain), share_of(network, loss, assignment))
        # What is compared moves by more than that.
        assert losses_of(plain)[3] < 0.9 * losses_of(plain)[0] or network == "nin"

    @pytest.mark.parametrize("stage", ["metric", "hash"])
    def test_a_fit_that_goes_on_from_a_checkpoint_ends_as_one_that_was_not_stopped(
        self, digits, n_replays, monkeypatch, tmp_path, loss, assignment, network, stage
    ):
        monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", 1.0)
        X, y, *_ = digits
        X, asked = on_network(network, X, loss, assignment)
        whole = make(**asked).fit(X, y)
        run_epoch = Stage._run_epoch

        def dying(running):
            if running.name == stage and len(running.history) == 2:
                raise InterruptedError
            return run_epoch(running)

        monkeypatch.setattr(Stage, "_run_epoch", dying)
        with pytest.raises(InterruptedError):
            make(**asked, checkpoint_dir=tmp_path).fit(X, y)
        monkeypatch.setattr(Stage, "_run_epoch", run_epoch)
        resumed = make(**asked, checkpoint_dir=tmp_path).fit(X, y)
        assert_close(losses_of(resumed), losses_of(whole), share_of(network, loss, assignment))
        # Both stages of the whole fit, one whole of the other, and that in two halves.
        assert n_replays() == [2 * 5 - 3] * 2 + [N_REPLAYS] * 3


class TestMoreOnGpu:
    pytestmark = on_gpu

    def test_the_control_is_captured_too(self, digits, n_replays):
        X, y, *_ = digits
        control = SoftmaxHashEncoder(epochs=4, device="cuda", random_state=0, **STEPS).fit(X, y)
        assert n_replays() == [N_REPLAYS]
        assert losses_of(control)[3] < 0.5 * losses_of(control)[0]

    def test_every_replay_draws_further_random_numbers(self):
        generator = torch.Generator("cuda").manual_seed(0)
        dropout = Dropout(0.5)
        dropout.generator = generator
        ones = torch.ones(1000, device="cuda")
        step = CapturedStep(lambda items: {"kept": dropout(ones)}, torch.device("cuda"), generator)
        items = torch.zeros(1, dtype=torch.int64, device="cuda")
        masks = {tuple(step(items)["kept"].tolist()) for _ in range(8)}
        assert len(masks) == 8

    def test_a_stage_in_two_parts_is_gone_with_its_data_once_nobody_holds_it(self, digits, monkeypatch):
        X, y, *_ = digits
        run, stages = Stage.run, []
        monkeypatch.setattr(Stage, "run", lambda stage: stages.append(weakref.ref(stage)) or run(stage))
        gc.disable()
        try:
            make(loss="npairs", device="cuda").fit(X, y)
            assert [stage() for stage in stages] == [None, None]
        finally:
            gc.enable()

    def test_a_replay_hands_over_to_the_cpu_what_its_items_make_and_goes_on_with_the_answer(self):
        device = torch.device("cuda")
        values, asked = torch.arange(4.0, device=device), []

        def negative(array):
            asked.append(array.copy())
            return -array

        def step(items):
            squares = captured.on_cpu(negative, values[items] ** 2) * 2
            return {"found": 3 * captured.on_cpu(negative, squares + 1)}

        captured = CapturedStep(step, device, torch.Generator(device))
        drawn = [[0, 1], [1, 2], [2, 3], [3, 0], [1, 3], [2, 0], [0, 3]]
        for items in drawn:
            found = captured(torch.tensor(items, device=device))["found"]
            squares = np.square(np.float32(items))
            np.testing.assert_array_equal(found.cpu(), 3 * (2 * squares - 1))
            np.testing.assert_array_equal(asked, [squares, 1 - 2 * squares])
            asked.clear()
        assert len(captured._graphs) == 3

    def test_fits_in_threads_do_not_mind_each_other(self, digits):
        X, y, *_ = digits
        losses = ("proxy", "npairs", "proxy", "triplet")
        encoders = [make(loss=loss, device="cuda", random_state=i) for i, loss in enumerate(losses)]
        alone = [losses_of(encoder.fit(X, y)) for encoder in encoders]
        fits = Parallel(n_jobs=4, prefer="threads")(delayed(e.fit)(X, y) for e in encoders)
        for encoder, losses in zip(fits, alone, strict=True):
            assert_close(losses_of(encoder), losses)
