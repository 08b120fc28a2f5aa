import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pandas as pd
import pytest
from plain_encoder import PlainEncoder
from saved_estimators import assert_same_encoder, assert_same_index, small_encoder
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.search import LeafTable, table_arrays, table_from_arrays


@pytest.mark.parametrize("mmap_mode", [None, "r"])
def test_a_loaded_encoder_gives_the_same_bits(encoder, digits, tmp_path, mmap_mode):
    encoder.save(tmp_path / "saved")
    loaded = HierarchicalHashEncoder.load(tmp_path / "saved", mmap_mode)
    assert_same_encoder(loaded, encoder, digits[2])
    assert loaded.get_params() == encoder.get_params()
    assert clone(loaded).get_params() == encoder.get_params()
    assert loaded.score(digits[2], digits[3]) == encoder.score(digits[2], digits[3])
    assert_same_encoder(pickle.loads(pickle.dumps(loaded)), encoder, digits[2])


def test_a_loaded_encoder_can_be_fitted_again(encoder, digits, tmp_path):
    encoder.save(str(tmp_path))
    again = HierarchicalHashEncoder.load(str(tmp_path)).fit(digits[0][:300], digits[1][:300])
    np.testing.assert_array_equal(again.embed(digits[2]), encoder.embed(digits[2]))


def test_images_and_unit_vectors_come_back(digits, tmp_path):
    X = digits[0][:100].reshape(-1, 1, 8, 8).astype(np.uint8)
    encoder = small_encoder(loss="triplet").fit(X, digits[1][:100])
    encoder.save(tmp_path)
    loaded = HierarchicalHashEncoder.load(tmp_path)
    assert_same_encoder(loaded, encoder, X[:20])
    with pytest.raises(ValueError, match=r"expecting items of shape \(1, 8, 8\)"):
        loaded.embed(np.zeros((2, 1, 4, 4)))


def test_feature_names_come_back(digits, tmp_path):
    names = [f"pixel {i} é\0" for i in range(64)]
    frame = pd.DataFrame(digits[0][:100], columns=names)
    index = HierarchicalHashIndex(small_encoder()).fit(frame, digits[1][:100])
    index.save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path)
    for ours, theirs in ((loaded, index), (loaded.encoder_, index.encoder_)):
        assert ours.feature_names_in_.tolist() == names
        assert ours.feature_names_in_.dtype == theirs.feature_names_in_.dtype == object
        assert ours.n_features_in_ == 64
    assert_same_index(loaded, index, frame[:9])
    with pytest.raises(ValueError, match="feature names should match"):
        loaded.encoder_.embed(frame.rename(columns={names[0]: "other"}))


@pytest.mark.parametrize("mmap_mode", [None, "r"])
def test_a_loaded_index_gives_the_same_bits(index, digits, tmp_path, mmap_mode):
    index.save(tmp_path / "saved")
    loaded = HierarchicalHashIndex.load(tmp_path / "saved", mmap_mode)
    assert loaded.search_stats_.n_queries == 0
    assert_same_index(loaded, index, digits[2])
    assert (loaded.kneighbors_graph(digits[2]) != index.kneighbors_graph(digits[2])).nnz == 0
    assert loaded.score(digits[2], digits[3]) == index.score(digits[2], digits[3])
    assert_same_encoder(loaded.encoder_, index.encoder_, digits[2])


def test_parameters_of_a_loaded_index_are_those_that_were_saved(index, digits, tmp_path):
    index.save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path)
    frozen, loaded_frozen = index.encoder, loaded.encoder
    assert isinstance(loaded_frozen, FrozenEstimator)
    assert loaded_frozen.estimator.get_params() == frozen.estimator.get_params()
    # Frozen and own encoder differ in sparsity and share what was learned, as before.
    assert (loaded_frozen.estimator.sparsity, loaded.encoder_.sparsity) == (1, 2)
    assert loaded_frozen.estimator._model is loaded.encoder_._model
    own = {name: value for name, value in index.get_params(deep=False).items() if name != "encoder"}
    assert own == {name: loaded.get_params()[name] for name in own}
    again = clone(loaded).set_params(sparsity=1).fit(digits[0])
    np.testing.assert_array_equal(again.encoder_.encode(digits[2]), frozen.estimator.encode(digits[2]))


