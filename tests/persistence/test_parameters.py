import shutil
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from plain_encoder import PlainEncoder
from saved_estimators import assert_same_encoder, assert_same_index, small_encoder
from sklearn.base import BaseEstimator
from sklearn.frozen import FrozenEstimator

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex


class Trunk(torch.nn.Module):
    """A network of the user's, with tied weights and a buffer."""

    def __init__(self, n_hidden=8):
        super().__init__()
        self.first = torch.nn.Linear(64, n_hidden)
        self.again = self.first
        self.norm = torch.nn.BatchNorm1d(n_hidden)

    def forward(self, x):
        return self.norm(self.first(x))


def make_trunk(input_shape):
    return torch.nn.Sequential(torch.nn.Linear(input_shape[0], 8), torch.nn.Tanh())


def test_a_random_state_goes_on_where_it_stood(digits, tmp_path):
    for state in (np.random.RandomState(3), np.random.RandomState(np.random.PCG64(3))):
        encoder = small_encoder(random_state=state).fit(digits[0][:100], digits[1][:100])
        encoder.save(tmp_path)
        loaded = HierarchicalHashEncoder.load(tmp_path)
        assert loaded.random_state.normal() == encoder.random_state.normal()


def test_a_memory_becomes_its_location(digits, tmp_path):
    memory = joblib.Memory(str(tmp_path / "cache"), verbose=0)
    small_encoder(memory=memory).fit(digits[0][:100], digits[1][:100]).save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "cache")
    assert HierarchicalHashEncoder.load(tmp_path / "saved").memory == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_other_parameters_are_left_out_with_a_warning(items, tmp_path):
    index = HierarchicalHashIndex(PlainEncoder(note=print)).fit(items[:12])
    with pytest.warns(
        UserWarning, match=r"PlainEncoder will have note=None, the default. Expected parameter"
    ):
        index.save(tmp_path)
    assert HierarchicalHashIndex.load(tmp_path, encoder=PlainEncoder).encoder.note is None


def test_a_module_comes_back_by_class_by_build_or_by_function(digits, tmp_path):
    torch.manual_seed(0)
    encoder = small_encoder(network=Trunk()).fit(digits[0][:100], digits[1][:100])
    encoder.save(tmp_path)
    for network in (Trunk, Trunk(), lambda shape: Trunk()):
        loaded = HierarchicalHashEncoder.load(tmp_path, network=network)
        assert_same_encoder(loaded, encoder, digits[2][:9])
        assert type(loaded.network) is Trunk
        # Untrained, as the user gave it: fitting again starts from the same weights.
        assert torch.equal(loaded.network.first.weight, encoder.network.first.weight)
        assert loaded.network.again.weight is loaded.network.first.weight
    with pytest.raises(ValueError, match=r"names .*test_parameters:Trunk, .*load\(path, network=Trunk\)"):
        HierarchicalHashEncoder.load(tmp_path)


def test_a_module_that_does_not_fit_the_weights_is_refused(digits, tmp_path):
    encoder = small_encoder(network=Trunk()).fit(digits[0][:100], digits[1][:100])
    encoder.save(tmp_path)
    for network, message in (
        (Trunk(9), r"first.weight to be torch.float32 of shape \(9, 64\)"),
        (lambda shape: Trunk().double(), r"first.weight to be torch.float64"),
        (lambda shape: torch.nn.Linear(64, 8), "expects weight .* hold nothing"),
        (lambda shape: torch.nn.Identity(), "no place for the weights' again.bias"),
        (lambda: None, "can't make the module"),
        (lambda shape: 3, "return a torch.nn.Module, got int"),
    ):
        with pytest.raises(ValueError, match=rf"weights.safetensors does not fit: .*{message}"):
            HierarchicalHashEncoder.load(tmp_path, network=network)


def test_a_function_that_makes_the_trunk_has_to_be_given_too(digits, tmp_path):
    index = HierarchicalHashIndex(small_encoder(network=make_trunk)).fit(digits[0][:100], digits[1][:100])
    index.save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path, network=make_trunk)
    assert_same_index(loaded, index, digits[2][:9])
    assert loaded.encoder.network is loaded.encoder_.network is make_trunk
    with pytest.raises(ValueError, match=r"load\(path, network=make_trunk\), or .* trusted=True"):
        HierarchicalHashIndex.load(tmp_path)


def test_a_network_that_was_changed_after_fit_is_refused(digits, tmp_path):
    encoder = small_encoder(network=make_trunk).fit(digits[0][:100], digits[1][:100])
    with pytest.raises(ValueError, match="Expected network to be what the encoder was fitted with"):
        encoder.set_params(network=Trunk()).save(tmp_path)


