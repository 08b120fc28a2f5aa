import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.base import BaseEstimator
from sklearn.datasets import make_blobs
from sklearn.metrics import normalized_mutual_info_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hqsearch.metrics import (
    bucket_nmi,
    precision_at_k,
    recall_at_k,
    retrieval_scorers,
    search_speedup_factor,
)


class SignEncoder:
    """A code from the signs of the first features: enough of an encoder to have buckets."""

    def encode(self, X):
        return (np.asarray(X)[:, :2] > 0) @ np.array([[2], [1]])


class ScanningIndex(BaseEstimator):
    """An index whose search is a scan of the first `n_scanned` items, with the interface the scorers use."""

    def __init__(self, n_neighbors=2, n_scanned=None):
        self.n_neighbors = n_neighbors
        self.n_scanned = n_scanned

    def fit(self, X, y=None):
        self.items_, self.labels_ = X, y
        self.n_samples_fit_ = len(X)
        self.encoder_ = SignEncoder()
        return self

    def kneighbors(self, X, n_neighbors=None, return_distance=True, return_stats=False):
        n_neighbors = n_neighbors or self.n_neighbors
        n_scanned = self.n_scanned or self.n_samples_fit_
        if n_neighbors > self.n_samples_fit_:
            raise ValueError(f"Expected n_neighbors <= n_samples_fit, but n_neighbors = {n_neighbors}")
        distances = np.linalg.norm(X[:, np.newaxis] - self.items_[:n_scanned], axis=2)
        positions = np.argsort(distances, axis=1, kind="stable")[:, :n_neighbors]
        if not return_distance:
            return positions
        total = len(X) * n_scanned
        suf = len(X) * self.n_samples_fit_ / total
        stats = SimpleNamespace(n_queries=len(X), distances=total, suf=lambda: suf)
        found = np.take_along_axis(distances, positions, axis=1), positions
        return (*found, stats) if return_stats else found


# Three queries and four neighbours each, nearest first. Right ones are marked *:
#   query a: a* b  a* c      hits among the first 1, 2, 3, 4:  1 1 2 2
#   query b: a  a  c  b*                                       0 0 0 1
#   query c: c* c* c* c*                                       1 2 3 4
Y_TRUE = np.array(["a", "b", "c"])
NEIGHBOR_LABELS = np.array([list("abac"), list("aacb"), list("cccc")])


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, 2 / 3), (2, 3 / 6), (3, 5 / 9), (4, 7 / 12), (None, 7 / 12)],
)
def test_precision_at_k_is_the_share_of_hits_counted_by_hand(k, expected):
    assert precision_at_k(Y_TRUE, NEIGHBOR_LABELS, k=k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("k", "expected"), [(1, 2 / 3), (3, 2 / 3), (4, 1.0), (None, 1.0)])
