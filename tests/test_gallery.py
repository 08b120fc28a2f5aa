"""Embeddings that suit a gallery: among items of other classes the hidden layer counts more."""

import pickle

import numpy as np
import pytest
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_random_state

import hqsearch.encoder
from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.codes import leaf_confidences
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


@pytest.mark.parametrize(
    ("hidden_weight", "loss", "confidence_share", "expected"),
    [
        ("auto", "proxy", 1.2, (0.7, 1.0)),
        ("auto", "proxy", 0.97, (0.7, 1.0)),
        ("auto", "proxy", 0.91, (1.85, 2.5)),
        ("auto", "proxy", 0.85, (3.0, 4.0)),
        ("auto", "proxy", 0.1, (3.0, 4.0)),
        ("auto", "npairs", 0.1, (0.0, 1.0)),
        ("auto", "triplet", 0.1, (0.0, 1.0)),
        (0.7, "proxy", 0.1, (0.7, 1.0)),
        (2.0, "triplet", 0.1, (2.0, 1.0)),
    ],
)
def test_weights_rise_where_a_gallery_is_less_sure(hidden_weight, loss, confidence_share, expected):
    assert resolve_gallery(hidden_weight, loss, confidence_share) == pytest.approx(expected)


def test_confidence_is_the_probability_of_the_best_leaf():
    probabilities = np.array([[[0.9, 0.1], [0.3, 0.7]], [[0.5, 0.5], [0.2, 0.8]]])
    np.testing.assert_allclose(leaf_confidences(np.log(probabilities)), [0.63, 0.4])


def test_known_classes_keep_the_embedding(encoder, parts):
    for name in ("train", "known"):
        assert encoder.for_gallery(parts[name][0]) is encoder


def test_confidence_is_that_of_held_out_items(encoder, parts):
    known, others = (
        leaf_confidences(encoder.level_scores(parts[name][0])).mean() for name in ("known", "others")
    )
    assert encoder.confidence_ == pytest.approx(known, abs=0.03)
    assert others < 0.9 * encoder.confidence_
    # The hold-out that `fit` made.
    X, y = parts["train"]
    split_seed = check_random_state(0).randint(np.iinfo(np.int32).max, size=3)[0]
    held_out = split_validation(y, encoder.validation_fraction, np.random.default_rng(split_seed))[1]
    expected = leaf_confidences(encoder.level_scores(X[held_out])).mean()
    assert encoder.confidence_ == pytest.approx(expected, rel=1e-6)


def test_other_classes_get_an_embedding_of_the_same_networks(encoder, parts):
    X, y = parts["others"]
    before = encoder.embed(X)
    other = encoder.for_gallery(X)
    assert other is not encoder
    np.testing.assert_array_equal(encoder.embed(X), before)
    np.testing.assert_array_equal(other.level_scores(X), encoder.level_scores(X))
    np.testing.assert_array_equal(other.embed(X), encoder.for_gallery(X).embed(X))
    assert other.embed(X).shape == before.shape

    def precision(embedding):
        distances = np.square(embedding[:, None] - embedding[None]).sum(-1)
        np.fill_diagonal(distances, np.inf)
        return precision_at_k(y, y[np.argsort(distances, 1)[:, :16]])

    assert precision(other.embed(X)) > precision(before) + 0.02


def test_the_hidden_layer_weighs_what_the_confidence_says(encoder, parts):
    X = parts["others"][0]
    model = encoder._model
    near, far = (model.with_hidden_weight(X, weight).embed(X) for weight in (3.0, 0.7))
    suited = encoder.for_gallery(X).embed(X)
    assert np.abs(suited - near).max() < np.abs(suited - far).max()


def test_an_index_of_a_frozen_encoder_takes_it(encoder, parts):
    X = parts["others"][0]
    index = HierarchicalHashIndex(FrozenEstimator(encoder), n_neighbors=3).fit(X)
    suited = encoder.for_gallery(X)
    distances, positions = index.kneighbors(X[:20])
    items = suited.embed(X)
    expected = np.linalg.norm(items[:20, None] - items[positions], axis=-1)
    np.testing.assert_allclose(distances, expected, atol=1e-5)
    known = HierarchicalHashIndex(FrozenEstimator(encoder)).fit(parts["known"][0])
    np.testing.assert_array_equal(known.encoder_.embed(X), encoder.embed(X))


