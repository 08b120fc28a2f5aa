"""HierarchicalHashEncoder: what it learns, what it refuses, what it leaves alone."""

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_random_state
from torch import nn

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.embedding import EmbeddingModel, split_validation
from hqsearch.embedding import stage as stage_module
from hqsearch.embedding.stage import TrainingData


def make(**parameters):
    return HierarchicalHashEncoder(**{"metric_epochs": 4, "hash_epochs": 4, "random_state": 0} | parameters)


def two_layers(shape):
    return nn.Sequential(nn.Linear(shape[0], 16), nn.ReLU(), nn.Linear(16, 8))


class NoFeatures(nn.Module):
    def forward(self, x):
        return x[:, :0]


@pytest.fixture(scope="module")
def fitted(digits):
    X, y, *_ = digits
    return make(metric_epochs=15, hash_epochs=15).fit(X, y)


@pytest.mark.parametrize("loss", ["npairs", "triplet"])
def test_codes_that_settle_are_one_for_each_class_and_retrieve_unseen_items(digits, loss):
    X, y, X_query, y_query = digits
    asked = {"metric_epochs": 15, "hash_epochs": 15, "loss": loss}
    settled = make(**asked, code_assignment="settled").fit(X, y)
    assert settled.score(X_query, y_query) > 0.85
    assert settled.history_[-1]["suf"] > 5
    leaves = settled.encode(X)[:, 0]
    usual = [np.bincount(leaves[y == c]).argmax() for c in np.unique(y)]
    assert len(set(usual)) == 10
    batch = make(**asked).fit(X, y)
    assert batch.history_[0] | {"seconds": 0} == settled.history_[0] | {"seconds": 0}
    assert batch.history_[-1]["loss"] != settled.history_[-1]["loss"]


@pytest.mark.parametrize("loss", ["npairs", "triplet"])
@pytest.mark.parametrize("sparsity", [1, 3])
def test_both_losses_learn_codes_that_retrieve_unseen_items(digits, loss, sparsity):
    X, y, X_query, y_query = digits
    encoder = make(metric_epochs=15, hash_epochs=15, loss=loss, sparsity=sparsity).fit(X, y)
    assert encoder.score(X_query, y_query) > 0.85
    # Codes that put everything into one leaf are as precise, with a speed-up of 1.
    assert encoder.history_[-1]["suf"] > 5


def test_outputs_have_the_promised_shapes_types_and_order(fitted, digits):
    X_query = digits[2]
    n = len(X_query)
    scores, codes = fitted.level_scores(X_query), fitted.encode(X_query)
    assert fitted.embed(X_query).shape == (n, 64)
    assert fitted.embed(X_query).dtype == scores.dtype == np.float32
    assert scores.shape == (n, 2, 64)
    assert codes.dtype == np.int64
    np.testing.assert_array_equal(codes[:, 0], scores[:, 0].argmax(1) * 64 + scores[:, 1].argmax(1))
    rows = fitted.transform(X_query)
    assert rows.shape == (n, 4096)
    np.testing.assert_array_equal(rows.indices[:, None], codes)
    assert (rows.data == 1).all()
    together = fitted.describe(X_query)
    for alone, among in zip((fitted.embed(X_query), scores, codes), together, strict=True):
        np.testing.assert_array_equal(alone, among)


def test_an_items_outputs_do_not_depend_on_what_it_is_asked_with(fitted, digits):
    X_query = digits[2]
    embedding, scores, _ = fitted.describe(X_query)
    for start, stop in ((0, 1), (3, 20), (50, 150)):
        np.testing.assert_array_equal(fitted.embed(X_query[start:stop]), embedding[start:stop])
        np.testing.assert_array_equal(fitted.level_scores(X_query[start:stop]), scores[start:stop])


