"""Trunks: shapes, errors, and where their randomness comes from."""

import numpy as np
import pytest
import torch
from torch import nn

from hqsearch.embedding import networks
from hqsearch.embedding.networks import (
    Dropout,
    Standardize,
    build_trunk,
    n_trunk_outputs,
)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        ("auto", (7,)),
        ("mlp", (7,)),
        ("mlp", (1, 8, 8)),
        ("auto", (1, 8, 8)),
        ("conv", (3, 32, 32)),
        ("conv", (1, 1, 1)),
        ("conv", (2, 5, 28)),
        ("nin", (3, 32, 32)),
    ],
)
def test_every_trunk_gives_one_row_per_item(network, shape):
    X = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    standardize = Standardize.from_items(X, np.arange(len(X)))
    trunk = build_trunk(network, shape, generator())
    width = n_trunk_outputs(trunk, standardize, torch.from_numpy(X))
    assert trunk(standardize(torch.from_numpy(X))).shape == (4, width)


@pytest.mark.parametrize("network", ["mlp", "conv", "nin"])
def test_built_in_trunks_are_the_generators_and_leave_the_global_state(network):
    before = torch.random.get_rng_state()
    first, second = (build_trunk(network, (1, 16, 16), generator()) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a.float()).all()


@pytest.mark.parametrize("network", ["conv", "nin"])
def test_convolutions_run_channels_last(network):
    first = build_trunk(network, (3, 8, 8), generator())[0]
    output = first(torch.rand(2, 3, 8, 8))
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not output.is_contiguous()


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        ("transformer", (7,), "Expected network to be one of"),
        ("conv", (7,), "network='conv' expects X of shape"),
        ("nin", (7,), "network='nin' expects X of shape"),
        ("nin", (1, 4, 4), "at least 8 x 8"),
        (lambda shape: "no module", (7,), "to return a torch.nn.Module, got str"),
    ],
)
def test_a_trunk_that_does_not_fit_is_refused(network, shape, message):
    with pytest.raises(ValueError, match=message):
        build_trunk(network, shape, generator())


@pytest.mark.parametrize(
    ("trunk", "came"),
    [(nn.Unflatten(1, (2, 3)), r"\(2, 2, 3\)"), (nn.Flatten(0), r"\(12,\)"), (nn.LSTM(6, 2), "tuple")],
)
def test_a_module_with_the_wrong_output_is_refused_by_its_shape(trunk, came):
    X = np.ones((2, 6), dtype=np.float32)
    with pytest.raises(ValueError, match=rf"shape \(2, n_hidden\), got {came}"):
        n_trunk_outputs(trunk, Standardize.from_items(X, np.arange(len(X))), torch.from_numpy(X))


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5)])
@pytest.mark.parametrize("values_per_block", [1, 200, 10**9])
def test_statistics_are_of_the_given_rows_however_many_come_at_once(shape, values_per_block, monkeypatch):
    monkeypatch.setattr(networks, "_VALUES_PER_BLOCK", values_per_block)
    rng = np.random.default_rng(0)
    X = rng.normal(3, 2, (60, *shape))
    # Without the first one. A mean of 0.1 is rounded, so a constant's deviation is not exactly zero.
    rows = 1 + rng.permutation(59)[:41]
    # Constant among the rows alone, but for a last one in the second column.
    X[rows, 0] = 0.1
    X[rows[:-1], 1] = 0.1
    found = Standardize.from_items(X, rows)
    axes = (0,) if len(shape) == 1 else (0, 2, 3)
    deviation = X[rows].std(axes, dtype=np.float64)
    deviation[0] = 1
    np.testing.assert_allclose(found.mean.numpy().ravel(), X[rows].mean(axes, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.scale.numpy().ravel(), deviation, rtol=1e-12)


def test_a_users_module_is_copied():
    module = nn.Linear(7, 3)
    trunk = build_trunk(module, (7,), generator())
    with torch.no_grad():
        trunk.weight.zero_()
    assert module.weight.abs().sum() > 0


def test_standardizing_copes_with_offsets_constants_and_bytes():
    rng = np.random.default_rng(0)
    X = np.c_[1e9 + rng.normal(size=500), 1e-9 * rng.normal(size=500), np.full(500, 0.1), np.full(500, 1e20)]
    found = Standardize.from_items(X, np.arange(len(X)))(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(found[:, :2].mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(found[:, :2].std(0), 1, atol=1e-3)
    np.testing.assert_allclose(found[:, 2], 0, atol=1e-6)
    assert np.isfinite(found).all()
    images = rng.integers(0, 256, (20, 3, 4, 4), dtype=np.uint8)
    found = Standardize.from_items(images, np.arange(20))(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(found.std((0, 2, 3)), 1, atol=1e-5)


def test_dropout_zeroes_its_share_from_its_own_generator_and_only_in_training():
    dropout, x = Dropout(0.25), torch.ones(100, 100)
    before = torch.random.get_rng_state()
    dropout.generator = generator()
    dropped = dropout(x)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(dropout.eval()(x), x)
