"""Checkpoints: whenever a fit is killed, the next one ends with the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import hqsearch
from hqsearch import HierarchicalHashEncoder, fitting
from hqsearch.embedding import checkpoints
from hqsearch.embedding.stage import Stage
from hqsearch.embedding.training import HashStage, MetricStage

# Fits digits, and says where it stands after each epoch; every epoch is written.
SCRIPT = """
import sys
import numpy as np
from sklearn.datasets import load_digits
from hqsearch import HierarchicalHashEncoder
from hqsearch.embedding import checkpoints

folder, result = sys.argv[1:]
checkpoints.SHARE_OF_TIME = 1.0
X, y = load_digits(return_X_y=True)
encoder = HierarchicalHashEncoder(
    metric_epochs=10, hash_epochs=10, hash_trunk="new", checkpoint_dir=folder or None, device="cpu",
    random_state=0, verbose=1
).fit(X[:600], y[:600])
calibration = [*encoder.score_gap_, *encoder.distance_ratio_, encoder.epsilon_]
np.savez(
    result, embedding=encoder.embed(X), level_scores=encoder.level_scores(X), calibration=calibration,
    class_means=encoder.class_means_
)
"""


class Killed(Exception):
    """Stands for a kill that leaves the process alive."""


class NoisyTrunk(nn.Module):
    """A user's own: draws from torch's global state, counts in a buffer that its state_dict leaves out."""

    def __init__(self, n_features):
        super().__init__()
        self.linear = nn.Linear(n_features, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("n_passes", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.n_passes += 1
        return self.drop(self.norm(self.linear(x))) * (1 + 0.01 * self.n_passes)


def noisy_trunk(shape):
    return NoisyTrunk(shape[0])


def make(**parameters):
    return HierarchicalHashEncoder(
        **{"metric_epochs": 4, "hash_epochs": 4, "branching_factor": 8, "random_state": 0} | parameters
    )


@pytest.fixture(autouse=True)
def _every_epoch_is_written(monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", 1.0)


def without_seconds(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def assert_same_model(first, second, X):
    np.testing.assert_array_equal(first.embed(X), second.embed(X))
    np.testing.assert_array_equal(first.level_scores(X), second.level_scores(X))
    # What searches go by.
    for name in ("score_gap_", "distance_ratio_", "class_means_", "epsilon_"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    assert without_seconds(first.history_) == without_seconds(second.history_)


def kill_in_epoch(patch, epoch):
    """Have the epoch of that number, over both stages, die in its second step."""
    train_step = Stage._train_step
    seen = []

    def dying(stage, items):
        if (stage, len(stage.history)) not in seen:
            seen.append((stage, len(stage.history)))
        elif len(seen) == epoch:
            raise Killed
        return train_step(stage, items)

    patch.setattr(Stage, "_train_step", dying)


def fit_in_pieces(encoder, X, y, monkeypatch, epochs_each=2):
    """Fit anew after each kill until it is through; return how often that was."""
    for n_kills in range(20):
        with monkeypatch.context() as patch:
            kill_in_epoch(patch, epochs_each)
            try:
                encoder.fit(X, y)
            except Killed:
                continue
            return n_kills
    raise AssertionError("no progress")


@pytest.fixture
def digits_of_three_classes():
    X, y = load_digits(n_class=3, return_X_y=True)
    return X[:300], y[:300]


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    y = np.arange(48) % 4
    X = rng.integers(0, 128, (48, 1, 8, 8)) + 30 * y[:, None, None, None]
    return X.astype(np.uint8), y


def run_script(folder, result):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-u", "-c", SCRIPT, str(folder), str(result)],
        env=environment,
        cwd=Path(hqsearch.__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_a_fit_killed_at_random_moments_of_both_stages_ends_with_the_uninterrupted_bits(tmp_path):
    whole = run_script("", tmp_path / "whole.npz")
    assert len(whole.communicate()[0].splitlines()) == 20
    assert whole.returncode == 0
    moments = random.Random(0)
    killed_in = []
    for _ in range(30):
        process = run_script(tmp_path / "checkpoints", tmp_path / "pieces.npz")
        wanted = moments.randint(3, 6)
        seen = []
        for line in process.stdout:
            seen.append(line.split()[0])
            if len(seen) == wanted:
                # Anywhere in the next epochs, also while one is written.
                time.sleep(moments.uniform(0, 0.1))
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        killed_in.append(seen[-1])
    assert process.returncode == 0
    assert set(killed_in) == {"metric", "hash"}
    with np.load(tmp_path / "whole.npz") as expected, np.load(tmp_path / "pieces.npz") as found:
        assert set(expected) == {"embedding", "level_scores", "calibration", "class_means"}
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("patience", [None, 1])
@pytest.mark.parametrize("trunk", ["metric", "new", "shared", "frozen"])
@pytest.mark.parametrize("loss", ["npairs", "triplet", "proxy"])
def test_a_fit_in_pieces_equals_a_whole_one(blobs, tmp_path, monkeypatch, loss, trunk, patience):
    X, y = blobs
    X = X + np.random.default_rng(0).normal(scale=4, size=X.shape)
    settings = {"loss": loss, "patience": patience, "sparsity": 2, "class_groups_per_step": 2}
    shared = {"shared": {"shared_trunk": True}, "frozen": {"shared_trunk": "frozen"}}
    settings |= {"batch_size": 32} | shared.get(trunk, {"hash_trunk": trunk})
    pieces = make(**settings, checkpoint_dir=tmp_path / "new" / "folder")
    assert fit_in_pieces(pieces, X, y, monkeypatch) >= 2
    assert_same_model(make(**settings).fit(X, y), pieces, X)


def test_a_kill_after_both_stages_trains_no_further(digits_of_three_classes, tmp_path, monkeypatch):
    X, y = digits_of_three_classes
    encoder = make(checkpoint_dir=tmp_path)

    def dying(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "_calibrate", dying)
        with pytest.raises(Killed):
            encoder.fit(X, y)
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_train_step", dying)
        encoder.fit(X, y)
    whole = make().fit(X, y)
    assert whole.class_means_ is not None
    assert_same_model(whole, encoder, X)


def worse_every_time(stage):
    return {"criterion": -float(len(stage.history)), "standard_error": 0.0}


def test_validations_without_gain_count_on_over_a_kill(blobs, tmp_path, monkeypatch):
    # Worse with every epoch: the first one is best, and three more are granted.
    monkeypatch.setattr(MetricStage, "_validate", worse_every_time)
    encoder = make(metric_epochs=8, hash_epochs=0, patience=3, batch_size=32, checkpoint_dir=tmp_path)
    assert fit_in_pieces(encoder, *blobs, monkeypatch) >= 2
    assert [record["epoch"] for record in encoder.history_] == [1, 2, 3, 4]


def test_a_kill_between_early_stopping_and_the_last_write_trains_no_further(blobs, tmp_path, monkeypatch):
    monkeypatch.setattr(MetricStage, "_validate", worse_every_time)
    encoder = make(metric_epochs=8, hash_epochs=0, patience=3, batch_size=32, checkpoint_dir=tmp_path)

    def dying(stage):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_finished_state", dying)
        with pytest.raises(Killed):
            encoder.fit(*blobs)
    assert len(encoder.fit(*blobs).history_) == 4


def test_what_auto_stands_for_is_compared_not_the_word(blobs, tmp_path, monkeypatch):
    X, y = blobs
    automatic = make(metric_epochs="auto", hash_epochs="auto", checkpoint_dir=tmp_path).fit(X, y)
    numbers = {
        "learning_rate": 3e-3,
        "precision": "float32",
        "metric_epochs": 30,
        "hash_epochs": 30,
        "hash_trunk": "metric",
    }
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_run_epoch", None)  # nothing is trained again
        assert_same_model(automatic, make(**numbers, checkpoint_dir=tmp_path).fit(X, y), X)
    # Another machine, another precision: another fit.
    monkeypatch.setattr("hqsearch.fitting.resolve_precision", lambda *_: "bfloat16")
    with pytest.raises(ValueError, match="precision"):
        make(**numbers, checkpoint_dir=tmp_path).fit(X, y)


def test_network_in_network_goes_on_with_the_dropout_it_would_have_had(images, tmp_path, monkeypatch):
    X, y = images
    settings = {"network": "nin", "batch_size": 16, "metric_epochs": 3, "hash_epochs": 3}
    pieces = make(**settings, checkpoint_dir=str(tmp_path))
    assert fit_in_pieces(pieces, X, y, monkeypatch) >= 2
    assert_same_model(make(**settings).fit(X, y), pieces, X)


def test_a_users_network_goes_on_with_its_global_randomness_and_all_its_buffers(blobs, tmp_path, monkeypatch):
    X, y = blobs
    pieces = make(network=noisy_trunk, checkpoint_dir=tmp_path)
    before = torch.random.get_rng_state()
    assert fit_in_pieces(pieces, X, y, monkeypatch) >= 2
    assert torch.equal(torch.random.get_rng_state(), before)
    whole = make(network=noisy_trunk).fit(X, y)
    assert_same_model(whole, pieces, X)
    # The deepcopied trunk of the hash stage counts on from the metric stage's last pass.
    assert pieces._model.hash_network.trunk.n_passes == whole._model.hash_network.trunk.n_passes


def test_a_finished_fit_returns_at_once_with_the_same_model(blobs, tmp_path, monkeypatch):
    X, y = blobs
    first = make(checkpoint_dir=tmp_path).fit(X, y)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hash.safetensors", "metric.safetensors"]
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    monkeypatch.setattr(Stage, "_run_epoch", None)
    second = make(checkpoint_dir=tmp_path, n_jobs=2).fit(X, y)
    assert_same_model(first, second, X)
    assert first.history_ == second.history_
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == written


def test_checkpoints_change_nothing_of_what_is_trained(blobs, tmp_path):
    X, y = blobs
    assert_same_model(make().fit(X, y), make(checkpoint_dir=tmp_path).fit(X, y), X)


@pytest.mark.parametrize("kept", ["metric", "hash"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": 1}, "differs in X"),
        ({"y": 1}, "differs in y"),
        ({"random_state": 1}, "differs in network, random_state"),
        ({"hash_epochs": 5}, "differs in hash_epochs"),
        ({"network": noisy_trunk}, "differs in hash_learning_rate, learning_rate, network"),
        ({"sparsity": 2, "loss": "triplet"}, "differs in hidden_weight, loss, sparsity"),
    ],
)
def test_another_fit_in_the_same_folder_is_refused_and_told_what_differs(
    blobs, tmp_path, kept, change, message
):
    X, y = blobs
    make(metric_epochs=1, hash_epochs=1, checkpoint_dir=tmp_path).fit(X, y)
    for path in tmp_path.iterdir():
        if path.stem != kept:
            path.unlink()
    parameters = {"metric_epochs": 1, "hash_epochs": 1, **change}
    X = X + parameters.pop("X", 0)
    y = np.roll(y, parameters.pop("y", 0))
    with pytest.raises(ValueError, match=rf"{kept}.safetensors is of one that {message}\. Choose another"):
        make(**parameters, checkpoint_dir=tmp_path).fit(X, y)


def test_a_checkpoint_that_cannot_be_written_raises_and_leaves_the_old_one(blobs, tmp_path, monkeypatch):
    encoder = make(checkpoint_dir=tmp_path)
    with monkeypatch.context() as patch:
        kill_in_epoch(patch, 2)
        with pytest.raises(Killed):
            encoder.fit(*blobs)
    old = (tmp_path / "metric.safetensors").read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hqsearch.durable_files.flush_file", full)
        with pytest.raises(OSError, match="No space left"):
            encoder.fit(*blobs)
    assert [path.name for path in tmp_path.iterdir()] == ["metric.safetensors"]
    assert (tmp_path / "metric.safetensors").read_bytes() == old
    encoder.fit(*blobs)


@pytest.mark.parametrize("stage", [MetricStage, HashStage])
def test_after_ctrl_c_the_fit_is_usable_and_the_next_one_goes_on(blobs, tmp_path, monkeypatch, stage):
    X, y = blobs
    encoder = make(checkpoint_dir=tmp_path)
    run_epoch = stage._run_epoch

    def interrupted(self):
        if len(self.history) == 2:
            raise KeyboardInterrupt
        return run_epoch(self)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_run_epoch", interrupted)
        with pytest.warns(UserWarning, match=f"{stage.name} stage was interrupted after 2 epochs"):
            encoder.fit(X, y)
    assert np.isfinite(encoder.level_scores(X)).all()
    assert fit_in_pieces(encoder, X, y, monkeypatch, epochs_each=10) == 0
    assert_same_model(make().fit(X, y), encoder, X)


def test_the_cache_of_metric_stages_does_not_ask_for_the_folder(blobs, tmp_path, monkeypatch):
    X, y = blobs
    memory = joblib.Memory(tmp_path / "cache", verbose=0)
    first = make(memory=memory, checkpoint_dir=tmp_path / "first").fit(X, y)
    monkeypatch.setattr(MetricStage, "_run_epoch", None)
    second = make(memory=memory, checkpoint_dir=tmp_path / "second").fit(X, y)
    assert_same_model(first, second, X)
    assert_same_model(first, make(memory=memory).fit(X, y), X)
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["hash.safetensors"]


def test_a_stage_that_learns_more_than_its_network_adds_it_in_one_place(blobs, tmp_path, monkeypatch):
    import hqsearch.embedding.model as model

    class Averaging(HashStage):
        def _initialize(self):
            super()._initialize()
            self.average = torch.zeros(2)

        def _train_step(self, items):
            step = super()._train_step(items)
            self.average = 0.9 * self.average + step["loss"]
            return step

        def _validate(self):
            return super()._validate() | {"average": self.average[0].item()}

        def _state_to_save(self):
            state = super()._state_to_save()
            state.add("average", {"value": self.average})
            return state

        def _load_state(self, state):
            super()._load_state(state)
            self.average = state.group("average")["value"]

    monkeypatch.setattr(model, "HashStage", Averaging)
    X, y = blobs
    pieces = make(loss="npairs", checkpoint_dir=tmp_path)
    assert fit_in_pieces(pieces, X, y, monkeypatch) >= 2
    whole = make(loss="npairs").fit(X, y)
    assert_same_model(whole, pieces, X)
    assert whole.history_[-1]["average"] > 0


def test_short_epochs_are_not_each_written(blobs, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", 1e-9)
    written = []
    replace_file = checkpoints.replace_file
    monkeypatch.setattr(
        checkpoints, "replace_file", lambda path, data: written.append(path.stem) or replace_file(path, data)
    )
    make(checkpoint_dir=tmp_path).fit(*blobs)
    # The first epoch of each stage, and its end.
    assert written == ["metric", "metric", "hash", "hash"]


def test_a_saved_encoder_keeps_the_folders_path(blobs, tmp_path):
    encoder = make(metric_epochs=1, hash_epochs=1, checkpoint_dir=tmp_path / "checkpoints").fit(*blobs)
    encoder.save(tmp_path / "saved")
    loaded = HierarchicalHashEncoder.load(tmp_path / "saved")
    assert loaded.checkpoint_dir == str(tmp_path / "checkpoints")
