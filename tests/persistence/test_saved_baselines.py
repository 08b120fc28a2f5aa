"""Baselines, and indexes over them, in saved folders: with whatever encoder they hold."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_estimators import assert_every_damage_is_refused, files_of
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.baselines import (
    RandomHyperplaneHashEncoder,
    SoftmaxHashEncoder,
    ThresholdHashEncoder,
    VectorQuantizationHashEncoder,
)


class Plain(BaseEstimator):
    """An encoder of the user's: embeds items as some of their features."""

    def __init__(self, n_features=8):
        self.n_features = n_features

    def fit(self, X, y=None):
        self.start_ = 20
        return self

    def embed(self, X):
        return np.asarray(X, dtype=np.float32)[:, self.start_ : self.start_ + self.n_features]

    def save(self, path):
        Path(path).write_text(json.dumps([self.n_features, self.start_]))

    @classmethod
    def load(cls, path):
        n_features, start = json.loads(Path(path).read_text())
        encoder = cls(n_features)
        encoder.start_ = start
        return encoder


class Trunk(torch.nn.Linear):
    """A network of the user's."""

    def __init__(self):
        super().__init__(64, 8)


def make_trunk(input_shape):
    return torch.nn.Sequential(torch.nn.Linear(input_shape[0], 8), torch.nn.Tanh())


def small_encoder(**parameters):
    small = {"metric_epochs": 1, "hash_epochs": 0, "embedding_dim": 8, "random_state": 0}
    return HierarchicalHashEncoder(**(small | parameters))


BASELINES = {
    "threshold": ThresholdHashEncoder(small_encoder(), sparsity=2),
    "vector quantization": VectorQuantizationHashEncoder(small_encoder(), n_buckets=12, random_state=0),
    "random hyperplanes": RandomHyperplaneHashEncoder(small_encoder(), n_bits=5, sparsity=3, random_state=0),
    "softmax": SoftmaxHashEncoder(epochs=1, random_state=0),
    "softmax over an encoder": SoftmaxHashEncoder(small_encoder(), epochs=1, sparsity=2, random_state=0),
    "a baseline in a baseline": ThresholdHashEncoder(VectorQuantizationHashEncoder(small_encoder())),
}


@pytest.fixture(scope="module")
def train(digits):
    return digits[0][:200], digits[1][:200]


@pytest.fixture(scope="module", params=BASELINES.values(), ids=BASELINES)
def baseline(request, train):
    return clone(request.param).fit(*train)


def assert_same_baseline(loaded, baseline, X):
    check_is_fitted(loaded)
    assert type(loaded) is type(baseline)
    for method in ("embed", "level_scores", "encode"):
        ours, theirs = getattr(loaded, method)(X), getattr(baseline, method)(X)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(loaded.describe(X), baseline.describe(X), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (loaded.transform(X) != baseline.transform(X)).nnz == 0
    assert (loaded.n_levels, loaded.branching_factor) == (baseline.n_levels, baseline.branching_factor)
    assert vars(loaded).keys() == vars(baseline).keys()


def assert_same_index(loaded, index, X):
    for queries in (X, None):
        ours, theirs = loaded.kneighbors(queries, n_probes=9), index.kneighbors(queries, n_probes=9)
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


def parameters_of(estimator):
    """Parameters without the estimators among them: these are compared by their own."""
    return {k: v for k, v in estimator.get_params().items() if not isinstance(v, BaseEstimator)}


# What comes back


@pytest.mark.parametrize("mmap_mode", [None, "r"])
def test_a_loaded_baseline_gives_the_same_bits(baseline, digits, tmp_path, mmap_mode, monkeypatch):
    monkeypatch.setattr("hqsearch.persistence.files._MAPPED_FROM", 1)
    baseline.save(tmp_path / "saved")
    loaded = type(baseline).load(tmp_path / "saved", mmap_mode)
    assert_same_baseline(loaded, baseline, digits[2])
    assert parameters_of(loaded) == parameters_of(baseline)
    assert type(loaded.encoder) is type(baseline.encoder)
    assert type(loaded.encoder_) is type(baseline.encoder_)
    assert getattr(loaded, "history_", None) == getattr(baseline, "history_", None)


@pytest.mark.parametrize("mmap_mode", [None, "r"])
def test_a_loaded_index_over_a_baseline_gives_the_same_bits(
    baseline, train, digits, tmp_path, mmap_mode, monkeypatch
):
    monkeypatch.setattr("hqsearch.persistence.files._MAPPED_FROM", 1)
    index = HierarchicalHashIndex(FrozenEstimator(baseline), sparsity=2, n_neighbors=3).fit(*train)
    index.save(tmp_path / "saved")
    loaded = HierarchicalHashIndex.load(tmp_path / "saved", mmap_mode)
    assert_same_index(loaded, index, digits[2])
    assert_same_baseline(loaded.encoder_, index.encoder_, digits[2][:9])
    assert_same_baseline(loaded.encoder.estimator, baseline, digits[2][:9])


def test_an_unfitted_baseline_of_an_index_comes_back_with_its_encoder_unfitted(train, digits, tmp_path):
    index = HierarchicalHashIndex(BASELINES["vector quantization"]).fit(*train)
    index.save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path)
    assert parameters_of(loaded) == parameters_of(index)
    for estimator in (loaded.encoder, loaded.encoder.encoder):
        with pytest.raises(NotFittedError):
            check_is_fitted(estimator)
    assert_same_index(clone(loaded).fit(*train), index, digits[2][:9])


