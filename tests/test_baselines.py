"""The baselines: what each code is, and that all of them are encoders like any other."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV
from sklearn.utils import check_random_state
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.baselines import (
    RandomHyperplaneHashEncoder,
    SoftmaxHashEncoder,
    ThresholdHashEncoder,
    VectorQuantizationHashEncoder,
)
from hqsearch.baselines.random_hyperplane import best_leaves
from hqsearch.embedding import split_validation
from hqsearch.embedding.classifier import ClassifierStage

ON_EMBEDDING = [ThresholdHashEncoder, VectorQuantizationHashEncoder, RandomHyperplaneHashEncoder]
ALL = [*ON_EMBEDDING, SoftmaxHashEncoder]

# Few epochs: the checks fit each about fifty times and ask for no precision.
ENCODER = HierarchicalHashEncoder(metric_epochs=1, hash_epochs=0)


@pytest.mark.filterwarnings("ignore:.*SCIPY_ARRAY_API:UserWarning")
@parametrize_with_checks(
    [
        *(cls(ENCODER) for cls in ON_EMBEDDING),
        SoftmaxHashEncoder(epochs=2),
        SoftmaxHashEncoder(ENCODER, epochs=1),
    ]
)
def test_scikit_learn_check(estimator, check):
    check(estimator)


class Identity(BaseEstimator):
    """An embedding that is the item itself, so that codes can be worked out from X."""

    def fit(self, X, y=None):
        self.n_items_ = len(X)
        return self

    def embed(self, X):
        return np.asarray(X, dtype=np.float32)


def frozen():
    return FrozenEstimator(Identity().fit([[0.0]]))


def make(cls, **parameters):
    """A baseline, quick to train."""
    quick = {"epochs": 15} if cls is SoftmaxHashEncoder else {"encoder": frozen()}
    return cls(**{**quick, "random_state": 0, **parameters})


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def encoder(digits):
    X, y, *_ = digits
    return HierarchicalHashEncoder(metric_epochs=15, hash_epochs=0, random_state=0).fit(X, y)


def test_threshold_codes_are_the_largest_entries(points):
    baseline = make(ThresholdHashEncoder, sparsity=3).fit(points)
    assert (baseline.n_levels, baseline.branching_factor) == (1, 6)
    np.testing.assert_array_equal(baseline.level_scores(points)[:, 0], points)
    np.testing.assert_array_equal(baseline.encode(points), np.argsort(-points, axis=1)[:, :3])
    np.testing.assert_array_equal(baseline.encode([[1.0, 2, 2, 0, 2, 1]]), [[1, 2, 4]])


def test_vector_quantization_codes_are_the_nearest_cells(points):
    baseline = make(VectorQuantizationHashEncoder, n_buckets=9, sparsity=2).fit(points)
    assert (baseline.n_levels, baseline.branching_factor) == (1, 9)
    distances = ((points[:, None].astype(float) - baseline.cluster_centers_) ** 2).sum(2)
    np.testing.assert_allclose(baseline.level_scores(points)[:, 0], -distances, atol=1e-5)
    np.testing.assert_array_equal(baseline.encode(points), np.argsort(distances, axis=1)[:, :2])
    # A fixed point of k-means: each cell's centroid is the mean of its items.
    cells = baseline.encode(points)[:, 0]
    for cell in range(9):
        np.testing.assert_allclose(points[cells == cell].mean(0), baseline.cluster_centers_[cell], atol=1e-5)


@pytest.mark.parametrize(("n_items", "n_buckets"), [(200, 6), (4, 4)])
def test_vector_quantization_has_a_cell_for_each_dimension_unless_told_or_short_of_items(
    points, n_items, n_buckets
):
    assert make(VectorQuantizationHashEncoder).fit(points[:n_items]).branching_factor == n_buckets


def test_more_cells_than_items_are_refused(points):
    with pytest.raises(ValueError, match="n_buckets <= n_samples, but n_buckets = 201, n_samples = 200"):
        make(VectorQuantizationHashEncoder, n_buckets=201).fit(points)


def test_random_hyperplane_bits_are_sides_of_hyperplanes_through_the_mean(points):
    baseline = make(RandomHyperplaneHashEncoder, n_bits=5).fit(points + 100)
    assert (baseline.n_levels, baseline.branching_factor) == (5, 2)
    projections = (points + 100 - (points + 100).mean(0)) @ baseline.hyperplanes_
    scores = baseline.level_scores(points + 100)
    np.testing.assert_allclose(scores[:, :, 1], projections, atol=1e-3)
    np.testing.assert_array_equal(scores[:, :, 0], -scores[:, :, 1])
    sides = scores[:, :, 1] > 0
    np.testing.assert_array_equal(baseline.encode(points + 100)[:, 0], sides @ [16, 8, 4, 2, 1])
    # Without the mean taken off, nearly all items would lie on one side.
    assert np.abs(sides.mean(0) - 0.5).max() < 0.2


@pytest.mark.parametrize("sparsity", [1, 2, 5, 17, 64])
def test_random_hyperplane_codes_are_the_best_leaves_of_all(points, sparsity):
    baseline = make(RandomHyperplaneHashEncoder, n_bits=6, sparsity=sparsity).fit(points)
    scores = baseline.level_scores(points).astype(float)
    leaves = np.arange(64)
    digits = leaves[:, None] >> np.arange(5, -1, -1) & 1
    leaf_scores = np.take_along_axis(scores[:, None], digits[None, :, :, None], axis=3)[..., 0].sum(2)
    codes = baseline.encode(points)
    np.testing.assert_array_equal(codes, np.argsort(-leaf_scores, axis=1)[:, :sparsity])
    np.testing.assert_array_equal(
        codes[:, :1], make(RandomHyperplaneHashEncoder, n_bits=6).fit(points).encode(points)
    )


def test_the_second_leaf_flips_the_narrowest_bit_and_two_narrow_bits_go_before_a_wide_one():
    projections = np.array([[4.0, -0.5, 1.0, 0.0]])
    scores = np.stack([-projections, projections], axis=2)
    own = 0b1010
    flips = [0, 0b0001, 0b0100, 0b0101, 0b0010, 0b0011, 0b0110, 0b0111, 0b1000]
    np.testing.assert_array_equal(best_leaves(scores, 9), [[own ^ flip for flip in flips]])


def test_an_index_goes_on_from_a_query_in_the_order_of_flipped_margins(points):
    baseline = make(RandomHyperplaneHashEncoder, n_bits=3).fit(points)
    index = HierarchicalHashIndex(FrozenEstimator(baseline), probing="best_first").fit(points)
    for n_probes in (1, 3, 8):
        wide = clone(baseline).set_params(sparsity=n_probes).fit(points)
        opened = wide.encode(points[:20])
        own = baseline.encode(points)[:, 0]
        _, positions = index.kneighbors(points[:20], 3, n_probes=n_probes)
        assert all(
            own[found] in leaves for row, leaves in zip(positions, opened, strict=True) for found in row
        )


def test_62_bits_are_taken_and_63_refused(points):
    baseline = make(RandomHyperplaneHashEncoder, n_bits=62, sparsity=3).fit(points)
    codes = baseline.encode(points)
    assert codes.min() >= 0
    assert codes.max() < 2**62
    assert (np.diff(np.sort(codes, 1), axis=1) > 0).all()
    HierarchicalHashIndex(FrozenEstimator(baseline)).fit(points).kneighbors(points, 5)
    with pytest.raises(ValueError, match="'n_bits' parameter"):
        make(RandomHyperplaneHashEncoder, n_bits=63).fit(points)


@pytest.mark.parametrize("given", [False, True])
def test_softmax_codes_are_the_most_probable_classes(digits, encoder, given):
    X, y, X_query, y_query = digits
    names = np.array(list("abcdefghij"))[y]
    baseline = make(SoftmaxHashEncoder, sparsity=2, encoder=FrozenEstimator(encoder) if given else None)
    baseline.fit(X, names)
    assert (baseline.n_levels, baseline.branching_factor) == (1, 10)
    scores = baseline.level_scores(X_query)
    assert scores.shape == (len(X_query), 1, 10)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(np.exp(scores).sum(2), 1, atol=1e-5)
    codes = baseline.encode(X_query)
    np.testing.assert_array_equal(codes, np.argsort(-scores[:, 0], axis=1, kind="stable")[:, :2])
    assert list(baseline.classes_) == list("abcdefghij")
    assert np.mean(codes[:, 0] == y_query) > 0.85
    assert baseline.history_[-1]["accuracy"] > 0.9
    if given:
        np.testing.assert_array_equal(baseline.embed(X_query), encoder.embed(X_query))
    else:
        assert baseline.embed(X_query).shape == (len(X_query), 512)
        assert baseline.embed(X_query).min() == 0


def test_a_trunk_without_weights_makes_the_classifier_logistic_regression(digits):
    X, y, X_query, y_query = digits
    baseline = make(SoftmaxHashEncoder, network=nn.Identity(), learning_rate=0.1, validation_fraction=0)
    baseline.fit(X, y)
    assert np.mean(baseline.encode(X_query)[:, 0] == y_query) > 0.8
    # The hidden layer is the standardised item after the ReLU, at unit length.
    hidden = np.maximum((X_query - X.mean(0)) / np.where(X.std(0) > 0, X.std(0), 1), 0)
    unit = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    np.testing.assert_allclose(baseline.embed(X_query), unit, atol=1e-6)
    np.testing.assert_array_equal(baseline.describe(X_query)[0], baseline.embed(X_query))


def test_of_the_accuracies_on_held_out_items_that_of_the_kept_epoch(digits):
    X, y, *_ = digits
    baseline = make(SoftmaxHashEncoder, learning_rate=0.3, validation_fraction=0.3, epochs=10).fit(X, y)
    seed = check_random_state(0).randint(np.iinfo(np.int32).max, size=2)[0]
    held_out = split_validation(y, 0.3, np.random.default_rng(int(seed)))[1]
    accuracies = np.array([record["accuracy"] for record in baseline.history_])
    best = accuracies.max()
    error = np.sqrt(best * (1 - best) / len(held_out))
    assert baseline.history_[accuracies.argmax()]["standard_error"] == pytest.approx(error)
    kept = accuracies[accuracies >= best - error][-1]
    assert np.mean(baseline.encode(X)[held_out, 0] == y[held_out]) == pytest.approx(kept)
    last = make(SoftmaxHashEncoder, validation_fraction=0, epochs=2).fit(X, y)
    assert not any("accuracy" in record for record in last.history_)


def worse_every_time(stage):
    return {"criterion": -float(len(stage.history)), "standard_error": 0.0}


def test_patience_stops_the_classifier_early(blobs, monkeypatch):
    monkeypatch.setattr(ClassifierStage, "_validate", worse_every_time)
    assert len(make(SoftmaxHashEncoder, epochs=10, patience=2).fit(*blobs).history_) == 3


def test_the_classifier_says_nothing_until_asked(blobs, capsys):
    make(SoftmaxHashEncoder, epochs=2).fit(*blobs)
    assert capsys.readouterr().out == ""
    make(SoftmaxHashEncoder, epochs=2, verbose=1).fit(*blobs)
    assert capsys.readouterr().out.count("classifier [") == 2


def test_memory_trains_the_classifier_once_for_all_sparsities(blobs, tmp_path):
    X, y = blobs
    fits = [make(SoftmaxHashEncoder, epochs=2, memory=str(tmp_path), sparsity=s).fit(X, y) for s in (1, 2, 3)]
    assert len(list(tmp_path.rglob("train_first_stage/*/output.pkl"))) == 1
    np.testing.assert_array_equal(fits[0].level_scores(X), fits[2].level_scores(X))
    np.testing.assert_array_equal(make(SoftmaxHashEncoder, epochs=2).fit(X, y).embed(X), fits[1].embed(X))
    other = make(SoftmaxHashEncoder, epochs=2, memory=str(tmp_path), random_state=1).fit(X, y)
    assert (other.level_scores(X) != fits[0].level_scores(X)).any()


def test_images_of_bytes_are_classified_as_they_are(digits):
    X, y, *_ = digits
    images = X.reshape(-1, 1, 8, 8).astype(np.uint8)
    baseline = make(SoftmaxHashEncoder, epochs=3).fit(images, y)
    assert baseline.embed(images).shape == (len(X), 256)
    with pytest.raises(ValueError, match=r"items of shape \(1, 8, 7\)"):
        baseline.embed(images[..., :7])


@pytest.mark.parametrize("cls", ALL)
def test_same_seed_same_codes_and_no_global_randomness(blobs, cls):
    X, y = blobs
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()  # noqa: NPY002
    first, again, other = (
        make(cls, random_state=seed, encoder=Identity() if cls in ON_EMBEDDING else None).fit(X, y)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch_state, torch.random.get_rng_state())
    for before, after in zip(numpy_state, np.random.get_state(), strict=True):  # noqa: NPY002
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(first.level_scores(X), again.level_scores(X))
    np.testing.assert_array_equal(first.embed(X), again.embed(X))
    if cls is not ThresholdHashEncoder:
        assert (first.level_scores(X) != other.level_scores(X)).any()


@pytest.mark.parametrize("cls", ALL)
def test_outputs_agree_and_do_not_depend_on_what_an_item_is_asked_with(digits, encoder, cls):
    X, y, X_query, _ = digits
    baseline = make(cls, encoder=FrozenEstimator(encoder), sparsity=2).fit(X, y)
    embedding, scores, codes = baseline.describe(X_query)
    assert embedding.dtype == scores.dtype == np.float32
    assert codes.dtype == np.int64
    assert scores.shape == (len(X_query), baseline.n_levels, baseline.branching_factor)
    np.testing.assert_array_equal(embedding, encoder.embed(X_query))
    np.testing.assert_array_equal(scores, baseline.level_scores(X_query))
    np.testing.assert_array_equal(codes, baseline.encode(X_query))
    rows = baseline.transform(X_query)
    assert rows.shape == (len(X_query), baseline.branching_factor**baseline.n_levels)
    np.testing.assert_array_equal(rows.indices.reshape(codes.shape), np.sort(codes, 1))
    for part in (slice(0, 1), slice(3, 20), slice(50, 150)):
        np.testing.assert_array_equal(baseline.level_scores(X_query[part]), scores[part])


def test_the_classifiers_own_embedding_agrees_with_its_description(digits):
    X, y, X_query, _ = digits
    baseline = make(SoftmaxHashEncoder, epochs=2).fit(X, y)
    embedding, scores, codes = baseline.describe(X_query)
    np.testing.assert_array_equal(embedding, baseline.embed(X_query))
    np.testing.assert_array_equal(scores, baseline.level_scores(X_query))
    np.testing.assert_array_equal(codes, baseline.encode(X_query))


@pytest.mark.parametrize("cls", ALL)
def test_an_index_searches_every_baseline(digits, encoder, cls):
    X, y, X_query, y_query = digits
    baseline = make(cls, encoder=FrozenEstimator(encoder))
    index = HierarchicalHashIndex(baseline, n_neighbors=4).fit(X, y)
    assert index.score(X_query, y_query) > 0.6
    assert index.suf() > 5
    frozen_index = HierarchicalHashIndex(FrozenEstimator(baseline.fit(X, y)), sparsity=2, n_neighbors=4)
    frozen_index.fit(X)
    assert frozen_index.encoder_.encode(X_query).shape == (len(X_query), 2)
    assert baseline.sparsity == 1
    everything = frozen_index.kneighbors(X_query, n_probes=2**30, return_distance=False)
    distances = ((encoder.embed(X_query)[:, None] - encoder.embed(X)) ** 2).sum(2)
    np.testing.assert_array_equal(everything[:, 0], distances.argmin(1))


@pytest.mark.parametrize("cls", ALL)
def test_a_grid_search_goes_over_sparsity(blobs, encoder, cls):
    X, y = blobs
    parameters = {"epochs": 5} if cls is SoftmaxHashEncoder else {"encoder": Identity()}
    search = GridSearchCV(
        HierarchicalHashIndex(make(cls, **parameters)), {"sparsity": [1, 2, 3]}, cv=2, error_score="raise"
    ).fit(X, y)
    assert search.best_score_ > 0.9
    assert search.best_estimator_.encoder_.sparsity == search.best_params_["sparsity"]


@pytest.mark.parametrize("cls", ON_EMBEDDING)
def test_a_frozen_encoder_is_shared_and_needs_no_labels(digits, encoder, cls):
    X, _, X_query, _ = digits
    baseline = make(cls, encoder=FrozenEstimator(encoder)).fit(X)
    assert baseline.encoder_ is encoder
    np.testing.assert_array_equal(baseline.embed(X_query), encoder.embed(X_query))
    with pytest.raises(NotFittedError):
        make(cls, encoder=FrozenEstimator(clone(encoder))).fit(X)


@pytest.mark.parametrize("cls", ALL)
def test_an_unfitted_encoder_is_cloned_and_fitted(blobs, cls):
    given = Identity()
    baseline = make(cls, encoder=given).fit(*blobs)
    assert baseline.encoder_.n_items_ == len(blobs[0])
    assert not hasattr(given, "n_items_")


@pytest.mark.parametrize("cls", ON_EMBEDDING)
def test_without_an_encoder_it_is_the_default_one_of_the_same_seed_without_its_hash_stage(
    blobs, cls, monkeypatch
):
    fit, hash_epochs = HierarchicalHashEncoder.fit, []

    def quick(encoder, X, y):
        hash_epochs.append(encoder.hash_epochs)
        return fit(encoder.set_params(metric_epochs=1, hash_epochs=int(encoder.hash_epochs != 0)), X, y)

    monkeypatch.setattr(HierarchicalHashEncoder, "fit", quick)
    baseline = make(cls, encoder=None, random_state=3).fit(*blobs)
    method = HierarchicalHashEncoder(random_state=3).fit(*blobs)
    assert hash_epochs == [0, "auto"]
    np.testing.assert_array_equal(baseline.embed(blobs[0]), method.embed(blobs[0]))


@pytest.mark.parametrize("cls", ALL)
def test_a_seed_goes_on_to_the_encoder_and_none_leaves_it_its_own(blobs, cls):
    given = clone(ENCODER).set_params(random_state=5)
    assert make(cls, encoder=given, random_state=None).fit(*blobs).encoder_.random_state == 5
    assert make(cls, encoder=given, random_state=7).fit(*blobs).encoder_.random_state == 7


@pytest.mark.parametrize("cls", ALL)
def test_pickled_baselines_give_the_same_codes(blobs, cls):
    X, y = blobs
    baseline = make(cls, sparsity=2).fit(X, y)
    back = pickle.loads(pickle.dumps(baseline))
    for one, other in zip(baseline.describe(X), back.describe(X), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("cls", "parameters", "message"),
    [
        (ThresholdHashEncoder, {"sparsity": 6}, "sparsity = 6, and ThresholdHashEncoder has 5 buckets"),
        (VectorQuantizationHashEncoder, {"sparsity": 6}, "VectorQuantizationHashEncoder has 5 buckets"),
        (RandomHyperplaneHashEncoder, {"n_bits": 2, "sparsity": 5}, "sparsity = 5.* has 4 buckets"),
        (SoftmaxHashEncoder, {"sparsity": 7}, "sparsity = 7, and SoftmaxHashEncoder has 6 buckets"),
        (ThresholdHashEncoder, {"encoder": "nin"}, "'encoder' parameter"),
        (ThresholdHashEncoder, {"sparsity": 0}, "'sparsity' parameter"),
        (VectorQuantizationHashEncoder, {"n_buckets": 0}, "'n_buckets' parameter"),
        (SoftmaxHashEncoder, {"network": "transformer"}, "'network' parameter"),
        (SoftmaxHashEncoder, {"learning_rate": 0}, "'learning_rate' parameter"),
        (SoftmaxHashEncoder, {"device": "tpu-please"}, "Expected device to be"),
    ],
)
def test_bad_parameters_are_refused_by_name(blobs, cls, parameters, message):
    with pytest.raises(ValueError, match=message):
        make(cls, **parameters).fit(*blobs)


def test_the_control_refuses_a_sparsity_before_it_trains_in_vain(blobs, monkeypatch):
    monkeypatch.setattr(ClassifierStage, "run", lambda stage: pytest.fail("trained"))
    with pytest.raises(ValueError, match="sparsity = 7"):
        make(SoftmaxHashEncoder, sparsity=7).fit(*blobs)


@pytest.mark.parametrize("cls", ALL)
def test_a_sparsity_set_after_fit_is_checked_too(blobs, cls):
    baseline = make(cls, **({"n_bits": 2} if cls is RandomHyperplaneHashEncoder else {})).fit(*blobs)
    with pytest.raises(ValueError, match=r"Expected .*sparsity <= "):
        baseline.set_params(sparsity=9).encode(blobs[0])


@pytest.mark.parametrize("cls", ALL)
def test_before_fit_nothing_is_answered(blobs, cls):
    baseline = make(cls)
    for ask in (baseline.embed, baseline.encode, baseline.level_scores, baseline.describe):
        with pytest.raises(NotFittedError):
            ask(blobs[0])
    assert not hasattr(baseline, "branching_factor")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, y: (X, None), "requires y to be passed"),
        (lambda X, y: (X, np.zeros(len(X))), "at least 2 classes in y, got 1 class"),
        (lambda X, y: (X, np.linspace(0, 1, len(X))), "Unknown label type"),
        (lambda X, y: (X[:, :, None], y), "got 3 dimensions"),
        (lambda X, y: (X * np.nan, y), "contains NaN"),
    ],
)
def test_bad_data_is_refused_by_the_control_with_the_reason(blobs, change, message):
    with pytest.raises(ValueError, match=message):
        make(SoftmaxHashEncoder).fit(*change(*blobs))


@pytest.mark.parametrize("cls", ON_EMBEDDING)
def test_an_embedding_that_is_not_finite_is_refused_by_name(blobs, cls):
    with pytest.raises(ValueError, match=r"encoder.embed\(X\) contains NaN"):
        make(cls).fit(blobs[0] * np.nan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_the_classifier_as_well_as_the_cpu(digits):
    X, y, X_query, y_query = digits
    baseline = make(SoftmaxHashEncoder, device="cuda").fit(X, y)
    assert np.mean(baseline.encode(X_query)[:, 0] == y_query) > 0.85
    back = pickle.loads(pickle.dumps(baseline))
    np.testing.assert_array_equal(back.encode(X_query), baseline.encode(X_query))


def test_importing_baselines_and_data_sets_leaves_torch_out():
    code = "import sys, hqsearch.baselines, hqsearch.datasets; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
