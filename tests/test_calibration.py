"""How far a query has to look, as held-out items say, and an index that takes it from its encoder."""

import pickle

import numpy as np
import pytest
from plain_encoder import PlainEncoder
from sklearn.datasets import load_digits, make_blobs
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_random_state

import hqsearch.calibration
import hqsearch.fitting
from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.calibration import EPSILONS, least_epsilon
from hqsearch.embedding import split_validation
from hqsearch.items import FittedItems

TREE = {"branching_factor": 16, "n_levels": 1}
N_CLASSES = 6


def described(n_items, seed, score_noise, embedding_noise):
    """Items of six classes around six points: embedding, level scores and codes, and their classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, N_CLASSES, n_items)
    embedding = 2 * np.eye(N_CLASSES)[y] + embedding_noise * rng.normal(size=(n_items, N_CLASSES))
    scores = np.eye(16)[y] + score_noise * rng.normal(size=(n_items, 16))
    scores = scores[:, None].astype(np.float32)
    return (embedding.astype(np.float32), scores, scores[:, 0].argmax(1)[:, None]), y


def by_definition(gallery, gallery_y, queries, query_y):
    """Least epsilon of those that are allowed, and whether it is as precise, one by one in plain numpy."""
    items = FittedItems.from_blocks([gallery], **TREE, listing="centroids")
    distances = np.linalg.norm(queries[0][:, None].astype(float) - gallery[0][None], axis=-1)
    order = np.argsort(distances, 1)
    chosen = 0.0
    for epsilon in EPSILONS:
        enough = []
        for k in (1, 16):
            found = items.search(queries, k, epsilon=epsilon)
            right = (gallery_y[found.positions] == query_y[:, None]).mean(1)
            gap = right - (gallery_y[order[:, :k]] == query_y[:, None]).mean(1)
            enough.append(gap.sum() >= -max(0.5 * gap.std() * np.sqrt(len(gap)), 1))
            if k == 1 and found.stats.suf() < N_CLASSES and epsilon > 0:
                return chosen, False
        chosen = epsilon
        if all(enough):
            return chosen, True
    return chosen, False


@pytest.mark.parametrize(
    ("score_noise", "embedding_noise", "kind"),
    [
        (0.1, 0.9, "nearest leaf"),
        (0.8, 0.5, "some"),
        # Precision at 1 decides, and then precision at 16.
        (1.5, 0.6, "some"),
        (4.0, 0.3, "some"),
        (1.2, 0.7, "some"),
    ],
)
def test_it_is_the_least_with_which_a_search_is_as_precise_as_exhaustive_search(
    score_noise, embedding_noise, kind
):
    gallery, gallery_y = described(3000, 0, score_noise, embedding_noise)
    queries, query_y = described(800, 1, score_noise, embedding_noise)
    expected, _ = by_definition(gallery, gallery_y, queries, query_y)
    found = least_epsilon(gallery, gallery_y, queries, query_y, **TREE)
    assert found == expected
    assert (found == 0) == (kind == "nearest leaf")


def test_one_query_of_few_is_no_evidence():
    found, exhaustive = np.ones((100, 1), dtype=bool), np.ones((100, 1), dtype=bool)
    found[0] = False
    assert hqsearch.calibration._is_as_precise(found, exhaustive)
    found[1] = False
    assert not hqsearch.calibration._is_as_precise(found, exhaustive)


def test_a_speedup_below_the_number_of_classes_is_no_price_to_pay(monkeypatch):
    gallery, gallery_y = described(300, 0, 3.0, 0.3)
    queries, query_y = described(800, 1, 3.0, 0.3)
    items = FittedItems.from_blocks([gallery], **TREE, listing="centroids")
    of_one, of_many, farther = (
        items.search(queries, k, epsilon=epsilon).stats.suf()
        for k, epsilon in ((1, 0.1), (16, 0.1), (1, 0.3))
    )
    # So few items that a search for 16 opens more leaves than one for the nearest.
    assert of_one > N_CLASSES > of_many > farther
    monkeypatch.setattr(hqsearch.calibration, "_is_as_precise", lambda found, exhaustive: False)
    monkeypatch.setattr(hqsearch.calibration, "EPSILONS", (0.0, 0.1, 0.3, 0.6))
    assert least_epsilon(gallery, gallery_y, queries, query_y, **TREE) == 0.1


def test_without_centroids_the_nearest_leaf_is_all():
    gallery, gallery_y = described(300, 0, 3.0, 0.3)
    gallery[1][0, 0, 0] = np.inf
    assert least_epsilon(gallery, gallery_y, gallery, gallery_y, **TREE) == 0


@pytest.fixture(scope="module")
def fitted():
    # A hash stage that has hardly begun, beside an embedding that is trained.
    X, y = make_blobs(1500, 8, centers=30, cluster_std=1.5, random_state=0)
    parameters = {"metric_epochs": 8, "hash_epochs": 1, "hash_learning_rate": 1e-4, "hash_trunk": "new"}
    parameters |= {"validation_fraction": 0.5, "device": "cpu", "random_state": 0}
    return HierarchicalHashEncoder(**parameters).fit(X, y), X, y


@pytest.mark.parametrize("sparsity", [1, 3])
def test_an_encoder_asks_the_items_that_it_holds_out(sparsity, fitted):
    encoder, X, y = fitted
    if sparsity != 1:
        encoder = HierarchicalHashEncoder(**encoder.get_params() | {"sparsity": sparsity}).fit(X, y)
    seed = int(check_random_state(0).randint(np.iinfo(np.int32).max, size=3)[0])
    train, held_out = split_validation(y, 0.5, np.random.default_rng(seed))
    shape = {"branching_factor": 64, "n_levels": 2}
    parts = [(encoder.describe(X[rows]), y[rows]) for rows in (np.sort(train), np.sort(held_out))]
    expected = least_epsilon(*parts[0], *parts[1], **shape)
    assert encoder.epsilon_ == expected
    assert (expected > 0) == (sparsity == 1)


def test_codes_of_several_leaves_open_as_many(monkeypatch):
    # What is asked of a search, whatever comes of it.
    asked = []
    search = FittedItems.search

    def spy(self, described, k, **options):
        asked.append((described[2].shape[1], options.get("n_probes")))
        return search(self, described, k, **options)

    monkeypatch.setattr(FittedItems, "search", spy)
    X, y = make_blobs(300, 8, centers=5, random_state=0)
    HierarchicalHashEncoder(metric_epochs=1, hash_epochs=1, sparsity=3, device="cpu", random_state=0).fit(
        X, y
    )
    assert set(asked) == {(3, None)}


def test_few_of_many_items_are_asked(fitted, monkeypatch):
    asked = []

    def ask(gallery, gallery_y, queries, query_y, **shape):
        asked.append((len(gallery_y), len(query_y)))
        for part, y in ((gallery, gallery_y), (queries, query_y)):
            assert [len(a) for a in part] == [len(y)] * 3
        return 0.1

    monkeypatch.setattr(hqsearch.fitting, "MOST_ITEMS", 200)
    monkeypatch.setattr(hqsearch.fitting, "MOST_QUERIES", 50)
    monkeypatch.setattr(hqsearch.fitting, "least_epsilon", ask)
    encoder = HierarchicalHashEncoder(metric_epochs=1, hash_epochs=1, device="cpu", random_state=0)
    assert encoder.fit(*fitted[1:]).epsilon_ == 0.1
    assert asked == [(200, 50)]


@pytest.mark.parametrize(
    "parameters", [{"branching_factor": 1, "n_levels": 1}, {"validation_fraction": 0.0}, {"hash_epochs": 0}]
)
def test_where_nothing_can_be_asked_it_is_zero(parameters, fitted, monkeypatch):
    monkeypatch.setattr(hqsearch.fitting, "least_epsilon", lambda *_, **__: 0.3)
    encoder = HierarchicalHashEncoder(
        **{"metric_epochs": 1, "hash_epochs": 1, "random_state": 0, "device": "cpu"} | parameters
    )
    assert encoder.fit(*fitted[1:]).epsilon_ == 0
    assert encoder.score_gap_ is encoder.distance_ratio_ is encoder.class_means_ is None


@pytest.mark.parametrize("loss", ["npairs", "triplet", "proxy"])
@pytest.mark.filterwarnings("error")
def test_an_item_beyond_all_bounds_says_nothing(loss):
    X, y = make_blobs(400, 8, centers=6, random_state=0)
    seed = int(check_random_state(0).randint(np.iinfo(np.int32).max, size=3)[0])
    held_out = split_validation(y, 0.1, np.random.default_rng(seed))[1]
    X[held_out[0]] = 1e30
    encoder = HierarchicalHashEncoder(
        loss=loss, metric_epochs=1, hash_epochs=1, device="cpu", random_state=0
    ).fit(X, y)
    known = np.array([*encoder.score_gap_, *encoder.distance_ratio_, encoder.epsilon_])
    assert np.isfinite(known).all()
    assert np.isfinite(encoder.class_means_).all()


def test_held_out_items_that_are_all_beyond_bounds_say_nothing():
    X, y = make_blobs(400, 8, centers=6, random_state=0)
    seed = int(check_random_state(0).randint(np.iinfo(np.int32).max, size=3)[0])
    X[split_validation(y, 0.1, np.random.default_rng(seed))[1]] = 1e30
    encoder = HierarchicalHashEncoder(loss="npairs", metric_epochs=1, hash_epochs=1, device="cpu")
    encoder.set_params(random_state=0).fit(X, y)
    assert encoder.score_gap_ is encoder.distance_ratio_ is encoder.class_means_ is None
    assert encoder.epsilon_ == 0


def test_ties_are_broken_as_an_index_breaks_them():
    rng = np.random.default_rng(0)
    # Two thousand items at a hundred places.
    points = rng.normal(size=(100, 4)).astype(np.float32)
    which = rng.integers(0, 100, 2000)
    queries = points[rng.integers(0, 100, 50)]
    found = hqsearch.calibration._exhaustive(points[which], queries, 5, None)
    distances = np.square(queries[:, None] - points[which][None]).sum(-1)
    np.testing.assert_array_equal(found, np.argsort(distances, 1, kind="stable")[:, :5])


def test_an_interruption_loses_no_fit(fitted, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(hqsearch.fitting, "least_epsilon", interrupt)
    encoder = HierarchicalHashEncoder(metric_epochs=1, hash_epochs=1, device="cpu", random_state=0)
    with pytest.warns(UserWarning, match="how many leaves to open"):
        encoder.fit(*fitted[1:])
    assert encoder.epsilon_ == 0
    assert encoder.score_gap_ is encoder.distance_ratio_ is encoder.class_means_ is None


def opened(index, X, **options):
    return index.kneighbors(X, return_stats=True, **options)[2].leaves_opened


def test_an_index_takes_it_from_its_encoder_where_items_are_listed_by_centroids(fitted):
    encoder, X, y = fitted
    encoder = pickle.loads(pickle.dumps(encoder))
    encoder.epsilon_ = 0.3
    index = HierarchicalHashIndex(FrozenEstimator(encoder)).fit(X, y)
    assert index.gallery_ is None
    assert index.epsilon_ == 0.3
    assert opened(index, X) == opened(index, X, epsilon=0.3) > opened(index, X, epsilon=0)
    assert opened(index, X, n_probes=2) == opened(index, X, n_probes=2, epsilon=0)
    for options in ({"listing": "codes"}, {"probing": "best_first"}):
        other = HierarchicalHashIndex(FrozenEstimator(encoder), **options).fit(X, y)
        assert other.epsilon_ == 0
        assert opened(other, X) == opened(other, X, epsilon=0)
    assert HierarchicalHashIndex(FrozenEstimator(encoder), epsilon=0.1).fit(X, y).epsilon_ == 0.1


class Rescaled(HierarchicalHashEncoder):
    """Describes items in its own way."""

    def describe(self, X, gallery=None):
        embedding, level_scores, codes = super().describe(X, gallery)
        return 2 * embedding, level_scores, codes


def test_it_counts_for_the_encoder_that_was_asked_and_its_codes_alone(fitted):
    encoder, X, y = fitted
    assert HierarchicalHashIndex(FrozenEstimator(encoder)).fit(X, y).epsilon_ == encoder.epsilon_ > 0
    # Of codes of another sparsity nobody asked.
    assert HierarchicalHashIndex(FrozenEstimator(encoder), sparsity=2).fit(X, y).epsilon_ == 0
    other = Rescaled.__new__(Rescaled)
    vars(other).update(vars(encoder))
    assert HierarchicalHashIndex(FrozenEstimator(other)).fit(X, y).epsilon_ == 0
    foreign = PlainEncoder().fit(X, y)
    foreign.epsilon_ = None
    assert HierarchicalHashIndex(FrozenEstimator(foreign)).fit(X, y).epsilon_ == 0


def test_the_larger_of_what_encoder_and_gallery_say_counts(fitted):
    X, y = load_digits(return_X_y=True)
    encoder = HierarchicalHashEncoder(
        embedding_dim=16, metric_epochs=8, hash_epochs=16, random_state=0, device="cpu"
    ).fit(X[y < 7], y[y < 7])
    others = X[y >= 7]
    index = HierarchicalHashIndex(FrozenEstimator(encoder)).fit(others)
    assert index.gallery_.epsilon == 0.2
    index.encoder_.epsilon_ = 0.1
    assert opened(index, others) == opened(index, others, epsilon=0.2)
    index.encoder_.epsilon_ = 0.4
    assert opened(index, others) == opened(index, others, epsilon=0.4) > opened(index, others, epsilon=0.2)


def test_it_is_saved_and_one_of_before_has_none(fitted, tmp_path):
    encoder, X, y = fitted
    encoder.save(tmp_path / "encoder")
    loaded = HierarchicalHashEncoder.load(tmp_path / "encoder")
    assert HierarchicalHashIndex(FrozenEstimator(loaded)).fit(X, y).epsilon_ == encoder.epsilon_ > 0
    earlier = pickle.loads(pickle.dumps(encoder))
    del earlier.epsilon_, earlier._calibrated_sparsity
    index = HierarchicalHashIndex(FrozenEstimator(earlier)).fit(X, y)
    assert opened(index, X) == opened(index, X, epsilon=0)
    earlier.save(tmp_path / "earlier")
    assert HierarchicalHashEncoder.load(tmp_path / "earlier").epsilon_ == 0
