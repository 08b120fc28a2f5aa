"""HierarchicalHashIndex: the customer's three uses, and what users of neighbours search expect."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from plain_encoder import PlainEncoder
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.metrics import retrieval_scorers


def make_encoder(**parameters):
    return HierarchicalHashEncoder(**{"metric_epochs": 8, "hash_epochs": 8, "random_state": 0} | parameters)


@pytest.fixture(scope="module")
def encoder(digits):
    X, y, *_ = digits
    return make_encoder(metric_epochs=15, hash_epochs=15).fit(X, y)


@pytest.fixture(scope="module")
def index(encoder, digits):
    X, y, *_ = digits
    return HierarchicalHashIndex(FrozenEstimator(encoder)).fit(X, y)


@pytest.mark.parametrize("form", [np.asarray, np.ndarray.tolist, pd.DataFrame])
def test_fit_never_describes_more_than_a_block_of_items_at_once(digits, encoder, monkeypatch, form):
    X, y, X_query, _ = digits
    whole = HierarchicalHashIndex(FrozenEstimator(encoder)).fit(form(X), y)
    sizes = []
    describe = HierarchicalHashEncoder.describe
    monkeypatch.setattr(
        HierarchicalHashEncoder, "describe", lambda self, X: sizes.append(len(X)) or describe(self, X)
    )
    monkeypatch.setattr("hqsearch.index.ITEM_BLOCK", 128)
    blocks = HierarchicalHashIndex(FrozenEstimator(encoder)).fit(form(X), y)
    assert sizes == [128, 128, 128, 128, 88]
    for found, expected in zip(blocks.kneighbors(X_query), whole.kneighbors(X_query), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(blocks.kneighbors(n_probes=4), whole.kneighbors(n_probes=4), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.fixture
def grid_points():
    rng = np.random.default_rng(0)
    return rng.uniform(-0.5, 3.5, (300, 2)), rng.uniform(-0.5, 3.5, (40, 2))


def test_a_pipeline_may_end_in_an_index(digits):
    X, y, X_query, y_query = digits
    pipe = Pipeline([("scale", StandardScaler()), ("index", HierarchicalHashIndex(make_encoder()))])
    pipe.fit(X, y)
    assert pipe.score(X_query, y_query) > 0.8
    assert pipe.transform(X_query).shape == (len(X_query), len(X))
    distances, positions = pipe[-1].kneighbors(pipe[:-1].transform(X_query))
    assert np.mean(y[positions] == y_query[:, None]) == pytest.approx(pipe.score(X_query, y_query))
    assert (np.diff(distances, axis=1) >= 0).all()


@pytest.mark.parametrize("cached", [False, True])
def test_a_grid_search_over_sparsity_trains_the_metric_stage_once_per_fold_with_memory(
    digits, tmp_path, monkeypatch, cached
):
    X, y, *_ = digits
    from hqsearch.embedding.training import MetricStage

    runs = []
    run = MetricStage.run
    monkeypatch.setattr(MetricStage, "run", lambda stage: runs.append(1) or run(stage))
    encoder = make_encoder(metric_epochs=3, hash_epochs=3, memory=str(tmp_path) if cached else None)
    search = GridSearchCV(
        HierarchicalHashIndex(encoder), {"sparsity": [1, 2, 3]}, cv=2, refit=False, error_score="raise"
    ).fit(X, y)
    assert len(runs) == (2 if cached else 6)
    assert (search.cv_results_["mean_test_score"] > 0.5).all()


def test_a_grid_search_may_use_the_retrieval_scorers(digits):
    X, y, *_ = digits
    search = GridSearchCV(
        HierarchicalHashIndex(make_encoder(metric_epochs=3, hash_epochs=3)),
        {"sparsity": [1, 4]},
        scoring=retrieval_scorers(),
        refit="precision_at_1",
        cv=2,
        error_score="raise",
    ).fit(X, y)
    assert search.best_params_["sparsity"] == search.best_estimator_.encoder_.sparsity
    assert (search.cv_results_["mean_test_suf"] >= 1).all()


def test_a_script_asks_an_index_for_neighbours(index, digits):
    _X, y, X_query, y_query = digits
    distances, positions = index.kneighbors(X_query)
    assert distances.shape == positions.shape == (len(X_query), 5)
    assert distances.dtype == np.float32
    assert positions.dtype == np.int64
    assert index.score(X_query, y_query) == np.mean(y[positions] == y_query[:, None])
    positions = index.kneighbors(X_query, n_probes=8, return_distance=False)
    fewer = index.kneighbors(X_query, 3, n_probes=8, return_distance=False)
    np.testing.assert_array_equal(fewer, positions[:, :3])


def test_an_index_feeds_a_classifier_of_precomputed_neighbours(digits, index, encoder):
    X, y, X_query, y_query = digits
    model = make_pipeline(
        HierarchicalHashIndex(FrozenEstimator(encoder), n_neighbors=5),
        KNeighborsClassifier(n_neighbors=5, metric="precomputed"),
    ).fit(X, y)
    assert model.score(X_query, y_query) > 0.85
    np.testing.assert_allclose(index.fit_transform(X, y).diagonal(), 0)


def test_opening_every_leaf_is_exhaustive_search(index, encoder, digits):
    X, _, X_query, _ = digits
    exact = NearestNeighbors(n_neighbors=7, algorithm="brute").fit(encoder.embed(X))
    distances, positions = exact.kneighbors(encoder.embed(X_query))
    found_distances, found_positions = index.kneighbors(X_query, 7, n_probes=4096)
    np.testing.assert_allclose(found_distances, distances, rtol=1e-4, atol=1e-5)
    assert np.mean(found_positions == positions) > 0.999


def test_rows_are_always_full(index, digits):
    X, _, X_query, _ = digits
    for n_neighbors in (1, 100, len(X)):
        _, positions = index.kneighbors(X_query[:20], n_neighbors)
        assert (np.sort(positions, 1)[:, 1:] != np.sort(positions, 1)[:, :-1]).all()
        assert positions.min() >= 0
    assert (np.sort(positions, 1) == np.arange(len(X))).all()


def test_fitted_items_search_without_themselves(index, digits):
    X, *_ = digits
    _distances, positions = index.kneighbors()
    assert (positions != np.arange(len(X))[:, None]).all()
    _, with_self = index.kneighbors(X, 6)
    others = [row[row != i][:5] for i, row in enumerate(with_self)]
    # Beyond an item's own leaves the order of leaves rests on mean scores, so a few rows may differ.
    assert np.mean(positions == np.array(others)) > 0.97
    assert index.kneighbors(n_neighbors=len(X) - 1)[1].shape == (len(X), len(X) - 1)


def test_graphs_are_scikit_learns(index, digits):
    X_query = digits[2]
    distances, positions = index.kneighbors(X_query)
    connected = index.kneighbors_graph(X_query)
    assert (connected.data == 1).all()
    np.testing.assert_array_equal(connected.indices.reshape(-1, 5), positions)
    weighted = index.kneighbors_graph(X_query, mode="distance")
    np.testing.assert_array_equal(weighted.data.reshape(-1, 5), distances)
    assert index.transform(X_query).nnz == 6 * len(X_query)
    clone(index).set_params(mode="connectivity")
    with pytest.raises(ValueError, match="Expected mode to be 'connectivity' or 'distance', got 'weights'"):
        index.kneighbors_graph(X_query, mode="weights")


def test_a_frozen_encoder_needs_no_y_and_is_left_as_it_is(encoder, digits):
    X, _, X_query, y_query = digits
    index = HierarchicalHashIndex(FrozenEstimator(encoder), sparsity=3).fit(X)
    assert index.labels_ is None
    assert index.encoder_.encode(X_query).shape == (len(X_query), 3)
    assert encoder.sparsity == 1
    np.testing.assert_array_equal(index.encoder_.embed(X_query), encoder.embed(X_query))
    with pytest.raises(ValueError, match="fitted with y, but labels_ is None"):
        index.score(X_query, y_query)


def test_an_encoder_is_cloned_and_overridden(digits):
    X, y, *_ = digits
    encoder = make_encoder(metric_epochs=1, hash_epochs=1)
    index = HierarchicalHashIndex(encoder, sparsity=2, random_state=5).fit(X, y)
    assert not hasattr(encoder, "classes_")
    assert (index.encoder_.sparsity, index.encoder_.random_state) == (2, 5)
    assert index.get_params()["encoder__metric_epochs"] == 1


def test_any_estimator_of_the_protocol_is_searched(grid_encoder, grid_points):
    X, X_query = grid_points
    index = HierarchicalHashIndex(grid_encoder(), n_neighbors=4).fit(X)
    _, found, stats = index.kneighbors(X_query, n_probes=9, return_stats=True)
    exact = NearestNeighbors(n_neighbors=4).fit(X).kneighbors(X_query, return_distance=False)
    assert np.mean(found == exact) > 0.97
    assert stats.distances < len(X) * len(X_query)


def test_probes_and_stats_belong_to_the_call(index, digits):
    X_query = digits[2]
    before = index.search_stats_
    _, _, narrow = index.kneighbors(X_query, n_probes=1, return_stats=True)
    _, _, wide = index.kneighbors(X_query, n_probes=4, return_stats=True)
    assert narrow.n_queries == wide.n_queries == len(X_query)
    assert narrow.distances < wide.distances
    assert narrow.suf() > wide.suf()
    total = index.search_stats_
    assert total.distances == before.distances + narrow.distances + wide.distances
    assert index.suf() == total.suf()


def test_threads_may_search_at_once(index, digits):
    X_query = digits[2]
    expected = index.kneighbors(X_query)[1]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: index.kneighbors(X_query)[1], range(8)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("n_jobs", [1, 2, -1])
def test_neighbours_do_not_depend_on_n_jobs(encoder, index, digits, n_jobs):
    X, y, X_query, _ = digits
    other = HierarchicalHashIndex(FrozenEstimator(encoder), n_jobs=n_jobs).fit(X, y)
    for found, expected in zip(other.kneighbors(X_query), index.kneighbors(X_query), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_labels_may_be_strings(encoder, digits):
    X, y, X_query, y_query = digits
    index = HierarchicalHashIndex(FrozenEstimator(encoder)).fit(X, y.astype(str))
    assert index.score(X_query, y_query.astype(str)) > 0.85


def test_pickle_clone_and_set_output(index, digits):
    X_query = digits[2]
    back = pickle.loads(pickle.dumps(index))
    for found, expected in zip(back.kneighbors(X_query), index.kneighbors(X_query), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not hasattr(clone(index), "encoder_")
    np.testing.assert_array_equal(
        index.set_output(transform="default").transform(X_query).data, back.transform(X_query).data
    )
    assert len(index.get_feature_names_out()) == index.n_samples_fit_


@pytest.mark.parametrize(
    ("n_neighbors", "error", "message"),
    [
        (601, ValueError, "n_neighbors <= n_samples_fit, but n_neighbors = 601, n_samples_fit = 600"),
        (0, ValueError, "Expected n_neighbors > 0, but n_neighbors = 0"),
        (2.0, TypeError, "enter integer value"),
    ],
)
def test_a_bad_number_of_neighbours_is_refused(index, digits, n_neighbors, error, message):
    with pytest.raises(error, match=message):
        index.kneighbors(digits[2], n_neighbors)


def test_fitted_items_have_one_neighbour_less(index):
    with pytest.raises(ValueError, match="Expected n_neighbors < n_samples_fit, but n_neighbors = 600"):
        index.kneighbors(n_neighbors=600)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"encoder": StandardScaler()}, "'encoder' parameter"),
        ({"n_probes": 0}, "'n_probes' parameter"),
        ({"probing": "random"}, "'probing' parameter"),
        ({"mode": "weights"}, "'mode' parameter"),
        ({"encoder": FrozenEstimator(HierarchicalHashEncoder())}, "not fitted"),
        ({"sparsity": 65}, "sparsity = 65"),
    ],
)
def test_bad_parameters_are_refused_by_name(digits, parameters, message):
    X, y, *_ = digits
    with pytest.raises((ValueError, NotFittedError), match=message):
        HierarchicalHashIndex(**parameters).fit(X, y)


def test_bad_data_is_refused(index, digits):
    X, y, X_query, _ = digits
    with pytest.raises(ValueError, match="X has 63 features"):
        index.kneighbors(X_query[:, :63])
    with pytest.raises(ValueError, match="contains NaN"):
        index.kneighbors(X_query * np.nan)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        clone(index).fit(X, y[:-1])
    with pytest.raises(ValueError, match="requires y to be passed"):
        HierarchicalHashIndex(make_encoder()).fit(X)
    with pytest.raises(NotFittedError):
        HierarchicalHashIndex().kneighbors(X_query)


def test_a_caller_with_embeddings_of_its_own_may_search_the_table(encoder, digits):
    X, y, X_query, _ = digits
    index = HierarchicalHashIndex(FrozenEstimator(encoder), probing="best_first").fit(X, y)
    found = index.table_.search(*encoder.describe(X_query), 5)
    np.testing.assert_array_equal(found.positions, index.kneighbors(X_query)[1])


def test_labels_are_a_copy(encoder, digits):
    X, y, X_query, y_query = digits
    of_fit, of_add = y.copy(), y_query.copy()
    index = HierarchicalHashIndex(FrozenEstimator(encoder)).fit(X, of_fit)
    index.add(X_query, of_add)
    of_fit[:], of_add[:] = -1, -1
    np.testing.assert_array_equal(index.labels_, np.concatenate([y, y_query]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"embed": lambda vectors: vectors[:, 0]},
        {"embed": lambda vectors: vectors[:-1]},
        {"level_scores": lambda scores: scores[:, :1]},
        {"level_scores": lambda scores: scores[:, :, 0]},
        {"encode": lambda codes: codes[:, 0]},
        {"encode": lambda codes: codes.astype(float)},
        {"encode": lambda codes: codes[:-1]},
    ],
)
def test_what_an_encoder_may_not_say_is_refused_in_fit_and_of_queries(grid_points, wrong):
    X, X_query = (np.tile(points, 4) for points in grid_points)
    index = HierarchicalHashIndex(PlainEncoder()).fit(X)

    class Spoiled(PlainEncoder):
        def _say(self, name, X):
            return wrong.get(name, np.asarray)(getattr(PlainEncoder(), name)(X))

        def embed(self, X):
            return self._say("embed", X)

        def level_scores(self, X):
            return self._say("level_scores", X)

        def encode(self, X):
            return self._say("encode", X)

    with pytest.raises(ValueError, match="embed, level_scores and encode of Spoiled to give arrays"):
        HierarchicalHashIndex(Spoiled()).fit(X)
    index.encoder_ = Spoiled()
    with pytest.raises(ValueError, match="embed, level_scores and encode of Spoiled to give arrays"):
        index.kneighbors(X_query)


def test_an_encoder_may_give_lists_and_take_no_queries(grid_points):
    X = np.tile(grid_points[0], 4)

    class Listing(PlainEncoder):
        def describe(self, X):
            plain = PlainEncoder()
            return [part.tolist() for part in (plain.embed(X), plain.level_scores(X), plain.encode(X))]

    index = HierarchicalHashIndex(Listing()).fit(X)
    expected = HierarchicalHashIndex(PlainEncoder()).fit(X)
    np.testing.assert_array_equal(index.kneighbors(X)[1], expected.kneighbors(X)[1])
    assert expected.kneighbors(X[:0])[1].shape == (0, 5)
    distances, positions = expected.radius_neighbors(X[:0])
    assert distances.shape == positions.shape == (0,)


def test_more_probes_than_numbers_have_bits_open_all_leaves(index, digits):
    X_query = digits[2]
    stats = index.kneighbors(X_query, n_probes=10**30, return_stats=True)[2]
    assert stats.suf() == 1