@pytest.fixture
def trunk_module(tmp_path, monkeypatch):
    """A module of the user's that can be imported; `sys.modules` tells whether it was."""
    source = "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self): super().__init__(64, 8)\n"
    (tmp_path / "user_trunk.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield "user_trunk"
    sys.modules.pop("user_trunk", None)


def test_the_users_code_is_imported_only_when_trusted(digits, tmp_path, trunk_module):
    network = __import__(trunk_module).Net()
    encoder = small_encoder(network=network).fit(digits[0][:100], digits[1][:100])
    encoder.save(tmp_path / "saved")
    del sys.modules[trunk_module]
    with pytest.raises(ValueError, match="trusted=True"):
        HierarchicalHashEncoder.load(tmp_path / "saved")
    assert trunk_module not in sys.modules
    loaded = HierarchicalHashEncoder.load(tmp_path / "saved", trusted=True)
    assert trunk_module in sys.modules
    assert_same_encoder(loaded, encoder, digits[2][:9])


def test_code_that_cannot_be_imported_is_named_even_when_trusted(digits, tmp_path):
    class Local(Trunk):
        pass

    small_encoder(network=Local()).fit(digits[0][:100], digits[1][:100]).save(tmp_path)
    with pytest.raises(ValueError, match=r"<locals>.Local can't be imported"):
        HierarchicalHashEncoder.load(tmp_path, trusted=True)


# Encoders of the user's


def test_a_users_encoder_needs_its_class_or_itself_or_trust(plain, items, tmp_path, monkeypatch):
    plain.save(tmp_path / "saved")
    for given in (PlainEncoder, plain.encoder_, FrozenEstimator(plain.encoder_)):
        loaded = HierarchicalHashIndex.load(tmp_path / "saved", encoder=given)
        assert_same_index(loaded, plain, items[:9])
        assert type(loaded.encoder) is PlainEncoder
    monkeypatch.delitem(sys.modules, "plain_encoder")
    with pytest.raises(ValueError, match=r"names plain_encoder:Plain.*load\(path, encoder=PlainEncoder"):
        HierarchicalHashIndex.load(tmp_path / "saved")
    assert "plain_encoder" not in sys.modules
    assert_same_index(HierarchicalHashIndex.load(tmp_path / "saved", trusted=True), plain, items[:9])
    assert "plain_encoder" in sys.modules


def test_an_encoder_without_save_is_refused_before_anything_is_written(items, tmp_path):
    class Bare(BaseEstimator):
        n_levels, branching_factor, sparsity = 2, 4, 1
        embed, level_scores = PlainEncoder.embed, PlainEncoder.level_scores
        encode, fit = PlainEncoder.encode, PlainEncoder.fit

    index = HierarchicalHashIndex(Bare()).fit(items[:12])
    with pytest.raises(ValueError, match=r"save\(path\) and a classmethod load\(path\).*but Bare lacks them"):
        index.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_fails_to_save_leaves_the_old_index(plain, items, tmp_path):
    class Failing(PlainEncoder):
        def save(self, path):
            Path(path).mkdir()
            raise RuntimeError("no")

    plain.save(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="no"):
        HierarchicalHashIndex(Failing()).fit(items[:12]).save(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="no"):
        HierarchicalHashIndex(Failing()).fit(items[:12]).save(tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]
    assert len(list((tmp_path / "saved").iterdir())) == 2
    assert_same_index(HierarchicalHashIndex.load(tmp_path / "saved", encoder=PlainEncoder), plain, items[:9])


def test_a_sparsity_that_was_set_after_the_fit_waits_for_the_next_one(digits, tmp_path):
    X = digits[0]
    index = HierarchicalHashIndex(small_encoder()).fit(X, digits[1])
    for sparsity in (4, 40):
        index.set_params(sparsity=sparsity).save(tmp_path)
        loaded = HierarchicalHashIndex.load(tmp_path)
        assert (loaded.sparsity, loaded.encoder_.sparsity) == (sparsity, 1)
        assert_same_index(loaded, index, X[:50])


def test_a_given_encoder_gets_the_sparsity_of_the_index_and_stays_as_it_is(items, tmp_path):
    given = PlainEncoder().fit(items)
    index = HierarchicalHashIndex(FrozenEstimator(given), sparsity=2).fit(items)
    index.save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path, encoder=given)
    assert (given.sparsity, loaded.encoder.estimator.sparsity, loaded.encoder_.sparsity) == (1, 1, 2)
    assert_same_index(loaded, index, items[:9])


def test_a_given_encoder_of_another_tree_is_refused(plain, items, tmp_path):
    plain.save(tmp_path)
    other = PlainEncoder(branching_factor=5).fit(items)
    with pytest.raises(ValueError, match=r"expects an encoder with .*_factor': 4, .*got one with .*': 5"):
        HierarchicalHashIndex.load(tmp_path, encoder=other)