@pytest.mark.parametrize(
    ("n_levels", "branching_factor", "sparsity"), [(1, 16, 2), (3, 8, 1), (2, 12, 12), (4, 1, 1)]
)
def test_trees_of_any_shape_train(blobs, n_levels, branching_factor, sparsity):
    X, y = blobs
    encoder = make(n_levels=n_levels, branching_factor=branching_factor, sparsity=sparsity).fit(X, y)
    codes = encoder.encode(X)
    assert codes.shape == (len(X), sparsity)
    assert codes.max() < branching_factor**n_levels
    # The leaves of one item are siblings.
    assert (codes // branching_factor == codes[:, :1] // branching_factor).all()


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_same_seed_same_codes(blobs, n_jobs):
    X, y = blobs
    # The codes of each batch, whose flow problems several threads may solve.
    asked = {"loss": "npairs", "class_groups_per_step": 2, "classes_per_batch": 3}
    first = make(**asked).fit(X, y)
    again = make(**asked, n_jobs=n_jobs).fit(X, y)
    other = make(**asked, random_state=1).fit(X, y)
    np.testing.assert_array_equal(first.level_scores(X), again.level_scores(X))
    assert (first.level_scores(X) != other.level_scores(X)).any()


@pytest.mark.parametrize(
    "network", ["auto", lambda shape: nn.Sequential(nn.Linear(shape[0], 16), nn.Dropout(0.5))]
)
def test_fit_leaves_the_global_random_states_untouched(blobs, network):
    X, y = blobs
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()  # noqa: NPY002
    make(network=network).fit(X, y)
    assert torch.equal(torch_state, torch.random.get_rng_state())
    for before, after in zip(numpy_state, np.random.get_state(), strict=True):  # noqa: NPY002
        np.testing.assert_array_equal(before, after)


def test_a_users_module_with_randomness_of_its_own_is_reproducible(blobs):
    X, y = blobs
    network = nn.Sequential(nn.LazyLinear(16), nn.Dropout(0.3))
    first, again = (make(network=network).fit(X, y).embed(X) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert isinstance(network[0], nn.LazyLinear)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 30, 1), (1000, 1), (40,) * 70])
def test_any_class_sizes_train(sizes):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(len(sizes)), sizes)
    X = rng.normal(size=(len(y), 4)) + 3 * y[:, None] * [1, -1, 0, 0]
    encoder = make(metric_epochs=1, hash_epochs=1).fit(X, y)
    assert np.isfinite(encoder.level_scores(X)).all()


def test_images_bytes_and_strings_are_taken_as_they_are(digits):
    X, y, X_query, _ = digits
    images = X.reshape(-1, 1, 8, 8).astype(np.uint8)
    names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])[y]
    encoder = make(metric_epochs=6, hash_epochs=6).fit(images, names)
    assert list(encoder.classes_) == sorted(set(names))
    assert encoder.n_features_in_ == 1
    assert encoder.score(images, names) > 0.9
    with pytest.raises(ValueError, match=r"items of shape \(1, 8, 7\)"):
        encoder.embed(X_query.reshape(-1, 1, 8, 8)[..., :7])


def test_features_of_any_scale_train_alike(digits):
    X, y, X_query, y_query = digits
    scale = np.logspace(-6, 6, X.shape[1])
    encoder = make(metric_epochs=8, hash_epochs=8).fit(1e5 + X * scale, y)
    assert encoder.score(1e5 + X_query * scale, y_query) > 0.8


def test_a_read_only_input_is_neither_copied_into_nor_warned_about(blobs):
    X, y = blobs[0].copy(), blobs[1]
    X.setflags(write=False)
    before = X.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().fit(X, y)
    np.testing.assert_array_equal(X, before)


def test_history_tells_both_stages_epoch_by_epoch(fitted):
    stages = [record["stage"] for record in fitted.history_]
    assert stages == ["metric"] * 15 + ["hash"] * 15
    assert all(record["seconds"] > 0 and np.isfinite(record["loss"]) for record in fitted.history_)
    assert {"precision@1", "suf", "criterion"} <= set(fitted.history_[-1])
    assert "suf" not in fitted.history_[14]


