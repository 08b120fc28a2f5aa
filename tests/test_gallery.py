"""What an encoder says of the items of an index, and the embedding that suits items of other classes."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_random_state

import hqsearch.description
import hqsearch.fitting
from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.calibration import mean_distance_ratio
from hqsearch.codes import mean_score_gap
from hqsearch.embedding import resolve_gallery, split_validation
from hqsearch.metrics import precision_at_k

N_KNOWN = 7
PARAMETERS = {"embedding_dim": 16, "metric_epochs": 8, "hash_epochs": 16, "random_state": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def parts():
    """Digits: training items of seven classes, further items of these, and items of the other three."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    known = y < N_KNOWN
    held_out = np.arange(len(y)) % 4 == 0
    return {
        "train": (X[known & ~held_out], y[known & ~held_out]),
        "known": (X[known & held_out], y[known & held_out]),
        "others": (X[~known], y[~known]),
    }


@pytest.fixture(scope="module")
def encoder(parts):
    return HierarchicalHashEncoder(**PARAMETERS).fit(*parts["train"])


@pytest.fixture(scope="module")
def index(encoder, parts):
    return HierarchicalHashIndex(FrozenEstimator(encoder), n_neighbors=3).fit(parts["others"][0])


def assert_same(first, second):
    """Check two galleries bit by bit."""
    for name in ("hidden_weight", "embedding_weight", "epsilon", "axes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def precision(embedding, y):
    """Precision@16 of items among themselves, each without itself."""
    distances = np.square(embedding[:, None] - embedding[None]).sum(-1)
    np.fill_diagonal(distances, np.inf)
    return precision_at_k(y, y[np.argsort(distances, 1)[:, :16]])


@pytest.mark.parametrize(
    ("loss", "gap_share", "ratio_share", "expected"),
    [
        ("proxy", 0.825, 1.0, (1.85, 2.5, 0.0)),
        ("proxy", 0.7625, 1.0, (2.425, 3.25, 0.1)),
        ("proxy", 0.7, 1.0, (3.0, 4.0, 0.2)),
        ("proxy", 0.1, 1.0, (3.0, 4.0, 0.2)),
        ("proxy", 0.94, 1.0, (0.792, 1.12, 0.0)),
        ("npairs", 0.825, 1.0, (0.5, 2.5, 0.0)),
        ("triplet", 0.825, 1.0, (1.5, 2.5, 0.0)),
        # By the distances alone, and by what says more.
        ("proxy", 1.0, 1.2, (1.85, 2.5, 0.0)),
        ("proxy", 1.2, 2.0, (3.0, 4.0, 0.2)),
        ("proxy", 0.94, 1.25, (2.425, 3.25, 0.1)),
        ("proxy", 0.7625, 1.15, (2.425, 3.25, 0.1)),
    ],
)
def test_weights_rise_where_scores_of_a_gallery_are_closer_or_classes_less_apart(
    loss, gap_share, ratio_share, expected
):
    names = ("hidden_weight", "embedding_weight", "epsilon")
    found = resolve_gallery(loss, gap_share, ratio_share)
    assert found == pytest.approx(dict(zip(names, expected, strict=True)))


@pytest.mark.parametrize(("gap_share", "ratio_share"), [(0.95, 1.1), (1.0, 1.0), (1.2, 0.5)])
def test_weights_stay_where_they_are_as_far_apart(gap_share, ratio_share):
    assert resolve_gallery("proxy", gap_share, ratio_share) is None


def test_gaps_are_of_the_two_best_buckets_of_each_level():
    level_scores = np.array([[[0.9, 0.1, 0.5], [0.3, 0.7, -1]], [[0.5, 0.5, 0.2], [0.2, 0.8, 0]]])
    assert mean_score_gap(level_scores) == pytest.approx((0.7, 0.1))


def test_the_gap_is_that_of_held_out_items(encoder, parts):
    X, y = parts["train"]
    # The hold-out that `fit` made.
    split_seed = check_random_state(0).randint(np.iinfo(np.int32).max, size=3)[0]
    held_out = split_validation(y, encoder.validation_fraction, np.random.default_rng(split_seed))[1]
    expected = mean_score_gap(encoder.level_scores(X[held_out]))
    assert encoder.score_gap_ == pytest.approx(expected, rel=1e-6)
    known, others = (mean_score_gap(encoder.level_scores(parts[name][0])) for name in ("known", "others"))
    assert encoder.score_gap_[0] == pytest.approx(known[0], rel=0.05)
    assert others[0] < 0.7 * encoder.score_gap_[0]


def test_the_distance_ratio_is_that_of_held_out_items_too(encoder, parts):
    X, y = parts["train"]
    split_seed = check_random_state(0).randint(np.iinfo(np.int32).max, size=3)[0]
    train, held_out = split_validation(y, encoder.validation_fraction, np.random.default_rng(split_seed))
    embedding = encoder.embed(X)
    means = np.array([embedding[train][y[train] == c].mean(0) for c in range(N_KNOWN)])
    np.testing.assert_allclose(encoder.class_means_, means, atol=1e-5)
    nearest = np.sort(np.linalg.norm(embedding[held_out][:, None] - means[None], axis=2), 1)
    ratios = nearest[:, 0] / nearest[:, 1]
    expected = ratios.mean(), ratios.std(ddof=1) / len(ratios) ** 0.5
    assert encoder.distance_ratio_ == pytest.approx(expected, rel=1e-4)
    known, others = (
        mean_distance_ratio(encoder.embed(parts[name][0]), means) for name in ("known", "others")
    )
    assert known[0] < 1.1 * encoder.distance_ratio_[0] < 1.3 * encoder.distance_ratio_[0] < others[0]


def test_a_distance_ratio_of_items_at_a_mean_is_zero():
    means = np.array([[0.0, 0], [1, 0]], dtype=np.float32)
    assert mean_distance_ratio(np.array([[0.0, 0], [1, 0]]), means) == (0.0, 0.0)
    assert mean_distance_ratio(np.array([[0.0, 0], [0.25, 0]]), means) == pytest.approx((1 / 6, 1 / 6))
    # Two classes in one place tell nothing.
    assert mean_distance_ratio(np.zeros((2, 2)), np.zeros((2, 2))) == (0.0, 0.0)


def test_the_metric_stages_network_notices_other_classes_where_the_hash_stages_is_sure(
    encoder, parts, monkeypatch
):
    monkeypatch.setattr(encoder, "score_gap_", (0.1, 0.0))
    assert encoder.gallery_of(parts["others"][0]).hidden_weight == 3
    assert encoder.gallery_of(parts["known"][0]) is None
    mean = encoder.distance_ratio_[0]
    # A reference that is as uncertain as this says nothing.
    monkeypatch.setattr(encoder, "distance_ratio_", (mean, mean))
    assert encoder.gallery_of(parts["others"][0]) is None


def test_known_classes_ask_for_nothing(encoder, parts):
    for name in ("train", "known"):
        X = parts[name][0]
        assert encoder.gallery_of(X) is None
        index = HierarchicalHashIndex(FrozenEstimator(encoder)).fit(X)
        assert index.gallery_ is None
        np.testing.assert_array_equal(index.embed(X), encoder.embed(X))


def test_other_classes_ask_for_an_embedding_that_ranks_them_better(encoder, parts):
    X, y = parts["others"]
    gallery = encoder.gallery_of(X)
    assert gallery.hidden_weight > 0.7
    assert_same(gallery, encoder.gallery_of(X))
    before, suited = encoder.embed(X), encoder.embed(X, gallery)
    assert suited.shape == before.shape
    np.testing.assert_array_equal(encoder.embed(X), before)
    described = encoder.describe(X, gallery)
    np.testing.assert_array_equal(described[0], suited)
    for mine, usual in zip(described[1:], encoder.describe(X)[1:], strict=True):
        np.testing.assert_array_equal(mine, usual)

    assert precision(suited, y) > precision(before, y) + 0.02


@pytest.mark.parametrize("loss", ["npairs", "triplet"])
def test_the_papers_losses_ask_for_it_too(loss, parts):
    encoder = HierarchicalHashEncoder(**PARAMETERS, loss=loss).fit(*parts["train"])
    assert encoder.gallery_of(parts["known"][0]) is None
    X, y = parts["others"]
    gallery = encoder.gallery_of(X)
    assert gallery.hidden_weight > (0.5 if loss == "npairs" else 1.5)
    assert gallery.epsilon > 0.1
    before, suited = encoder.embed(X), encoder.embed(X, gallery)
    assert precision(suited, y) > precision(before, y) + 0.02


def test_axes_are_those_of_the_gallery_at_its_weight(encoder, parts):
    X = parts["others"][0]
    gallery = encoder.gallery_of(X)
    np.testing.assert_array_equal(gallery.axes, encoder._model.gallery_axes(X, gallery.hidden_weight))
    with pytest.raises(ValueError, match="gallery of this encoder"):
        encoder._model.embed(X, gallery.axes[1:])


def test_an_index_ranks_by_the_gallery_of_its_items(encoder, index, parts):
    X = parts["others"][0]
    assert_same(index.gallery_, encoder.gallery_of(X))
    items = index.embed(X)
    np.testing.assert_array_equal(items, encoder.embed(X, index.gallery_))
    distances, positions = index.kneighbors(X[:20])
    expected = np.linalg.norm(items[:20, None] - items[positions], axis=-1)
    np.testing.assert_allclose(distances, expected, atol=1e-5)
    spread = np.square(items - items.mean(0)).sum(1).mean()
    scale = index._items.centroids._scale
    assert scale**2 * spread == pytest.approx(index.gallery_.embedding_weight, rel=1e-4)
    epsilons = (None, index.gallery_.epsilon, 0.0)
    opened = [index.kneighbors(X, epsilon=e, return_stats=True)[2].leaves_opened for e in epsilons]
    assert opened[0] == opened[1] > opened[2] == len(X)


def test_an_index_that_fits_its_encoder_does_not_ask(parts, monkeypatch):
    monkeypatch.setattr(HierarchicalHashEncoder, "gallery_of", None)
    index = HierarchicalHashIndex(HierarchicalHashEncoder(**PARAMETERS)).fit(*parts["train"])
    assert index.gallery_ is None


def test_the_encoder_of_an_index_says_the_same_as_before(encoder, index, parts):
    assert index.encoder_.gallery_of(parts["known"][0]) is None
    assert_same(index.encoder_.gallery_of(parts["others"][0]), index.gallery_)


@pytest.mark.parametrize(
    ("parameters", "has_gap"),
    [
        ({"branching_factor": 1, "n_levels": 1}, False),
        ({"validation_fraction": 0.0}, False),
        ({"hash_epochs": 0}, False),
        ({"hidden_weight": 0.7}, True),
    ],
)
def test_what_says_nothing_of_a_gallery(parameters, has_gap, parts):
    encoder = HierarchicalHashEncoder(**PARAMETERS | {"metric_epochs": 1, "hash_epochs": 1} | parameters)
    encoder.fit(*parts["train"])
    assert (encoder.score_gap_ is not None) == has_gap
    assert encoder.gallery_of(parts["others"][0]) is None


def test_a_weight_that_is_set_after_fit_says_nothing_either(encoder, parts):
    same = pickle.loads(pickle.dumps(encoder)).set_params(hidden_weight=0.7)
    assert same.gallery_of(parts["others"][0]) is None


def test_few_items_and_pickles_of_before_say_nothing(encoder, parts):
    X = parts["others"][0]
    assert encoder.gallery_of(X[:15]) is None
    earlier = pickle.loads(pickle.dumps(encoder))
    del earlier.distance_ratio_
    assert earlier.gallery_of(X) is not None
    del earlier.score_gap_
    assert earlier.gallery_of(X) is None
    # All scores alike.
    earlier.score_gap_ = (0.0, 0.0)
    assert earlier.gallery_of(X) is None


@pytest.mark.parametrize(("error", "n_items", "asks"), [(0, 20, False), (0, 400, True), (0.04, 400, False)])
def test_a_difference_within_two_standard_errors_says_nothing(
    error, n_items, asks, encoder, parts, monkeypatch
):
    # Four of five items have the gap of held-out ones, one has not: 0.9 of it on average.
    def level_scores(self, X):
        scores = np.zeros((len(X), 2, 64))
        scores[:, :, 0] = np.where(np.arange(len(X)) % 5 == 0, 0.25, 0.5)[:, None]
        return scores

    monkeypatch.setattr(encoder, "score_gap_", (1.0, error))
    monkeypatch.setattr(encoder, "distance_ratio_", None)
    monkeypatch.setattr(type(encoder._model), "level_scores", level_scores)
    assert (encoder.gallery_of(parts["others"][0][:n_items]) is not None) == asks


@pytest.mark.parametrize("shared_trunk", [True, "frozen"])
def test_a_shared_trunk_serves_both_still(parts, shared_trunk):
    encoder = HierarchicalHashEncoder(**PARAMETERS, shared_trunk=shared_trunk).fit(*parts["train"])
    X = parts["others"][0]
    gallery = encoder.gallery_of(X)
    embedding, level_scores, _ = encoder.describe(X, gallery)
    np.testing.assert_allclose(embedding, encoder.embed(X, gallery), atol=1e-5)
    np.testing.assert_allclose(level_scores, encoder.level_scores(X), atol=1e-5)
    assert np.abs(embedding - encoder.embed(X)).max() > 0.01


def test_some_items_of_many_are_looked_at(encoder, parts, monkeypatch):
    X = parts["others"][0]
    monkeypatch.setattr(hqsearch.description, "_MOST_ASKED", 60)
    monkeypatch.setattr(hqsearch.description, "_MOST_LOOKED_AT", 100)
    seen = []
    model = type(encoder._model)
    for name in ("level_scores", "gallery_axes"):
        method = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda self, X, *more, method=method: seen.append(len(X)) or method(self, X, *more)
        )
    first, second = (encoder.gallery_of(X) for _ in range(2))
    assert seen == [60, 100] * 2
    assert_same(first, second)