def test_an_unfrozen_encoder_comes_back_as_its_parameters(digits, tmp_path):
    index = HierarchicalHashIndex(small_encoder(learning_rate=np.float64(0.01)), n_neighbors=2)
    index.fit(digits[0][:100], digits[1][:100]).save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path)
    assert type(loaded.encoder) is HierarchicalHashEncoder
    assert not hasattr(loaded.encoder, "classes_")
    assert type(loaded.encoder.learning_rate) is np.float64
    ours, theirs = loaded.get_params(), index.get_params()
    del ours["encoder"], theirs["encoder"]
    assert ours == theirs
    assert_same_index(clone(loaded).fit(digits[0][:100], digits[1][:100]), index, digits[2][:9])


def test_a_frozen_encoder_that_was_fitted_again_is_saved_on_its_own(digits, tmp_path):
    frozen = small_encoder().fit(digits[0][:100], digits[1][:100])
    index = HierarchicalHashIndex(FrozenEstimator(frozen)).fit(digits[0][:100])
    frozen.fit(digits[0][100:200], digits[1][100:200])
    index.save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path)
    assert_same_index(loaded, index, digits[2][:9])
    assert_same_encoder(loaded.encoder.estimator, frozen, digits[2][:9])


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("sparsity", [1, 2])
def test_every_storage_comes_back(items, tmp_path, storage, sparsity):
    index = HierarchicalHashIndex(PlainEncoder(), sparsity=sparsity, storage=storage).fit(items)
    index.save(tmp_path)
    for mmap_mode in (None, "r"):
        loaded = HierarchicalHashIndex.load(tmp_path, mmap_mode, encoder=PlainEncoder)
        assert loaded.labels_ is None
        assert_same_index(loaded, index, items[:30] + 0.1)


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_positions_stay_as_they_are_after_adding_and_removing(items, storage):
    encoder = PlainEncoder().fit(items)
    queries = (items[:20], encoder.level_scores(items[:20]), encoder.encode(items[:20]), 9)
    table = LeafTable.build(
        items[:150], encoder.encode(items[:150]), branching_factor=4, n_levels=2, storage=storage
    )
    table = table.remove(np.arange(0, 150, 4)).add(3 * items[150:], encoder.encode(items[150:]))
    table = table.remove([1, 2, 151, 399])
    again = table_from_arrays(*table_arrays(table))
    for change in (
        lambda t: t,
        lambda t: t.remove([5, 170]),
        lambda t: t.add(items[:3], encoder.encode(items[:3])),
        lambda t: t.compact(),
    ):
        ours, theirs = change(again), change(table)
        assert (ours.n_items, ours.n_live_items) == (theirs.n_items, theirs.n_live_items)
        np.testing.assert_array_equal(ours.live_positions(), theirs.live_positions())
        if storage == "int8" and ours is not again:
            # What waited in the tail is rounded when it is saved, and a later merge rounds it once more.
            continue
        for probes in (None, 8):
            mine, other = ours.search(*queries, n_probes=probes), theirs.search(*queries, n_probes=probes)
            np.testing.assert_array_equal(mine.positions, other.positions)
            np.testing.assert_array_equal(mine.distances, other.distances)


@pytest.mark.parametrize("mmap_mode", [None, "r"])
def test_a_changed_index_comes_back_and_changes_on(items, tmp_path, mmap_mode):
    index = HierarchicalHashIndex(PlainEncoder(), sparsity=2).fit(items[:300], np.arange(300))
    index.add(items[300:350], np.arange(300, 350))
    index.remove(np.arange(0, 350, 3))
    index.save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path, mmap_mode, encoder=PlainEncoder)
    for change in (
        lambda i: None,
        lambda i: i.add(items[350:], np.arange(350, 400)).tolist(),
        lambda i: i.remove([1, 361]) is i,
        lambda i: i.compact().tolist(),
    ):
        assert change(loaded) == change(index)
        assert (loaded.n_samples_fit_, loaded.n_positions_) == (index.n_samples_fit_, index.n_positions_)
        np.testing.assert_array_equal(loaded.labels_, index.labels_)
        assert_same_index(loaded, index, items[::20])


