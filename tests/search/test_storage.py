import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

from hqsearch.search import LeafTable, SearchStats, table_arrays, table_from_arrays
from hqsearch.search.blocks import FLOAT16, INT8, PLAIN, byte_scale, decode, encode
from hqsearch.search.scoring import CHUNK, COPIED
from hqsearch.search.segments import Segment


@pytest.mark.parametrize(("sparsity", "n_items"), [(1, 0), (1, 1), (1, 5000), (3, 5000)])
@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("embedding_dim", [7, 64])
def test_memory_follows_the_documented_formula(sparsity, n_items, storage, embedding_dim):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 40, n_items)[:, None] * 10 + np.arange(sparsity)
    vectors = rng.normal(size=(n_items, embedding_dim)).astype(np.float32)
    table = LeafTable.build(vectors, codes, branching_factor=20, n_levels=2, storage=storage)
    width = {"float32": 4, "float16": 2, "int8": 1}[storage]
    n_cells, n_leaves = len(np.unique(codes, axis=0)), len(np.unique(codes))
    items = n_items * (embedding_dim * width + 4) + n_items
    formula = items + n_cells * (12 * sparsity + 12) + n_leaves * 16
    assert formula <= table.nbytes <= formula + embedding_dim * 8 + 128


def test_sparsity_one_takes_at_most_115_percent_of_the_vectors():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20_000, 64)).astype(np.float32)
    codes = rng.integers(0, 1000, (20_000, 1))
    table = LeafTable.build(vectors, codes, branching_factor=32, n_levels=2)
    table.search(vectors[:5], np.zeros((5, 2, 32), np.float32), codes[:5], 30, exclude=np.arange(5))
    assert table.nbytes <= 1.15 * vectors.nbytes


def test_sparsity_does_not_multiply_the_vectors():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20_000, 64)).astype(np.float32)
    codes = rng.integers(0, 250, 20_000)[:, None] * 4 + np.arange(4)
    table = LeafTable.build(vectors, codes, branching_factor=32, n_levels=2)
    assert table.nbytes <= 1.15 * vectors.nbytes


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("sparsity", [1, 2])
def test_smaller_storage_searches_the_rounded_vectors(cases, storage, sparsity):
    case = cases.make(20, n_items=900, embedding_dim=9, sparsity=sparsity)
    rng = np.random.default_rng(0)
    case.vectors = (rng.normal(size=case.vectors.shape) * 3).astype(np.float32)
    kind = {"float16": FLOAT16, "int8": INT8}[storage]
    scale = byte_scale(case.vectors)
    rounded = decode(encode(case.vectors, kind, *scale), *scale)
    if storage == "float16":
        assert np.abs(rounded - case.vectors).max() <= 2**-11 * np.abs(case.vectors).max()
    else:
        assert (np.abs(rounded - case.vectors) <= scale[1] * 0.501).all()
    table = cases.build(case, storage=storage)
    case.vectors = rounded
    arguments = (case.queries, case.level_scores, case.query_codes, 20)
    for options in ({}, {"n_probes": 30}, {"allowed": rng.random(900) < 0.3}):
        expected = cases.build(case).search(*arguments, **options)
        got = table.search(*arguments, **options)
        np.testing.assert_array_equal(got.positions, expected.positions)
        np.testing.assert_array_equal(got.distances, expected.distances)


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_changes_keep_what_smaller_storage_rounded(cases, storage):
    case = cases.make(21, n_items=4000)
    case.vectors[1500:1600] *= 3
    table = LeafTable.build(case.vectors[:1500], case.codes[:1500], **case.shape, storage=storage)
    for first, end in ((1500, 1600), (1600, 3000), (3000, 4000)):
        table = table.add(case.vectors[first:end], case.codes[first:end])
    table = table.remove(np.arange(0, 4000, 7)).compact()
    live = np.delete(np.arange(4000), np.arange(0, 4000, 7))
    result = table.search(case.queries, case.level_scores, case.query_codes, 10, n_probes=1000)
    true = ((case.queries[:, None] - case.vectors[live]) ** 2).sum(axis=2)
    np.testing.assert_allclose(result.distances, np.sqrt(np.sort(true, axis=1)[:, :10]), atol=0.2)


def test_float16_keeps_subnormals_zeros_and_extremes():
    values = np.array(
        [0.0, -0.0, 6e-8, -6e-8, 1e-5, 65504.0, -65504.0, 1.0, 0.333251953125], dtype=np.float32
    )
    vectors = np.tile(values, (3, 1))
    table = LeafTable.build(vectors, np.zeros((3, 1), int), branching_factor=1, n_levels=1, storage="float16")
    halves = values.astype(np.float16).astype(np.float32)
    result = table.search(halves[None], np.zeros((1, 1, 1), np.float32), np.zeros((1, 1), int), 3)
    assert (result.distances == 0).all()


def test_int8_keeps_constant_dimensions_and_single_items():
    vectors = np.array([[3.25, 1.0], [3.25, 2.0]], dtype=np.float32)
    table = LeafTable.build(vectors, np.zeros((2, 1), int), branching_factor=1, n_levels=1, storage="int8")
    result = table.search(vectors, np.zeros((2, 1, 1), np.float32), np.zeros((2, 1), int), 1)
    assert (result.distances == 0).all()
    assert result.positions.ravel().tolist() == [0, 1]