def test_leaves_are_ranked_by_the_embedding_more(encoder, parts):
    assert encoder.embedding_weight_ == 1
    for name, weighs_more in (("known", False), ("others", True)):
        X = parts[name][0]
        index = HierarchicalHashIndex(FrozenEstimator(encoder)).fit(X)
        weight = index.encoder_.embedding_weight_
        assert (weight > 1) == weighs_more
        embedding = index.encoder_.embed(X)
        spread = np.square(embedding - embedding.mean(0)).sum(1).mean()
        assert index._items.centroids._scale**2 * spread == pytest.approx(weight, rel=1e-4)


def test_a_difference_within_two_standard_errors_says_nothing(encoder, parts, monkeypatch):
    # Four of five items are sure, one is not: 0.93 of the held-out items' confidence.
    sure, unsure = encoder.confidence_, 0.65 * encoder.confidence_

    def level_scores(self, X):
        confidences = np.where(np.arange(len(X)) % 5 == 0, unsure, sure)
        scores = np.full((len(X), 2, 64), -9.0)
        scores[:, :, 0] = np.log(confidences)[:, None] / 2
        return scores

    monkeypatch.setattr(HierarchicalHashEncoder, "level_scores", level_scores)
    X = parts["others"][0]
    assert encoder.for_gallery(X[:20]) is encoder
    assert encoder.for_gallery(X[:400]) is not encoder


def test_an_index_that_fits_its_encoder_keeps_its_embedding(parts, monkeypatch):
    monkeypatch.delattr(HierarchicalHashEncoder, "for_gallery")
    index = HierarchicalHashIndex(HierarchicalHashEncoder(**PARAMETERS)).fit(*parts["train"])
    assert index.kneighbors(parts["known"][0][:2])[1].shape == (2, 5)


@pytest.mark.parametrize(
    ("parameters", "has_confidence"),
    [
        ({"loss": "npairs"}, False),
        ({"loss": "triplet"}, False),
        ({"validation_fraction": 0.0}, False),
        ({"hash_epochs": 0}, False),
        ({"hidden_weight": 0.7}, True),
    ],
)
def test_what_says_nothing_of_a_gallery_leaves_it(parameters, has_confidence, parts):
    encoder = HierarchicalHashEncoder(**PARAMETERS | {"metric_epochs": 1, "hash_epochs": 1} | parameters)
    encoder.fit(*parts["train"])
    assert (encoder.confidence_ is not None) == has_confidence
    assert encoder.for_gallery(parts["others"][0]) is encoder


def test_few_items_and_folders_of_before_leave_it(encoder, parts):
    X = parts["others"][0]
    assert encoder.for_gallery(X[:15]) is encoder
    earlier = pickle.loads(pickle.dumps(encoder))
    del earlier.confidence_
    assert earlier.for_gallery(X) is earlier


def test_a_shared_trunk_serves_both_still(parts):
    encoder = HierarchicalHashEncoder(**PARAMETERS, shared_trunk=True).fit(*parts["train"])
    X = parts["others"][0]
    other = encoder.for_gallery(X)
    assert other is not encoder
    embedding, level_scores, _ = other.describe(X)
    np.testing.assert_allclose(embedding, other.embed(X), atol=1e-5)
    np.testing.assert_allclose(level_scores, encoder.level_scores(X), atol=1e-5)


def test_a_few_items_of_many_are_asked(encoder, parts, monkeypatch):
    monkeypatch.setattr(hqsearch.encoder, "_MOST_ASKED", 60)
    monkeypatch.setattr(hqsearch.encoder, "_MOST_FOR_AXES", 100)
    asked = []
    level_scores = HierarchicalHashEncoder.level_scores
    monkeypatch.setattr(
        HierarchicalHashEncoder, "level_scores", lambda self, X: asked.append(len(X)) or level_scores(self, X)
    )
    X = parts["others"][0]
    first, second = (encoder.for_gallery(X) for _ in range(2))
    assert asked == [60, 60]
    np.testing.assert_array_equal(first.embed(X), second.embed(X))


def test_indexes_of_other_classes_survive_saving(encoder, parts, tmp_path):
    X = parts["others"][0]
    index = HierarchicalHashIndex(FrozenEstimator(encoder)).fit(X)
    index.save(tmp_path / "index")
    for copied in (HierarchicalHashIndex.load(tmp_path / "index"), pickle.loads(pickle.dumps(index))):
        for mine, theirs in zip(index.kneighbors(X[:30]), copied.kneighbors(X[:30]), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(copied.encoder.estimator.embed(X[:30]), encoder.embed(X[:30]))


@pytest.mark.parametrize("spoil", [lambda X: X[:, :-1], lambda X: np.where(X > 15, np.nan, X)])
def test_a_gallery_that_does_not_fit_is_refused(spoil, encoder, parts):
    with pytest.raises(ValueError, match=r"features|NaN"):
        encoder.for_gallery(spoil(parts["others"][0]))