def test_a_default_encoder_comes_back_fitted_though_the_parameter_is_none(train, digits, tmp_path):
    # What encoder=None leaves behind, without waiting for the epochs of the default encoder.
    baseline = ThresholdHashEncoder(small_encoder()).fit(*train)
    baseline.encoder = None
    baseline.save(tmp_path)
    loaded = ThresholdHashEncoder.load(tmp_path)
    assert loaded.encoder is None
    assert_same_baseline(loaded, baseline, digits[2])


@pytest.mark.parametrize("in_index", [False, True])
def test_a_frozen_encoder_comes_back_frozen_and_shares_what_was_learned(train, digits, tmp_path, in_index):
    encoder = small_encoder().fit(*train)
    baseline = RandomHyperplaneHashEncoder(FrozenEstimator(encoder), n_bits=4, random_state=0)
    if in_index:
        index = HierarchicalHashIndex(baseline).fit(*train)
        index.save(tmp_path)
        loaded = HierarchicalHashIndex.load(tmp_path)
        assert_same_index(loaded, index, digits[2][:9])
        frozen, own = loaded.encoder.encoder, loaded.encoder_.encoder_
    else:
        baseline.fit(train[0]).save(tmp_path)
        loaded = RandomHyperplaneHashEncoder.load(tmp_path)
        assert_same_baseline(loaded, baseline, digits[2])
        frozen, own = loaded.encoder, loaded.encoder_
    assert isinstance(frozen, FrozenEstimator)
    assert frozen.estimator._model is own._model
    np.testing.assert_array_equal(frozen.estimator.embed(digits[2]), encoder.embed(digits[2]))
    # Weights are written once.
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_a_frozen_encoder_that_was_fitted_again_is_saved_on_its_own(train, digits, tmp_path):
    encoder = small_encoder().fit(*train)
    baseline = ThresholdHashEncoder(FrozenEstimator(encoder)).fit(train[0])
    other = small_encoder(random_state=1).fit(*train)
    baseline.encoder = FrozenEstimator(other)
    baseline.save(tmp_path)
    loaded = ThresholdHashEncoder.load(tmp_path)
    assert_same_baseline(loaded, baseline, digits[2])
    np.testing.assert_array_equal(loaded.encoder.estimator.embed(digits[2]), other.embed(digits[2]))


# What the user gave


def test_a_users_encoder_in_a_baseline_is_given_to_the_baseline_or_to_the_index(train, digits, tmp_path):
    index = HierarchicalHashIndex(ThresholdHashEncoder(Plain())).fit(*train)
    index.save(tmp_path / "index")
    index.encoder_.save(tmp_path / "baseline")
    for given in (Plain, Plain().fit(train[0]), FrozenEstimator(Plain().fit(train[0]))):
        baseline = ThresholdHashEncoder.load(tmp_path / "baseline", encoder=given)
        assert_same_baseline(baseline, index.encoder_, digits[2])
        loaded = HierarchicalHashIndex.load(tmp_path / "index", encoder=given)
        assert_same_index(loaded, index, digits[2][:9])
        assert type(loaded.encoder) is ThresholdHashEncoder
        assert type(loaded.encoder.encoder) is Plain
    loaded = HierarchicalHashIndex.load(tmp_path / "index", encoder=index.encoder_)
    assert loaded.encoder_ is index.encoder_
    for estimator, folder in ((HierarchicalHashIndex, "index"), (ThresholdHashEncoder, "baseline")):
        with pytest.raises(ValueError, match=r"names .*:Plain, .*load\(path, encoder=Plain\)"):
            estimator.load(tmp_path / folder)