def test_an_index_with_parted_leaves_comes_back(items, tmp_path):
    index = HierarchicalHashIndex(PlainEncoder(n_levels=1, branching_factor=2)).fit(items)
    assert index.table_.n_levels > 1
    index.save(tmp_path / "index")
    loaded = HierarchicalHashIndex.load(tmp_path / "index", encoder=index.encoder_)
    assert_same_index(loaded, index, items[:9])
    index.add(items[:5])
    loaded.add(items[:5])
    assert_same_index(loaded, index, items[:9])


def test_no_kernel_is_compiled_anew_for_a_mapped_index(plain, items, tmp_path, monkeypatch):
    from hqsearch.search import engine

    monkeypatch.setattr("hqsearch.persistence.files._MAPPED_FROM", 1)
    plain.save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path, "r", encoder=PlainEncoder)
    arrays = table_arrays(loaded._items.table)[1]
    assert not any(array.flags.writeable for array in arrays.values())
    assert_same_index(loaded, plain, items[:9])
    # As joblib maps what it hands to other processes: after a search, which leaves more behind.
    joblib.dump(loaded._items, tmp_path / "pickled")
    mapped = joblib.load(tmp_path / "pickled", mmap_mode="r")
    queries = plain._describe(items[:9])
    found, expected = (each.search(queries, 3).positions for each in (mapped, plain._items))
    np.testing.assert_array_equal(found, expected)
    for kernel in (engine.search_slice, engine.plan_search, engine.score_pairs):
        for signature in kernel.signatures:
            assert all(argument.mutable for argument in signature if hasattr(argument, "layout"))


def test_a_table_without_items_comes_back(items):
    table = LeafTable.build(items[:0], np.zeros((0, 1), int), branching_factor=4, n_levels=2)
    again = table_from_arrays(*table_arrays(table))
    assert (again.n_items, again.n_leaves_) == (0, 0)


def test_a_mapped_index_is_searched_by_threads_and_pickled(plain, items, tmp_path):
    plain.save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path, "r", encoder=PlainEncoder)
    expected = plain.kneighbors(items)[1]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: loaded.kneighbors(items)[1], range(12)):
            np.testing.assert_array_equal(found, expected)
    again = pickle.loads(pickle.dumps(loaded._items))
    shutil.rmtree(tmp_path)
    encoder = loaded.encoder_
    described = encoder.embed(items), encoder.level_scores(items), encoder.encode(items)
    np.testing.assert_array_equal(again.search(described, 5).positions, expected)


def test_a_loaded_default_index_can_be_pickled(index, digits, tmp_path):
    index.save(tmp_path)
    loaded = pickle.loads(pickle.dumps(HierarchicalHashIndex.load(tmp_path, "r")))
    assert_same_index(loaded, index, digits[2][:9])


@pytest.mark.parametrize(
    "labels",
    [
        np.array(["zero", "one", "", "é\U0001f600", "ends\0", "l" * 1000] * 2, dtype=object),
        np.array(["a", "bc"] * 6),
        np.arange(12),
        np.arange(12, dtype=np.uint8),
        np.linspace(0, 1, 12),
        np.array([True, False] * 6),
        np.arange(24, dtype=">i4")[::2],
    ],
    ids=lambda labels: labels.dtype.str,
)
def test_labels_keep_their_values_and_their_dtype(items, tmp_path, labels):
    HierarchicalHashIndex(PlainEncoder()).fit(items[:12], labels).save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path, encoder=PlainEncoder)
    assert loaded.labels_.dtype == labels.dtype
    assert loaded.labels_.tolist() == labels.tolist()


def test_string_classes_come_back(digits, tmp_path):
    encoder = small_encoder().fit(digits[0][:100], np.array([f"digit {i}" for i in digits[1][:100]], object))
    encoder.save(tmp_path)
    assert_same_encoder(HierarchicalHashEncoder.load(tmp_path), encoder, digits[2][:9])


def test_other_objects_as_labels_are_refused_before_anything_is_written(items, tmp_path):
    index = HierarchicalHashIndex(PlainEncoder()).fit(items[:3], np.array(["a", None, "b"], dtype=object))
    with pytest.raises(
        ValueError, match=r"Expected labels to be an array of numbers, booleans or strings.*NoneType"
    ):
        index.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