def test_an_epoch_far_better_than_the_last_is_kept(digits):
    X, y, *_ = digits
    # A rate at which training falls apart: the first epochs are the best.
    rate = {"loss": "npairs", "learning_rate": 3.0}
    encoder = make(metric_epochs=10, hash_epochs=0, validation_fraction=0.3, **rate).fit(X, y)
    seed = check_random_state(0).randint(np.iinfo(np.int32).max, size=3)[0]
    train, validation = split_validation(y, 0.3, np.random.default_rng(int(seed)))
    precisions = np.array([r["precision@1"] for r in encoder.history_])
    best = precisions.max()
    kept = precisions[precisions >= best - np.sqrt(best * (1 - best) / len(validation))][-1]
    assert kept != precisions[-1]
    embedding = encoder.embed(X)
    distances = ((embedding[validation, None] - embedding[train]) ** 2).sum(-1)
    assert np.mean(y[train][distances.argmin(1)] == y[validation]) == pytest.approx(kept, abs=1e-9)


@pytest.mark.parametrize("shared_trunk", [False, True, "frozen"])
def test_held_out_items_are_searched_among_some_of_many_training_items(digits, monkeypatch, shared_trunk):
    X, y, *_ = digits
    asked = {"loss": "npairs", "validation_fraction": 0.3, "shared_trunk": shared_trunk}
    whole = make(**asked).fit(X, y)
    monkeypatch.setattr(stage_module, "MOST_SEARCHED", 40)
    some = make(**asked).fit(X, y)
    # What is trained is the same, what is said of it is not.
    assert [r["loss"] for r in some.history_] == [r["loss"] for r in whole.history_]
    seed = check_random_state(0).randint(np.iinfo(np.int32).max, size=3)[0]
    train, validation = split_validation(y, 0.3, np.random.default_rng(int(seed)))
    gallery = TrainingData(torch.from_numpy(X), y, train, validation).gallery
    assert len(np.unique(gallery)) == 40
    assert np.isin(gallery, train).all()
    if shared_trunk is not True:
        metric = some.history_[3]
        embedding = some.embed(X)
        distances = ((embedding[validation, None] - embedding[gallery]) ** 2).sum(-1)
        precision = np.mean(y[gallery][distances.argmin(1)] == y[validation])
        assert metric["precision@1"] == pytest.approx(precision) != whole.history_[3]["precision@1"]
    index = HierarchicalHashIndex(FrozenEstimator(some), probing="best_first").fit(X[gallery], y[gallery])
    positions = index.kneighbors(X[validation], 1, return_distance=False)[:, 0]
    last = some.history_[-1]
    assert last["criterion"] == max(r["criterion"] for r in some.history_[4:])
    assert np.mean(y[gallery[positions]] == y[validation]) == pytest.approx(last["precision@1"])
    assert index.search_stats_.suf() == pytest.approx(last["suf"])


def test_codes_of_fewer_leaves_than_are_fair_count_less_and_so_does_their_error(digits):
    X, y, *_ = digits
    # Ten classes in two leaves: of a speed-up of 8, which would count in full, there are 2.
    encoder = make(n_levels=1, branching_factor=2, validation_fraction=0.3).fit(X, y)
    seed = check_random_state(0).randint(np.iinfo(np.int32).max, size=3)[0]
    n_held_out = len(split_validation(y, 0.3, np.random.default_rng(int(seed)))[1])
    for record in encoder.history_[4:]:
        precision, counted = record["precision@1"], record["suf"] / 8
        assert counted < 0.3
        assert record["criterion"] == pytest.approx(counted * precision)
        error = np.sqrt(precision * (1 - precision) / n_held_out)
        assert record["standard_error"] == pytest.approx(counted * error)


def test_patience_stops_early(digits):
    X, y, *_ = digits
    encoder = make(metric_epochs=10, hash_epochs=1, learning_rate=3.0, patience=1, validation_fraction=0.3)
    assert sum(r["stage"] == "metric" for r in encoder.fit(X, y).history_) < 10