@pytest.mark.parametrize("kind", [PLAIN, FLOAT16, INT8])
@pytest.mark.parametrize("n_rows", [1, 63, 64, 65, 500])
def test_packing_can_be_undone(kind, n_rows):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(n_rows, 5)).astype(np.float32)
    low, step = byte_scale(vectors)
    raw = encode(vectors, kind, low, step)
    codes = rng.integers(0, 3, (n_rows, 1))
    segment = Segment.build(raw, codes, np.arange(n_rows, dtype=np.int32), low, step)
    np.testing.assert_array_equal(segment.raw_rows(), raw[segment.positions])
    np.testing.assert_array_equal(segment.row_codes(), codes[segment.positions])
    merged = Segment.merge((segment,), np.ones(n_rows, np.uint8))
    np.testing.assert_array_equal(merged.packed, segment.packed)


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_stored_vectors_come_back_by_position(cases, storage):
    case = cases.make(22, n_items=1500)
    table = LeafTable.build(case.vectors[:1300], case.codes[:1300], **case.shape, storage=storage)
    table = table.add(case.vectors[1300:], case.codes[1300:]).remove([0, 700, 1499])
    positions, vectors = table.stored_vectors()
    assert positions.tolist() == np.delete(np.arange(1500), [0, 700, 1499]).tolist()
    np.testing.assert_allclose(vectors, case.vectors[positions], atol=0.02)


def answers_alone(table, case, n_neighbors):
    """Positions and stats of the queries one by one."""
    arguments = (case.queries, case.level_scores, case.query_codes)
    results = [
        table.search(*(a[i : i + 1] for a in arguments), n_neighbors) for i in range(len(case.queries))
    ]
    return np.concatenate([r.positions for r in results]), sum((r.stats for r in results), SearchStats())


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("sparsity", [1, 3])
@pytest.mark.parametrize("removed", [[], [0, 7, 8, 250]])
def test_queries_alone_get_what_they_get_together(cases, storage, sparsity, removed):
    case = cases.make(24, sparsity=sparsity)
    table = cases.build(case, storage=storage)
    table = table.remove(removed) if removed else table
    together = table.search(case.queries, case.level_scores, case.query_codes, 20)
    positions, stats = answers_alone(table, case, 20)
    np.testing.assert_array_equal(positions, together.positions)
    assert stats == together.stats


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))]
)
def test_copies_know_nothing_of_the_addresses_of_the_original(cases, copied):
    case = cases.make(25, sparsity=2)
    table = cases.build(case)
    expected, _ = answers_alone(table, case, 9)
    assert "_places" in vars(table)
    other = copied(table)
    assert "_places" not in vars(other)
    del table
    np.testing.assert_array_equal(answers_alone(other, case, 9)[0], expected)


@pytest.mark.parametrize("name", ["packed", "positions", "cell_live", "leaf_cells"])
def test_arrays_whose_values_do_not_lie_side_by_side_are_refused(cases, name):
    numbers, arrays = table_arrays(cases.build(cases.make(26)))
    values = arrays[f"segment0.{name}"]
    strided = np.zeros(2 * values.size, values.dtype)
    strided[::2] = values
    with pytest.raises(ValueError, match=f"segment0.{name} to hold values side by side"):
        table_from_arrays(numbers, arrays | {f"segment0.{name}": strided[::2]})


@pytest.mark.parametrize("n_items", [COPIED, COPIED + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 70])
@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("masked", [False, True])
def test_leaves_larger_than_what_is_scored_at_once(n_items, storage, masked):
    # One leaf, distances that tie across its chunks, and the nearest items in the last of them.
    rng = np.random.default_rng(n_items)
    vectors = rng.integers(0, 4, (n_items, 3)).astype(np.float32)
    vectors[-3:] = 0
    table = LeafTable.build(
        vectors, np.zeros((n_items, 1), int), branching_factor=2, n_levels=1, storage=storage
    )
    vectors = table.stored_vectors()[1]
    allowed = rng.random(n_items) < 0.7 if masked else np.ones(n_items, bool)
    queries = np.concatenate([np.zeros((1, 3)), rng.integers(0, 4, (6, 3))]).astype(np.float32)
    scores, codes = np.zeros((7, 1, 2)), np.zeros((7, 1), int)
    squares = ((queries[:, None] - vectors) ** 2).sum(2)
    squares[:, ~allowed] = np.inf
    for k in (1, 16, 60):
        found = table.search(queries, scores, codes, k, allowed=allowed if masked else None)
        np.testing.assert_array_equal(found.positions, np.argsort(squares, axis=1, kind="stable")[:, :k])
        alone = table.search(queries[:1], scores[:1], codes[:1], k, allowed=allowed if masked else None)
        np.testing.assert_array_equal(alone.positions, found.positions[:1])


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_read_only_arrays_are_searched_by_the_same_compiled_kernels(cases, storage):
    from hqsearch.search import engine

    case = cases.make(23, sparsity=2)
    table = cases.build(case, storage=storage).remove([1])
    arguments = (case.queries, case.level_scores, case.query_codes, 30)
    expected = table.search(*arguments, exclude=np.arange(12))
    n_compiled = len(engine.search_slice.signatures)
    for array in (table._live_flags, *arguments[:3]):
        array.flags.writeable = False
    for segment in table._segments:
        for name in segment.__annotations__:
            getattr(segment, name).flags.writeable = False
    locked = table._changed(_segments=tuple(replace(segment) for segment in table._segments))
    got = locked.search(*arguments, exclude=np.arange(12))
    np.testing.assert_array_equal(got.positions, expected.positions)
    assert len(engine.search_slice.signatures) == n_compiled
    assert locked.compact().n_items == 299
