"""Changing an index: stable positions, snapshots, filters, radius."""

import pickle
import threading

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from hqsearch import HierarchicalHashIndex


@pytest.fixture
def points():
    return np.random.default_rng(0).uniform(-0.5, 3.5, (400, 2))


@pytest.fixture
def fitted(grid_encoder):
    def fit(X, y=None, **parameters):
        return HierarchicalHashIndex(grid_encoder(), **parameters).fit(X, y)

    return fit


ALL = {"n_probes": 100}


def exact(X, queries, k):
    return NearestNeighbors(n_neighbors=k).fit(X).kneighbors(queries, return_distance=False)


def test_added_items_get_the_next_positions_and_are_found(fitted, points):
    index = fitted(points[:100], np.arange(100))
    np.testing.assert_array_equal(index.add(points[100:103], [7, 8, 9]), [100, 101, 102])
    np.testing.assert_array_equal(index.add(points[103:300], np.zeros(197)), np.arange(103, 300))
    assert index.n_samples_fit_ == index.n_positions_ == len(index.labels_) == 300
    found = index.kneighbors(points[300:], 5, return_distance=False, **ALL)
    np.testing.assert_array_equal(found, exact(points[:300], points[300:], 5))
    assert list(index.labels_[100:103]) == [7, 8, 9]


def test_removed_items_leave_holes_and_nothing_is_renumbered(fitted, points):
    index = fitted(points)
    gone = np.arange(0, 400, 3)
    index.remove(gone)
    assert (index.n_samples_fit_, index.n_positions_) == (400 - len(gone), 400)
    left = np.setdiff1d(np.arange(400), gone)
    found = index.kneighbors(points[:50], 4, return_distance=False, **ALL)
    np.testing.assert_array_equal(found, left[exact(points[left], points[:50], 4)])
    assert index.kneighbors_graph(points[:50]).shape == (50, 400)
    assert not np.isin(index.kneighbors(n_neighbors=3)[1], gone).any()
    assert len(index.kneighbors(n_neighbors=3)[1]) == len(left)


def test_compacting_tells_where_each_item_came_from(fitted, points):
    y = np.arange(400).astype(str)
    index = fitted(points, y).remove(np.arange(100, 200))
    before = index.kneighbors(points[:50], 4, return_distance=False, **ALL)
    old = index.compact()
    np.testing.assert_array_equal(old, np.r_[0:100, 200:400])
    np.testing.assert_array_equal(index.labels_, y[old])
    np.testing.assert_array_equal(old[index.kneighbors(points[:50], 4, return_distance=False, **ALL)], before)
    np.testing.assert_array_equal(index.add(points[:1], ["again"]), [300])