def test_an_encoder_that_cannot_be_saved_is_refused_before_anything_is_written(train, tmp_path):
    class Bare(BaseEstimator):
        fit, embed, start_ = Plain.fit, Plain.embed, 20
        n_features = 8

    baseline = ThresholdHashEncoder(Bare()).fit(*train)
    for estimator in (baseline, HierarchicalHashIndex(FrozenEstimator(baseline)).fit(*train)):
        with pytest.raises(ValueError, match=r"save\(path\) and .* load\(path\).*but Bare lacks them"):
            estimator.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("network", [Trunk(), make_trunk], ids=["module", "function"])
def test_a_network_of_the_users_comes_back_in_a_classifier(train, digits, tmp_path, network):
    control = SoftmaxHashEncoder(network=network, epochs=1, random_state=0).fit(*train)
    control.save(tmp_path / "control")
    given = make_trunk if network is make_trunk else Trunk
    loaded = SoftmaxHashEncoder.load(tmp_path / "control", network=given)
    assert_same_baseline(loaded, control, digits[2])
    if network is make_trunk:
        assert loaded.network is make_trunk
    else:
        # Untrained, as the user gave it.
        assert torch.equal(loaded.network.weight, network.weight)
    index = HierarchicalHashIndex(clone(control)).fit(*train)
    index.save(tmp_path / "index")
    loaded = HierarchicalHashIndex.load(tmp_path / "index", network=given)
    assert_same_index(loaded, index, digits[2][:9])
    assert type(loaded.encoder.network) is type(network)
    for estimator, folder in ((HierarchicalHashIndex, "index"), (SoftmaxHashEncoder, "control")):
        with pytest.raises(ValueError, match=r"names .*[tT]runk, .*load\(path, network="):
            estimator.load(tmp_path / folder)
    with pytest.raises(ValueError, match=r"weights.safetensors does not fit"):
        SoftmaxHashEncoder.load(tmp_path / "control", network=lambda shape: torch.nn.Linear(64, 9))


def test_classifier_and_encoder_may_have_different_networks_of_the_users(train, digits, tmp_path):
    encoder = small_encoder(network=make_trunk).fit(*train)
    control = SoftmaxHashEncoder(FrozenEstimator(encoder), network=Trunk(), epochs=1, random_state=0)
    control.fit(*train).save(tmp_path)
    loaded = SoftmaxHashEncoder.load(tmp_path, encoder=encoder, network=Trunk)
    assert_same_baseline(loaded, control, digits[2])


# What is refused


@pytest.mark.parametrize("name", [*BASELINES])
def test_what_is_not_fitted_is_not_saved(name, tmp_path):
    with pytest.raises(NotFittedError):
        clone(BASELINES[name]).save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_parameter_that_was_replaced_after_fit_is_refused(train, tmp_path):
    control = SoftmaxHashEncoder(epochs=1).fit(*train)
    for parameters, message in (
        ({"network": Trunk()}, "Expected network to be what the encoder was fitted with"),
        ({"encoder": Plain()}, "Expected encoder to be of the class that was fitted, NoneType, got Plain"),
        ({"encoder": FrozenEstimator(Plain())}, "of the class that was fitted, NoneType, got Plain"),
    ):
        with pytest.raises(ValueError, match=message):
            clone(control).fit(*train).set_params(**parameters).save(tmp_path / "saved")
    index = HierarchicalHashIndex(ThresholdHashEncoder(Plain())).fit(*train)
    with pytest.raises(ValueError, match="of the class that was fitted, ThresholdHashEncoder, got Plain"):
        index.set_params(encoder=Plain()).save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_baseline_is_refused_by_its_manifest(train, tmp_path):
    ThresholdHashEncoder(Plain()).fit(*train).save(tmp_path)
    with pytest.raises(ValueError, match=r"manifest.json to be of a Vector.*, got 'ThresholdHashEncoder'"):
        VectorQuantizationHashEncoder.load(tmp_path, encoder=Plain)


@pytest.mark.parametrize("mmap_mode", [None, "r"])
def test_every_damage_to_every_file_is_refused_by_the_files_name(baseline, tmp_path, mmap_mode, monkeypatch):
    monkeypatch.setattr("hqsearch.persistence.files._MAPPED_FROM", 1)
    baseline.save(tmp_path)
    # The encoder's folder among them, and that of its own encoder.
    manifests = sum(file.name == "manifest.json" for file in files_of(tmp_path))
    depth, inner = 1, baseline
    while (inner := getattr(inner, "encoder_", None)) is not None:
        depth += 1
    assert manifests == depth
    assert_every_damage_is_refused(tmp_path, lambda: type(baseline).load(tmp_path, mmap_mode))