def test_recall_at_k_is_the_share_of_queries_with_a_hit_counted_by_hand(k, expected):
    assert recall_at_k(Y_TRUE, NEIGHBOR_LABELS, k=k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("measure", [precision_at_k, recall_at_k])
@pytest.mark.parametrize("as_type", [np.array, list, lambda labels: np.array(labels, dtype=object)])
def test_labels_may_be_strings_or_numbers_in_any_container(measure, as_type):
    _, as_numbers = np.unique(NEIGHBOR_LABELS, return_inverse=True)
    expected = measure(np.array([0, 1, 2]), as_numbers.reshape(3, 4), k=2)
    assert measure(as_type(Y_TRUE.tolist()), as_type(NEIGHBOR_LABELS.tolist()), k=2) == expected


def test_objects_are_compared_by_what_they_are():
    mixed = np.array([["a", 1], [2, "b"]], dtype=object)
    assert precision_at_k(np.array(["a", "b"], dtype=object), mixed) == 0.5
    assert precision_at_k(np.array([1, np.int8(2)], dtype=object), [[1, 0], [2, 0]]) == 0.5


@given(neighbor_labels=arrays(np.int64, (6, 5), elements=st.integers(0, 3)), data=st.data())
def test_recall_bounds_precision_and_grows_with_k(neighbor_labels, data):
    y_true = data.draw(arrays(np.int64, 6, elements=st.integers(0, 3)))
    recalls = [recall_at_k(y_true, neighbor_labels, k=k) for k in range(1, 6)]
    precisions = [precision_at_k(y_true, neighbor_labels, k=k) for k in range(1, 6)]
    assert recalls == sorted(recalls)
    assert recalls[0] == precisions[0]
    assert all(0 <= precision <= recall <= 1 for precision, recall in zip(precisions, recalls, strict=True))


@pytest.mark.parametrize("measure", [precision_at_k, recall_at_k])
@pytest.mark.parametrize(
    ("y_true", "neighbor_labels", "k", "message"),
    [
        ([1, 2], [[1, 1], [2, 2]], 3, "Expected k <= n_neighbors, but k = 3, n_neighbors = 2"),
        ([1, 2], [[1, 1], [2, 2]], 0, "k == 0, must be >= 1"),
        ([1, 2], [[1, 1]], 1, "inconsistent numbers of samples"),
        ([1, 2], [1, 2], 1, "Expected 2D array"),
        ([[1, 2], [1, 2]], [[1], [2]], 1, "y should be a 1d array"),
        ([1, np.nan], [[1], [2]], 1, "Input y_true contains NaN"),
        (["1", "2"], [[1], [2]], 1, "labels of the same type"),
        # As pandas has strings.
        (np.array(["1", "2"], dtype=object), [[1], [2]], 1, "labels of the same type"),
        ([True, False], np.array([["1"], ["2"]], dtype=object), 1, "labels of the same type"),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(measure, y_true, neighbor_labels, k, message):
    with pytest.raises(ValueError, match=message):
        measure(y_true, neighbor_labels, k=k)


def test_suf_is_one_over_the_mean_share_of_items_scored():
    # shares 10/200, 30/200, 20/200: mean 60/600 = 1/10
    assert search_speedup_factor([10, 30, 20], 200) == 10.0
    assert search_speedup_factor(60, 200, n_queries=3) == 10.0


def test_suf_of_an_exhaustive_scan_is_one_with_the_query_left_out():
    # five stored items that query each other: each is compared with the four others
    assert search_speedup_factor([4] * 5, n_items=4) == 1.0


def test_suf_is_infinite_when_nothing_was_scored():
    assert search_speedup_factor([0, 0], 10) == np.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_distances": 40, "n_items": 10}, "a total together with n_queries"),
        ({"n_distances": [4, 4], "n_items": 10, "n_queries": 2}, "a total together with n_queries"),
        ({"n_distances": [], "n_items": 10}, "n_queries == 0, must be >= 1"),
        ({"n_distances": 4, "n_items": 10, "n_queries": 0}, "n_queries == 0, must be >= 1"),
        ({"n_distances": [4], "n_items": 0}, "n_items == 0, must be >= 1"),
        ({"n_distances": [4, -1], "n_items": 10}, "Expected n_distances >= 0, but the smallest is -1"),
    ],
)
def test_suf_refuses_counts_that_mean_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        search_speedup_factor(**arguments)


def test_nmi_of_two_buckets_worked_by_hand():
    # buckets 5 5 5 9, labels a a b b, in bits:
    #   H(bucket) = 3/4 log2(4/3) + 1/4 log2(4) = 0.811278;  H(label) = 1
    #   H(bucket, label) = 1/2 log2(2) + 1/4 log2(4) + 1/4 log2(4) = 1.5
    #   I = 0.811278 + 1 - 1.5 = 0.311278;  NMI = 2 * 0.311278 / 1.811278 = 0.343711
    assert bucket_nmi([[5], [5], [5], [9]], list("aabb")) == pytest.approx(0.343711, abs=1e-6)


def test_nmi_counts_an_item_once_per_bucket_it_lies_in():
    # pairs (0, a) (1, a) (0, a) (1, a) (2, b) (3, b): I = H(label) = log2(3) - 2/3 = 0.918296
    #   H(bucket) = 2 * 1/3 log2(3) + 2 * 1/6 log2(6) = 1.918296;  NMI = 2 * 0.918296 / 2.836592 = 0.647464
    assert bucket_nmi([[0, 1], [1, 0], [2, 3]], list("aab")) == pytest.approx(0.647464, abs=1e-6)


def test_nmi_counts_a_bucket_named_twice_once():
    # pairs (0, a) (1, a) (2, b): I = H(label) = 0.918296, H(bucket) = log2(3); NMI = 2 * 0.918296 / 2.503258
    assert bucket_nmi([[0, 1], [2, 2]], list("ab")) == pytest.approx(2 * 0.918296 / 2.503258, abs=1e-6)


def test_nmi_is_one_when_all_share_one_bucket_and_one_label_and_zero_when_only_the_label_varies():
    assert bucket_nmi([[3], [3], [3]], [1, 1, 1]) == 1.0
    assert bucket_nmi([[3], [3], [3]], [1, 2, 3]) == 0.0


@given(codes=arrays(np.int64, (9, 1), elements=st.integers(0, 4)), data=st.data())
def test_nmi_is_sklearns_for_one_bucket_an_item_and_blind_to_renaming_and_order(codes, data):
    y = data.draw(arrays(np.int64, 9, elements=st.integers(0, 3)))
    nmi = bucket_nmi(codes, y)
    assert nmi == pytest.approx(normalized_mutual_info_score(y, codes[:, 0]), abs=1e-12)
    order = np.array(data.draw(st.permutations(range(9))))
    renamed = 2**61 - 7 * codes[order]
    assert bucket_nmi(renamed, y[order].astype(str)) == pytest.approx(nmi, abs=1e-9)
    assert bucket_nmi(np.hstack([codes, codes + 100]), y) <= 1.0


def test_nmi_never_exceeds_one_by_rounding():
    rng = np.random.default_rng(0)
    labelings = [rng.integers(0, rng.integers(2, 9), size=40) for _ in range(100)]
    assert max(bucket_nmi(y[:, np.newaxis], y) for y in labelings) <= 1.0


def test_nmi_takes_labels_that_look_like_measurements():
    assert bucket_nmi([[0], [1]], [0.5, 1.5]) == 1.0


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([0, 1], "Expected 2D array"),
        ([[0], [1], [2]], "inconsistent numbers of samples"),
        ([[0.5], [1.0]], "Expected codes to hold whole numbers"),
        ([[0], [-1]], "Expected bucket ids >= 0, but the smallest is -1"),
    ],
)
def test_nmi_refuses_what_is_not_a_table_of_bucket_ids(codes, message):
    with pytest.raises(ValueError, match=message):
        bucket_nmi(codes, [0, 1])