@pytest.mark.parametrize("sparsity", [1, 2])
def test_adding_then_removing_is_never_having_added(fitted, points, sparsity):
    index = fitted(points[:200], sparsity=sparsity)
    before = index.kneighbors(points[200:], 6)
    own = index.kneighbors(n_neighbors=6)
    index.remove(index.add(points[200:350]))
    for found, expected in zip(index.kneighbors(points[200:], 6), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(index.kneighbors(n_neighbors=6), own, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_items_of_new_cells_search_from_themselves(fitted, points):
    left = points[points[:, 0] < 1.4]
    index = fitted(left[:50])
    index.add(points[points[:, 0] > 2.6])
    everything = np.r_[left[:50], points[points[:, 0] > 2.6]]
    found = index.kneighbors(n_neighbors=3, return_distance=False, **ALL)
    np.testing.assert_array_equal(found, exact(everything, None, 3))
    assert index.kneighbors(n_neighbors=3)[1].shape == found.shape


def test_labels_are_gone_once_an_item_has_none_and_kinds_do_not_mix(fitted, points):
    index = fitted(points[:10], np.arange(10))
    with pytest.raises(ValueError, match="labels of the same kind as the fitted ones, int64, got <U1"):
        index.add(points[10:12], ["a", "b"])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        index.add(points[10:12], [1])
    assert index.n_positions_ == 10
    index.add(points[10:12])
    assert index.labels_ is None


@pytest.mark.parametrize("positions", [[400], [-1], [3, 3.5]])
def test_positions_that_do_not_exist_cannot_be_removed(fitted, points, positions):
    index = fitted(points)
    with pytest.raises(ValueError, match="positions"):
        index.remove(positions)
    assert index.n_samples_fit_ == 400


def test_a_mask_filters_and_rows_stay_full(fitted, points):
    index = fitted(points)
    allowed = np.zeros(400, dtype=bool)
    allowed[5::40] = True
    found = index.kneighbors(points[:30], 4, return_distance=False, allowed=allowed, **ALL)
    np.testing.assert_array_equal(found, np.flatnonzero(allowed)[exact(points[allowed], points[:30], 4)])
    assert allowed[index.kneighbors(points[:30], 10, allowed=allowed)[1]].all()
    assert allowed[index.kneighbors_graph(points[:30], 10, allowed=allowed).indices].all()


def test_a_mask_that_leaves_too_few_says_how_many_there_are(fitted, points):
    index = fitted(points)
    allowed = np.arange(400) < 3
    with pytest.raises(ValueError, match="n_neighbors = 4, and a query has only 3"):
        index.kneighbors(points[:30], 4, allowed=allowed)
    with pytest.raises(ValueError, match="n_neighbors = 3, and a query has only 2"):
        index.kneighbors(n_neighbors=3, allowed=allowed)
    with pytest.raises(ValueError, match=r"Expected allowed of shape \(400,\)"):
        index.kneighbors(points[:30], 4, allowed=allowed[:-1])


def test_a_radius_finds_what_lies_within(fitted, points):
    index = fitted(points, n_probes=100, radius=0.4)
    expected = NearestNeighbors(radius=0.4).fit(points).radius_neighbors(points[:50], sort_results=True)
    distances, positions, stats = index.radius_neighbors(points[:50], return_stats=True)
    assert positions.dtype == distances.dtype == object
    for i in range(50):
        np.testing.assert_array_equal(np.sort(positions[i]), np.sort(expected[1][i]))
        np.testing.assert_allclose(distances[i], expected[0][i], atol=1e-6)
    assert stats.n_queries == 50
    own = index.radius_neighbors(return_distance=False)
    assert len(own) == 400
    assert not any(i in row for i, row in enumerate(own))
    fewer = index.radius_neighbors(points[:50], n_probes=1, return_distance=False)
    assert sum(map(len, fewer)) < sum(map(len, positions))


def test_a_copy_has_locks_of_its_own(fitted, points):
    index = fitted(points)
    index.kneighbors(points)
    back = pickle.loads(pickle.dumps(index))
    assert back.search_stats_.n_queries == 0
    back.add(points[:1])
    assert (back.n_positions_, index.n_positions_) == (401, 400)


def test_threads_that_search_see_the_old_items_or_the_new_never_half(fitted, points):
    index = fitted(points[:200], np.zeros(200))
    failures, done = [], threading.Event()

    def search():
        while not done.is_set():
            found = index.kneighbors(points[:20], 5, return_distance=False, **ALL)
            # The changes below keep a whole batch or none of it, so a batch's size shows in the answer.
            if index.n_samples_fit_ % 100 or found.max() >= index.n_positions_:
                failures.append((index.n_samples_fit_, found.max()))

    searchers = [threading.Thread(target=search) for _ in range(4)]
    for thread in searchers:
        thread.start()
    for _ in range(60):
        added = index.add(points[200:300], np.ones(100))
        index.remove(added)
    done.set()
    for thread in searchers:
        thread.join()
    assert failures == []
    assert (index.n_samples_fit_, index.n_positions_) == (200, 200 + 60 * 100)


def test_scores_and_graphs_are_of_one_snapshot(points, fitted, monkeypatch):
    y = np.arange(400) % 7

    def changed_after_its_search():
        """An index that another thread changes as soon as a search is done."""
        index = fitted(points, y, n_neighbors=3)
        search = index._search

        def search_then_change(*arguments):
            found = search(*arguments)
            index.remove(np.arange(200)).compact()
            return found

        monkeypatch.setattr(index, "_search", search_then_change)
        return index

    unchanged = fitted(points, y, n_neighbors=3)
    graph = changed_after_its_search().kneighbors_graph(points[:20])
    assert graph.shape == (20, 400)
    assert (graph != unchanged.kneighbors_graph(points[:20])).nnz == 0
    assert changed_after_its_search().score(points[:20], y[:20]) == unchanged.score(points[:20], y[:20])


def test_labels_of_single_adds_are_kept_in_few_parts(fitted, points):
    index = fitted(points[:50], np.arange(50))
    for i in range(50, 400):
        index.add(points[i : i + 1], [i])
    np.testing.assert_array_equal(index.labels_, np.arange(400))
    assert len(index._items.label_parts) <= 10


def test_labels_in_a_column_are_taken_as_a_row(fitted, points):
    with pytest.warns(UserWarning, match="column-vector y"):
        index = fitted(points[:50], np.arange(50)[:, None])
    assert index.labels_.shape == (50,)
    with pytest.raises(ValueError, match="1d array"):
        index.add(points[50:52], [[1, 2], [3, 4]])


def test_many_threads_may_add(fitted, points):
    index = fitted(points[:100])
    given = []

    def add():
        for i in range(25):
            given.append(index.add(points[100 + i : 102 + i]))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.sort(np.concatenate(given)), np.arange(100, 300))


def test_an_index_may_be_copied_to_faiss(fitted, points):
    faiss = pytest.importorskip("faiss")
    index = fitted(points, n_neighbors=5)
    queries, lists = index.faiss_lists(points[:40], n_probes=4)
    copy = index.to_faiss()
    copy.nprobe = lists.shape[1]
    centroid_distances = np.zeros(lists.shape, dtype=np.float32)
    _, found = copy.search_preassigned(queries, 5, lists, centroid_distances)
    np.testing.assert_array_equal(found, index.kneighbors(points[:40], n_probes=4)[1])
    assert isinstance(copy, faiss.IndexIVFFlat)