def test_for_patience_a_tie_is_no_improvement(blobs, monkeypatch):
    from hqsearch.embedding.training import MetricStage

    same = {"criterion": 1.0, "standard_error": 0.0}
    monkeypatch.setattr(MetricStage, "_validate", lambda stage: same)
    encoder = make(metric_epochs=8, hash_epochs=0, patience=2).fit(*blobs)
    assert [record["epoch"] for record in encoder.history_] == [1, 2, 3]


def test_a_stage_validates_as_often_as_documented(blobs, monkeypatch):
    for epochs, expected in ((19, 19), (20, 10), (29, 15), (40, 10)):
        history = make(metric_epochs=epochs, hash_epochs=0).fit(*blobs).history_
        assert sum("criterion" in record for record in history) == expected


def test_the_shape_of_codes_is_that_of_the_fit_whatever_is_set_later(fitted, digits):
    X_query, y_query = digits[2:]
    changed = copy.copy(fitted).set_params(n_levels=1, branching_factor=100)
    assert (changed.transform(X_query) != fitted.transform(X_query)).nnz == 0
    assert changed.score(X_query, y_query) == fitted.score(X_query, y_query)
    with pytest.raises(ValueError, match=r"HierarchicalHashEncoder to give arrays.*\(200, 1, 100\)"):
        HierarchicalHashIndex(FrozenEstimator(changed)).fit(X_query)


def test_numpy_numbers_do_as_well_as_pythons(blobs):
    X, y = blobs
    names = {"branching_factor": 64, "n_levels": 2, "embedding_dim": 64, "batch_size": 120, "sparsity": 2}
    ours = make(**{name: np.int8(value) for name, value in names.items()}, learning_rate=np.float64(3e-3))
    theirs = make(**names, learning_rate=3e-3)
    assert (ours.fit(X, y).transform(X) != theirs.fit(X, y).transform(X)).nnz == 0
    assert ours.transform(X).shape == (240, 4096)
    index = HierarchicalHashIndex(FrozenEstimator(ours)).fit(X, y)
    expected = HierarchicalHashIndex(FrozenEstimator(theirs)).fit(X, y)
    np.testing.assert_array_equal(index.kneighbors(X)[1], expected.kneighbors(X)[1])
    with pytest.raises(ValueError, match=r"Expected branching_factor\*\*n_levels <= 2\*\*62"):
        make(branching_factor=np.int64(16), n_levels=np.int64(16)).fit(X, y)


def test_a_refused_fit_leaves_a_fitted_encoder_as_it_was(blobs, tmp_path):
    X, y = blobs
    encoder = make(branching_factor=8).fit(X, y)
    expected = encoder.embed(X)
    for refused in ({"sparsity": 9}, {"n_levels": 63}, {"checkpoint_dir": tmp_path, "random_state": None}):
        kept = encoder.get_params()
        with pytest.raises(ValueError, match="Expected"):
            encoder.set_params(**refused).fit(X[:, :3], y > 2)
        encoder.set_params(**kept)
        np.testing.assert_array_equal(encoder.embed(X), expected)
        assert len(encoder.classes_) == 6


def test_images_without_a_pixel_are_refused():
    with pytest.raises(ValueError, match=r"at least one number, got shape \(10, 1, 8, 0\)"):
        make().fit(np.zeros((10, 1, 8, 0)), np.arange(10) % 2)


def test_without_a_validation_part_every_epoch_counts(blobs):
    encoder = make(validation_fraction=0).fit(*blobs)
    assert len(encoder.history_) == 8
    assert not any("precision@1" in record for record in encoder.history_)


def test_nothing_prints_until_asked(blobs, capsys):
    make().fit(*blobs)
    assert capsys.readouterr().out == ""
    make(verbose=1).fit(*blobs)
    out = capsys.readouterr().out
    assert out.count("\n") == 8
    assert "metric [" in out
    assert "suf" in out


