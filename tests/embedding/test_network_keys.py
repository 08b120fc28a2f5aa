"""What tells a user's networks apart: a cache or checkpoint of one must not serve for another."""

import functools
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from hqsearch import HierarchicalHashEncoder
from hqsearch.embedding.network_keys import behaviour, network_key

FUNCTION = """
from torch import nn

WIDTH = 4

def layers(width, *, bias=True):
    return [nn.Linear(width, width, bias=bias) for _ in range(2)]

def build(shape, last=nn.ReLU):
    return nn.Sequential(nn.Linear(shape[0], WIDTH), *layers(WIDTH), nn.ReLU())
"""

CLASS = """
import torch
from torch import nn

class Base(nn.Module):
    slope = 0.5

    def bend(self, x):
        return torch.relu(x)

class Build(Base):
    def __init__(self, size=4):
        super().__init__()
        self.layer = nn.Linear(5, size)
        self.power = 1.0
        self.steps = {"halves": [0.5, 0.25]}

    def forward(self, x):
        return self.bend(self.layer(x)) ** self.power
"""


def make(source, name="a_users_module"):
    """Make what a user's module of this source calls `build` or `Build`."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, "users.py", "exec"), module.__dict__)
    return module


@pytest.fixture(autouse=True)
def _no_module_is_left():
    yield
    sys.modules.pop("a_users_module", None)


def build_class(source):
    torch.manual_seed(0)
    return make(source).Build()


def test_the_same_source_gives_the_same_key():
    first, again = network_key(make(FUNCTION).build), network_key(make("\n# Moved.\n" + FUNCTION).build)
    assert first == again
    assert first is not None
    assert behaviour(build_class(CLASS)) == behaviour(build_class("\n\n" + CLASS))
    assert network_key(build_class(CLASS)) is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("WIDTH = 4", "WIDTH = 5"),
        ("nn.ReLU()", "nn.Tanh()"),
        ("last=nn.ReLU", "last=nn.Tanh"),
        ("bias=True", "bias=False"),
        ("range(2)", "range(3)"),
        ("nn.Linear(width, width, bias=bias)", "nn.Linear(width, width)"),
    ],
)
def test_a_function_that_was_changed_or_refers_to_what_was_has_another_key(old, new):
    assert old in FUNCTION
    assert network_key(make(FUNCTION).build) != network_key(make(FUNCTION.replace(old, new)).build)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("** self.power", "* self.power"),
        ("self.power = 1.0", "self.power = 2.0"),
        ("[0.5, 0.25]", "[0.5, 0.125]"),
        ("slope = 0.5", "slope = 0.25"),
        ("torch.relu(x)", "torch.tanh(x)"),
    ],
)
def test_a_module_of_changed_code_or_values_is_another_one_at_the_same_weights(old, new):
    assert old in CLASS
    one, other = build_class(CLASS), build_class(CLASS.replace(old, new))
    np.testing.assert_array_equal(one.layer.weight.detach(), other.layer.weight.detach())
    assert behaviour(one) != behaviour(other)
    assert network_key(one)[:2] == network_key(other)[:2]
    assert network_key(one)[3] != network_key(other)[3]


def double(module, inputs, output):
    return 2 * output


def test_hooks_count_and_how_many_were_ever_made_does_not():
    plain, hooked, again = (nn.Linear(5, 4) for _ in range(3))
    hooked.register_forward_hook(double)
    again.register_forward_hook(double)
    assert behaviour(hooked) == behaviour(again)
    assert behaviour(hooked) != behaviour(plain)


def test_equal_values_of_every_kind_are_the_same_whoever_shares_them():
    def with_values(shared):
        module = nn.Linear(5, 4)
        pair = [1, 2.5]
        module.parts = (
            pair,
            pair if shared else [1, 2.5],
            {"a", "b"},
            np.arange(3),
            np.array([[1, 2], None], dtype=object),
            torch.ones(2).bfloat16(),
        )
        module.dtype, module.act = torch.float16, torch.tanh
        module.partly = functools.partial(double, None)
        module.itself = [module]
        module.late = late_binding()
        return module

    assert behaviour(with_values(shared=True)) == behaviour(with_values(shared=False))
    for name, value in {"parts": (), "dtype": torch.float32, "act": torch.sin, "partly": double}.items():
        changed = with_values(shared=True)
        setattr(changed, name, value)
        assert behaviour(changed) != behaviour(with_values(shared=True)), name


def late_binding():
    def inner():
        return value

    # Never bound: the cell of `inner` is empty.
    if False:
        value = 1
    return inner


class Opaque:
    __slots__ = ("value",)


def test_what_cannot_be_described_has_no_key():
    module = nn.Linear(5, 4)
    module.opaque = Opaque()
    assert network_key(module) is None
    assert network_key(lambda shape: nn.Linear(shape[0], 4)) is None
    assert network_key("mlp") == "mlp"


def test_a_cached_stage_of_a_function_before_it_was_changed_does_not_serve(blobs, tmp_path):
    parameters = {"metric_epochs": 1, "hash_epochs": 1, "branching_factor": 8, "random_state": 0}
    fits = []
    for source in (FUNCTION, FUNCTION.replace("nn.ReLU()", "nn.Tanh()"), FUNCTION):
        encoder = HierarchicalHashEncoder(network=make(source).build, memory=str(tmp_path), **parameters)
        fits.append(encoder.fit(*blobs))
    assert len(list(tmp_path.rglob("train_first_stage/*/output.pkl"))) == 2
    np.testing.assert_array_equal(fits[0].embed(blobs[0]), fits[2].embed(blobs[0]))
    fresh = HierarchicalHashEncoder(
        network=make(FUNCTION.replace("nn.ReLU()", "nn.Tanh()")).build, **parameters
    )
    np.testing.assert_array_equal(fits[1].embed(blobs[0]), fresh.fit(*blobs).embed(blobs[0]))


def test_a_checkpoint_of_a_module_of_other_values_is_refused(blobs, tmp_path):
    parameters = {"metric_epochs": 1, "hash_epochs": 1, "branching_factor": 8, "random_state": 0}
    first = HierarchicalHashEncoder(network=build_class(CLASS), checkpoint_dir=tmp_path, **parameters)
    first.fit(*blobs)
    same = HierarchicalHashEncoder(network=build_class(CLASS), checkpoint_dir=tmp_path, **parameters)
    np.testing.assert_array_equal(same.fit(*blobs).embed(blobs[0]), first.embed(blobs[0]))
    other = build_class(CLASS.replace("self.power = 1.0", "self.power = 3.0"))
    with pytest.raises(ValueError, match="network"):
        HierarchicalHashEncoder(network=other, checkpoint_dir=tmp_path, **parameters).fit(*blobs)
