"""Which precision is chosen where, and what it touches: the products of training, nothing else."""

import numpy as np
import pytest
import torch
from torch import nn

from hqsearch import HierarchicalHashEncoder
from hqsearch.baselines import SoftmaxHashEncoder
from hqsearch.embedding import automatic
from hqsearch.embedding.automatic import (
    multiplies_bfloat16,
    resolve_epochs,
    resolve_learning_rate,
    resolve_precision,
)
from hqsearch.embedding.stage import Stage

CPU = torch.device("cpu")
IMAGE, VECTOR = (1, 8, 8), (64,)


@pytest.mark.parametrize(
    ("asked", "network", "shape", "instructions", "expected"),
    [
        ("auto", "auto", IMAGE, True, "bfloat16"),
        ("auto", "conv", IMAGE, True, "bfloat16"),
        ("auto", "nin", IMAGE, True, "bfloat16"),
        ("auto", "auto", IMAGE, False, "float32"),
        ("auto", "auto", VECTOR, True, "float32"),
        ("auto", "mlp", IMAGE, True, "float32"),
        ("auto", nn.Flatten(), IMAGE, True, "float32"),
        ("auto", lambda shape: nn.Flatten(), IMAGE, True, "float32"),
        ("bfloat16", "mlp", VECTOR, False, "bfloat16"),
        ("float32", "conv", IMAGE, True, "float32"),
    ],
)
def test_auto_is_bfloat16_for_our_convolutions_where_it_is_fast(
    monkeypatch, asked, network, shape, instructions, expected
):
    monkeypatch.setattr(automatic, "multiplies_bfloat16", lambda device: instructions)
    assert resolve_precision(asked, network, shape, CPU) == expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True, "avx512_fp16": True}, False),
        ({"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True}, True),
        ({}, False),
    ],
)
def test_the_instructions_of_a_cpu_decide(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bfloat16(CPU) is expected


def test_a_torch_that_cannot_tell_counts_as_no(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_bfloat16(CPU)


def test_the_generation_of_a_gpu_decides(monkeypatch):
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert multiplies_bfloat16(torch.device("cuda")) is expected


class Watched(nn.Linear):
    """A trunk that notes what its output is made of, and whether it is trained."""

    seen: list  # shared by all copies

    def forward(self, x):
        out = super().forward(x)
        self.seen.append((self.training, out.dtype))
        return out


@pytest.mark.parametrize("make", [HierarchicalHashEncoder, SoftmaxHashEncoder])
@pytest.mark.parametrize(("asked", "trained"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_products_of_training_alone_have_the_precision(blobs, make, asked, trained):
    X, y = blobs
    Watched.seen = []
    epochs = {"epochs": 2} if make is SoftmaxHashEncoder else {"metric_epochs": 1, "hash_epochs": 1}
    trunk = Watched(X.shape[1], 16)
    encoder = make(network=trunk, precision=asked, random_state=0, **epochs).fit(X, y)
    assert {dtype for training, dtype in Watched.seen if training} == {trained}
    # Validated in it too.
    assert trained in {dtype for training, dtype in Watched.seen if not training}
    Watched.seen.clear()
    embedding, scores, _ = encoder.describe(X)
    assert {dtype for _, dtype in Watched.seen} == {torch.float32}
    assert embedding.dtype == scores.dtype == np.float32
    network = encoder._model.classifier_network if make is SoftmaxHashEncoder else encoder._model.hash_network
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_bfloat16_learns_images(digits):
    X, y, X_query, y_query = digits
    images, queries = X.reshape(-1, 1, 8, 8), X_query.reshape(-1, 1, 8, 8)
    encoder = HierarchicalHashEncoder(precision="bfloat16", metric_epochs=6, hash_epochs=6, random_state=0)
    again = HierarchicalHashEncoder(precision="bfloat16", metric_epochs=6, hash_epochs=6, random_state=0)
    encoder.fit(images, y)
    assert encoder.score(queries, y_query) > 0.85
    assert (again.fit(images, y).encode(queries) == encoder.encode(queries)).all()


def test_an_unknown_precision_is_refused(blobs):
    with pytest.raises(ValueError, match="precision"):
        HierarchicalHashEncoder(precision="half").fit(*blobs)


@pytest.mark.parametrize(
    ("asked", "network", "expected"),
    [
        ("auto", "auto", 3e-3),
        ("auto", "mlp", 3e-3),
        ("auto", "conv", 3e-3),
        ("auto", "nin", 1e-3),
        ("auto", nn.Flatten(), 1e-3),
        (0.5, "conv", 0.5),
    ],
)
def test_auto_is_a_lower_rate_for_nin_and_a_users_network(asked, network, expected):
    assert resolve_learning_rate(asked, network) == expected


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [3e-3, 3e-3]),
        ({"learning_rate": 0.2, "hash_learning_rate": 0.1}, [0.2, 0.1]),
        ({"network": nn.Linear(64, 8)}, [1e-3, 1e-3]),
    ],
)
def test_both_stages_get_their_rate(monkeypatch, digits, parameters, expected):
    rates = []
    monkeypatch.setattr(Stage, "run", lambda stage: rates.append(stage.settings.learning_rate) or [])
    monkeypatch.setattr(Stage, "interrupted", False, raising=False)
    HierarchicalHashEncoder(metric_epochs=0, hash_epochs=0, **parameters).fit(digits[0], digits[1])
    assert rates == expected
    rates.clear()
    control = {name: value for name, value in parameters.items() if name != "hash_learning_rate"}
    SoftmaxHashEncoder(epochs=0, **control).fit(digits[0], digits[1])
    assert rates == expected[:1]


@pytest.mark.parametrize(
    ("asked", "n_items", "items_per_step", "expected"),
    [
        ("auto", 12_800, 128, [10, 20, 30]),  # 100 steps each
        ("auto", 25_600, 256, [10, 20, 30]),
        ("auto", 5_120, 128, [10, 20, 30]),  # 40
        ("auto", 25_600, 128, [6, 12, 18]),  # 200
        ("auto", 2_560, 128, [20, 30, 50]),  # 20
        ("auto", 500, 128, [30, 30, 60]),
        ("auto", 44_800, 128, [6, 8, 14]),  # 350
        ("auto", 1_000_000, 128, [6, 8, 14]),
        (7, 25_600, 128, [7, 7, 7]),
        (0, 500, 128, [0, 0, 0]),
    ],
)
def test_auto_epochs_are_more_for_few_items_and_fewer_for_many(asked, n_items, items_per_step, expected):
    stages = ("metric", "hash", "single")
    assert [resolve_epochs(asked, stage, n_items, items_per_step) for stage in stages] == expected


def test_stages_and_control_train_for_the_epochs_of_the_items_that_are_not_held_out(monkeypatch):
    monkeypatch.setattr(automatic, "_EPOCHS", {"metric": 0.75, "hash": 1.25})
    rng = np.random.default_rng(0)
    y = np.arange(480) % 4
    X = rng.normal(size=(480, 3)) + y[:, None]
    # Of 240 items a step takes a fifth, an eighth of 40 steps: 0.75 epochs become six, and 1.25 ten.
    asked = {"batch_size": 48, "random_state": 0, "validation_fraction": 0.5}
    for given, expected in (
        ({}, ["metric"] * 6 + ["hash"] * 10),
        ({"hash_trunk": "new"}, ["metric"] * 6 + ["hash"] * 16),
        ({"hash_epochs": 1}, ["metric"] * 6 + ["hash"]),
    ):
        encoder = HierarchicalHashEncoder(**asked, **given).fit(X, y)
        assert [record["stage"] for record in encoder.history_] == expected
    assert len(SoftmaxHashEncoder(**asked).fit(X, y).history_) == 16
    # A step has two items of each class at least: 30 steps of a batch of 4 as of one of 8.
    monkeypatch.setattr(automatic, "_EPOCHS", {"metric": 6, "hash": 9})
    few = {**asked, "batch_size": 4}
    assert len(HierarchicalHashEncoder(**few).fit(X, y).history_) == 8 + 12
    assert len(SoftmaxHashEncoder(**few).fit(X, y).history_) == 8 + 12