def test_interrupting_fit_leaves_a_usable_encoder_and_warns(blobs, monkeypatch):
    from hqsearch.embedding.training import HashStage

    run_epoch = HashStage._run_epoch

    def interrupted(stage):
        if len(stage.history) == 2:
            raise KeyboardInterrupt
        return run_epoch(stage)

    monkeypatch.setattr(HashStage, "_run_epoch", interrupted)
    with pytest.warns(UserWarning, match="hash stage was interrupted after 2 epochs"):
        encoder = make().fit(*blobs)
    assert np.isfinite(encoder.level_scores(blobs[0])).all()
    assert len(encoder.history_) == 6


@pytest.mark.parametrize(
    ("method", "shared_trunk"),
    [
        *itertools.product(["embed", "join_hidden_layer"], [False, True]),
        *itertools.product(["embed_with_hidden_layer", "join_hidden_layer"], ["frozen"]),
    ],
)
def test_an_interrupted_fit_is_usable_between_and_after_the_stages(blobs, monkeypatch, method, shared_trunk):
    X, y = blobs
    whole = getattr(EmbeddingModel, method)
    calls = []

    def interrupted_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingModel, method, interrupted_once)
        with pytest.warns(UserWarning, match="Training of the encoder was interrupted (between|after)"):
            encoder = make(shared_trunk=shared_trunk).fit(X, y)
    after = shared_trunk is True and method == "join_hidden_layer"
    assert [r["stage"] for r in encoder.history_] == ["metric"] * 4 + ["hash"] * (4 if after else 1)
    assert all(np.isfinite(part).all() for part in encoder.describe(X))
    trunks = encoder._model.metric_network.trunk, encoder._model.hash_network.trunk
    assert (trunks[0] is trunks[1]) == bool(shared_trunk)


def test_pickle_and_clone(fitted, digits):
    X_query = digits[2]
    back = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(back.level_scores(X_query), fitted.level_scores(X_query))
    np.testing.assert_array_equal(back.embed(X_query), fitted.embed(X_query))
    assert not hasattr(clone(fitted), "classes_")


def test_memory_trains_the_metric_stage_once_for_all_sparsities_and_ways_to_assign_codes(blobs, tmp_path):
    X, y = blobs
    fits = [make(memory=str(tmp_path), sparsity=s).fit(X, y) for s in (1, 2, 1)]
    fits.append(make(memory=str(tmp_path), loss="npairs", code_assignment="batch").fit(X, y))
    fits.append(make(memory=str(tmp_path), loss="npairs", code_assignment="settled").fit(X, y))
    np.testing.assert_array_equal(fits[3].embed(X), fits[4].embed(X))
    assert not np.array_equal(fits[3].level_scores(X), fits[4].level_scores(X))
    np.testing.assert_array_equal(fits[0].embed(X), fits[1].embed(X))
    np.testing.assert_array_equal(fits[0].level_scores(X), fits[2].level_scores(X))
    results = list(tmp_path.rglob("train_first_stage/*/output.pkl"))
    assert len(results) == 2, "one of each loss"
    np.testing.assert_array_equal(make().fit(X, y).embed(X), fits[0].embed(X))


def test_modules_that_share_their_weights_train(blobs):
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    encoder = make(network=nn.Sequential(first, nn.ReLU(), second)).fit(*blobs)
    assert np.isfinite(encoder.level_scores(blobs[0])).all()


@pytest.mark.parametrize("network", [nn.Sequential(nn.Linear(5, 16)), two_layers])
def test_memory_recognises_equal_networks_of_the_users(blobs, tmp_path, network):
    X, y = blobs
    for sparsity in (1, 2):
        clone(make(memory=str(tmp_path), sparsity=sparsity, network=network)).fit(X, y)
    assert len(list(tmp_path.rglob("train_first_stage/*/output.pkl"))) == 1


def test_memory_says_that_it_cannot_tell_functions_without_a_name_apart(blobs, tmp_path):
    encoder = make(memory=str(tmp_path), network=lambda shape: nn.Linear(shape[0], 8))
    with pytest.warns(UserWarning, match="memory cannot tell whether two networks"):
        encoder.fit(*blobs)