def blobs():
    X, y = make_blobs(n_samples=80, centers=4, n_features=3, cluster_std=3.0, random_state=0)
    return X, np.array(["a", "b", "c", "d"])[y]


def test_scorers_give_what_the_metrics_give():
    X, y = blobs()
    index = ScanningIndex(n_scanned=30).fit(X[:60], y[:60])
    queries, labels = X[60:], y[60:]
    scores = {name: scorer(index, queries, labels) for name, scorer in retrieval_scorers().items()}
    for k in (1, 4, 16):
        neighbor_labels = index.labels_[index.kneighbors(queries, k, return_distance=False)]
        assert scores[f"precision_at_{k}"] == precision_at_k(labels, neighbor_labels)
    assert scores["suf"] == search_speedup_factor([30] * 20, 60) == 2.0
    assert scores["nmi"] == bucket_nmi(SignEncoder().encode(queries), labels)
    assert all(type(score) is float for score in scores.values())


def test_scorers_look_through_pipelines_to_the_index():
    X, y = blobs()
    scaled = StandardScaler().fit_transform(X)
    expected = ScanningIndex().fit(scaled, y)
    nested = make_pipeline("passthrough", make_pipeline(StandardScaler(), ScanningIndex())).fit(X, y)
    alone = make_pipeline(ScanningIndex()).fit(scaled, y)
    for scorer in retrieval_scorers().values():
        assert scorer(nested, X, y) == scorer(expected, scaled, y) == scorer(alone, scaled, y)


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_grid_search_refits_by_a_retrieval_score(n_jobs):
    X, y = blobs()
    grid = {"n_scanned": [4, None]}
    scorers = retrieval_scorers()
    del scorers["precision_at_16"], scorers["precision_at_4"]
    search = GridSearchCV(ScanningIndex(), grid, scoring=scorers, refit="precision_at_1", n_jobs=n_jobs, cv=2)
    search.fit(X, y)
    assert search.best_params_ == {"n_scanned": None}
    # two folds of 80 items search 40 items each
    np.testing.assert_allclose(search.cv_results_["mean_test_suf"], [10.0, 1.0])


def test_scorers_survive_pickling():
    X, y = blobs()
    index = ScanningIndex().fit(X, y)
    for scorer in retrieval_scorers().values():
        assert pickle.loads(pickle.dumps(scorer))(index, X, y) == scorer(index, X, y)


def test_precision_at_16_of_ten_items_is_an_error_and_not_another_measure():
    X, y = blobs()
    index = ScanningIndex().fit(X[:10], y[:10])
    with pytest.raises(ValueError, match="Expected n_neighbors <= n_samples_fit"):
        retrieval_scorers()["precision_at_16"](index, X, y)


def test_scores_without_labels_say_what_is_missing():
    X, y = blobs()
    scorers = retrieval_scorers()
    index = ScanningIndex().fit(X)
    with pytest.raises(ValueError, match="was fitted without y"):
        scorers["precision_at_1"](index, X, y)
    for name in ("precision_at_1", "nmi"):
        with pytest.raises(ValueError, match="but y is None"):
            scorers[name](index, X, None)
    assert scorers["suf"](index, X) == 1.0


def test_importing_metrics_leaves_torch_numba_and_matplotlib_alone():
    # loaded from its file: the package's own __init__ may bring in more, and answers for it in its own test
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("metrics", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print(sorted({"torch", "numba", "matplotlib"} & sys.modules.keys()))
"""
    path = sys.modules["hqsearch.metrics"].__file__
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