def test_it_survives_saving_and_pickling(encoder, index, parts, tmp_path):
    X = parts["others"][0]
    index.save(tmp_path / "index")
    for copied in (
        HierarchicalHashIndex.load(tmp_path / "index"),
        HierarchicalHashIndex.load(tmp_path / "index", mmap_mode="r"),
        # One that the caller has already.
        HierarchicalHashIndex.load(tmp_path / "index", encoder=encoder),
        pickle.loads(pickle.dumps(index)),
    ):
        assert_same(copied.gallery_, index.gallery_)
        for mine, theirs in zip(index.kneighbors(X[:30]), copied.kneighbors(X[:30]), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(copied.encoder_.embed(X[:30]), encoder.embed(X[:30]))


def test_indexes_of_before_have_none(index, parts):
    X = parts["known"][0]
    earlier = pickle.loads(pickle.dumps(HierarchicalHashIndex(index.encoder).fit(X)))
    del earlier.gallery_
    np.testing.assert_array_equal(earlier.kneighbors(X[:5])[1][:, 0], np.arange(5))
    assert earlier.embed(X[:5]).shape == (5, 16)


def test_frames_and_lists_are_galleries_too(encoder, parts):
    X = parts["others"][0]
    expected = encoder.gallery_of(X)
    assert_same(encoder.gallery_of(X.tolist()), expected)
    names = [f"pixel{i}" for i in range(X.shape[1])]
    frame = pd.DataFrame(parts["train"][0], columns=names)
    named = HierarchicalHashEncoder(**PARAMETERS).fit(frame, parts["train"][1])
    assert_same(named.gallery_of(pd.DataFrame(X, columns=names)), expected)


class Prepared(HierarchicalHashEncoder):
    """Takes images, and passes them on as rows."""

    def fit(self, X, y):
        return super().fit(X.reshape(len(X), -1), y)

    def level_scores(self, X):
        return super().level_scores(X.reshape(len(X), -1))

    def describe(self, X, gallery=None):
        return super().describe(X.reshape(len(X), -1), gallery)


class Wrapped(BaseEstimator):
    """Prepares items, and passes all else on to an encoder."""

    def __init__(self, inner):
        self.inner = inner

    def fit(self, X, y):
        return self

    def describe(self, X):
        return self.inner.describe(X[:, ::-1])

    def __sklearn_is_fitted__(self):
        return True

    def __getattr__(self, name):
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def test_encoders_that_prepare_their_items_are_not_asked(encoder, parts):
    X = parts["others"][0]
    images = {name: (items.reshape(-1, 8, 8), y) for name, (items, y) in parts.items()}
    prepared = Prepared(**PARAMETERS).fit(*images["train"])
    index = HierarchicalHashIndex(FrozenEstimator(prepared)).fit(images["others"][0])
    assert index.gallery_ is None
    wrapped = HierarchicalHashIndex(FrozenEstimator(Wrapped(encoder))).fit(X[:, ::-1])
    assert wrapped.gallery_ is None
    np.testing.assert_array_equal(wrapped._describe(X[:5, ::-1])[0], encoder.embed(X[:5]))


def test_an_interrupted_question_loses_no_fit(parts, monkeypatch):
    def interrupt(level_scores):
        raise KeyboardInterrupt

    monkeypatch.setattr(hqsearch.fitting, "mean_score_gap", interrupt)
    encoder = HierarchicalHashEncoder(**PARAMETERS | {"metric_epochs": 1, "hash_epochs": 1})
    with pytest.warns(UserWarning, match="interrupted after both stages"):
        encoder.fit(*parts["train"])
    assert encoder.score_gap_ is None
    assert encoder.embed(parts["known"][0]).shape[1] == 16


@pytest.mark.parametrize("spoil", [lambda X: X[:, :-1], lambda X: np.where(X > 15, np.nan, X)])
def test_a_gallery_that_does_not_fit_is_refused(spoil, encoder, parts):
    with pytest.raises(ValueError, match=r"features|NaN"):
        encoder.gallery_of(spoil(parts["others"][0]))