def test_memory_does_not_keep_an_interrupted_stage(blobs, tmp_path, monkeypatch):
    from hqsearch.embedding.training import MetricStage

    def interrupted(stage):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricStage, "_run_epoch", interrupted)
        with pytest.warns(UserWarning, match="metric stage was interrupted after 0 epochs"):
            encoder = make(memory=str(tmp_path)).fit(*blobs)
    # Whoever interrupts wants to stop: one epoch makes codes, and no more.
    assert [record["stage"] for record in encoder.history_] == ["hash"]
    assert len(make(memory=str(tmp_path)).fit(*blobs).history_) == 8


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sparsity": 65}, "sparsity <= branching_factor, but sparsity = 65, branching_factor = 64"),
        ({"n_levels": 11}, r"branching_factor\*\*n_levels <= 2\*\*62"),
        ({"loss": "softmax"}, "'loss' parameter .* must be a str among"),
        ({"network": "transformer"}, "'network' parameter"),
        ({"sparsity": 0}, "'sparsity' parameter"),
        ({"sibling_penalty": -1}, "'sibling_penalty' parameter"),
        ({"learning_rate": 0}, "'learning_rate' parameter"),
        ({"network": "conv"}, "network='conv' expects X of shape"),
        ({"network": nn.Unflatten(1, (5, 1))}, r"tensor of shape \(2, n_hidden\)"),
        ({"network": nn.Linear(6, 4)}, r"n_hidden\), but it fails: .*shapes cannot be multiplied"),
        ({"network": nn.Linear(5, 4).double()}, "but it fails"),
        ({"network": NoFeatures()}, "got .2, 0."),
        ({"device": "tpu-please"}, "Expected device to be 'auto', 'cpu' or 'cuda'"),
        ({"device": "meta"}, "Expected device='meta' to exist and to compute"),
    ],
)
def test_bad_parameters_are_refused_by_name(blobs, parameters, message):
    with pytest.raises(ValueError, match=message):
        make(**parameters).fit(*blobs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about a machine without CUDA")
def test_cuda_is_refused_where_there_is_none(blobs):
    with pytest.raises(ValueError, match="torch finds 0 CUDA devices"):
        make(device="cuda").fit(*blobs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", ["npairs", "triplet"])
def test_a_gpu_trains_as_well_as_the_cpu(digits, loss):
    X, y, X_query, y_query = digits
    encoder = make(metric_epochs=15, hash_epochs=15, loss=loss, device="cuda").fit(X, y)
    assert encoder.score(X_query, y_query) > 0.85
    assert next(encoder._model.hash_network.parameters()).is_cuda
    assert not next(
        pickle.loads(pickle.dumps(encoder._model)).__getstate__()["hash_network"].parameters()
    ).is_cuda


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, y: (np.where(np.arange(X.size).reshape(X.shape) == 7, np.nan, X), y), "contains NaN"),
        (lambda X, y: (X, y[:-1]), "inconsistent numbers of samples"),
        (lambda X, y: (X, None), "requires y to be passed"),
        (lambda X, y: (X, np.zeros(len(X))), "at least 2 classes in y, got 1 class"),
        (lambda X, y: (X, np.linspace(0, 1, len(X))), "Unknown label type"),
        (lambda X, y: (X[:, :, None], y), "got 3 dimensions"),
        (lambda X, y: (X[:1], y[:1]), "1 sample"),
        (lambda X, y: (X * 1e300, y), "standard deviation float64 can hold"),
    ],
)
def test_bad_data_is_refused_with_the_reason(blobs, change, message):
    with pytest.raises(ValueError, match=message):
        make().fit(*change(*blobs))


def test_queries_are_checked(fitted, digits):
    X_query = digits[2]
    with pytest.raises(ValueError, match="X has 63 features, but HierarchicalHashEncoder is expecting 64"):
        fitted.encode(X_query[:, :63])
    with pytest.raises(ValueError, match="contains NaN"):
        fitted.embed(X_query * np.nan)
    with pytest.raises(NotFittedError):
        make().encode(X_query)
    with pytest.raises(NotFittedError):
        make().score(X_query, digits[3])
