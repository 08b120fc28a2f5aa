import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqsearch.search import LeafTable

SMALL = {"branching_factor": 4, "n_levels": 2}


def draw(rng, n_items, sparsity=1):
    vectors = rng.integers(0, 5, (n_items, 3)).astype(np.float32)
    parents = rng.integers(0, 4, n_items)
    codes = parents[:, None] * 4 + np.argsort(rng.random((n_items, 4)), axis=1)[:, :sparsity]
    return vectors, codes


@pytest.mark.parametrize("sparsity", [1, 2])
@pytest.mark.parametrize("pieces", [(1, 1, 1), (0, 300), (10, 1500, 3), (2000, 1100, 5, 1100), (300, 3000)])
def test_adding_in_pieces_equals_building_at_once(cases, sparsity, pieces):
    case = cases.make(7, n_items=sum(pieces), sparsity=sparsity)
    ends = np.cumsum(pieces)
    table = LeafTable.build(case.vectors[: ends[0]], case.codes[: ends[0]], **case.shape)
    for first, end in pairwise(ends):
        table = table.add(case.vectors[first:end], case.codes[first:end])
    whole = cases.build(case)
    for options in ({}, {"n_probes": 9}, {"exclude": np.arange(12) % sum(pieces)}):
        arguments = (case.queries, case.level_scores, case.query_codes, min(11, sum(pieces)))
        expected, got = whole.search(*arguments, **options), table.search(*arguments, **options)
        np.testing.assert_array_equal(got.positions, expected.positions)
        np.testing.assert_array_equal(got.distances, expected.distances)
        assert got.stats == expected.stats
    assert table.occupied_leaves().tolist() == whole.occupied_leaves().tolist()
    assert table.leaf_sizes().tolist() == whole.leaf_sizes().tolist()


@pytest.mark.parametrize("sparsity", [1, 3])
@pytest.mark.parametrize("n_removed", [1, 100, 299, 300])
def test_removed_items_are_as_if_they_had_never_been(cases, sparsity, n_removed):
    case = cases.make(8, sparsity=sparsity)
    gone = np.random.default_rng(0).permutation(300)[:n_removed]
    live = np.ones(300, bool)
    live[gone] = False
    table = cases.build(case).remove(gone)
    for options in ({}, {"n_probes": 4}, {"probing": "lexicographic", "n_probes": 6}):
        cases.check(table, case, live, 6, **options)
    cases.check(table, case, live, 6, exclude=np.arange(12))
    assert (table.n_items, table.n_live_items) == (300, 300 - n_removed)
    assert table.live_positions().tolist() == np.flatnonzero(live).tolist()
    assert table.n_leaves_ == np.unique(case.codes[live]).size


@pytest.mark.parametrize("sparsity", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_items_not_allowed_count_as_removed(cases, sparsity, share):
    case = cases.make(9, sparsity=sparsity)
    rng = np.random.default_rng(1)
    allowed = rng.random(300) < share
    gone = rng.permutation(300)[:50]
    live = np.ones(300, bool)
    live[gone] = False
    table = cases.build(case).remove(gone)
    for options in ({}, {"n_probes": 5}, {"exclude": np.arange(12)}):
        result = cases.check(table, case, live & allowed, 8, allowed=allowed, **options)
        assert result.n_found == min(8, result.n_found)
    assert result.stats.items == 12 * (live & allowed).sum() - (live & allowed)[:12].sum()
    if share == 0.0:
        assert (result.positions == -1).all()
        assert np.isinf(result.distances).all()


def test_compact_renumbers_the_live_items_in_order(cases):
    case = cases.make(10, n_items=1500, sparsity=2)
    table = LeafTable.build(case.vectors[:200], case.codes[:200], **case.shape)
    table = table.add(case.vectors[200:1400], case.codes[200:1400]).add(
        case.vectors[1400:], case.codes[1400:]
    )
    gone = np.arange(0, 1500, 3)
    holed = table.remove(gone)
    compact = holed.compact()
    assert compact.n_items == compact.n_live_items == 1000
    arguments = (case.queries, case.level_scores, case.query_codes, 9)
    before, after = holed.search(*arguments), compact.search(*arguments)
    np.testing.assert_array_equal(holed.live_positions()[after.positions], before.positions)
    np.testing.assert_array_equal(after.distances, before.distances)
    assert compact.nbytes < holed.nbytes
    rebuilt = LeafTable.build(
        case.vectors[holed.live_positions()], case.codes[holed.live_positions()], **case.shape
    )
    np.testing.assert_array_equal(rebuilt.search(*arguments).positions, after.positions)


def test_a_table_is_not_touched_by_what_is_made_from_it(cases):
    case = cases.make(11, n_items=40)
    table = cases.build(case)
    arguments = (case.queries, case.level_scores, case.query_codes, 5)
    before = table.search(*arguments)
    zero = np.zeros((1, 5), np.float32)
    left = table.add(zero, np.array([[1]]))
    right = table.add(zero + 1, np.array([[2]]))
    further = left.add(zero + 2, np.array([[3]]))
    left.remove([0, 40])
    assert (left.n_items, right.n_items, further.n_items, table.n_items) == (41, 41, 42, 40)
    assert left.items_in_leaf(1).max() == 40
    assert right.items_in_leaf(2).max() == 40
    assert further.items_in_leaf(3).max() == 41
    np.testing.assert_array_equal(table.search(*arguments).positions, before.positions)


@given(
    seed=st.integers(0, 2**20),
    steps=st.lists(st.tuples(st.sampled_from(["add", "remove", "compact"]), st.integers(0, 40)), max_size=12),
    sparsity=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_history_of_changes_gives_the_table_of_what_is_left(seed, steps, sparsity):
    rng = np.random.default_rng(seed)
    vectors, codes = draw(rng, 20, sparsity)
    table = LeafTable.build(vectors, codes, **SMALL)
    live = np.ones(20, bool)
    for step, size in steps:
        if step == "add":
            new_vectors, new_codes = draw(rng, size, sparsity)
            table = table.add(new_vectors, new_codes)
            vectors, codes = np.concatenate([vectors, new_vectors]), np.concatenate([codes, new_codes])
            live = np.append(live, np.ones(size, bool))
        elif step == "remove":
            gone = rng.permutation(np.flatnonzero(live))[:size]
            table = table.remove(gone)
            live[gone] = False
        else:
            table = table.compact()
            vectors, codes, live = vectors[live], codes[live], np.ones(live.sum(), bool)
    queries, query_codes = draw(rng, 6, sparsity)
    scores = rng.normal(size=(6, 2, 4)).astype(np.float32)
    n_neighbors = int(rng.integers(1, 12))
    rebuilt = LeafTable.build(vectors[live], codes[live], **SMALL)
    expected = rebuilt.search(queries, scores, query_codes, n_neighbors)
    got = table.search(queries, scores, query_codes, n_neighbors)
    original = np.append(np.flatnonzero(live), -1)
    np.testing.assert_array_equal(got.positions, original[expected.positions])
    np.testing.assert_array_equal(got.distances, expected.distances)
    assert got.stats == expected.stats


def test_single_adds_are_merged_as_a_binary_counter_carries():
    rng = np.random.default_rng(0)
    vectors, codes = draw(rng, 20_000)
    table = LeafTable.build(vectors[:5000], codes[:5000], **SMALL)
    for i in range(5000, 20_000):
        table = table.add(vectors[i : i + 1], codes[i : i + 1])
    assert len(table._segments) <= 4
    scores = np.zeros((5, 2, 4), np.float32)
    expected = LeafTable.build(vectors, codes, **SMALL).search(vectors[:5], scores, codes[:5], 30)
    np.testing.assert_array_equal(
        table.search(vectors[:5], scores, codes[:5], 30).positions, expected.positions
    )


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([20], r"positions in \[0, 20\), got 20 to 20"),
        ([-1, 3], r"positions in \[0, 20\), got -1 to 3"),
        ([4, 5], r"\[4\] were removed already"),
        ([1.5], "integer dtype"),
        ([[1], [2]], "shape"),
    ],
)
def test_remove_refuses_what_is_not_there(positions, message):
    table = LeafTable.build(*draw(np.random.default_rng(0), 20), **SMALL).remove([4])
    with pytest.raises(ValueError, match=message):
        table.remove(positions)
    assert table.remove([]).n_live_items == 19
    assert table.remove([3, 3]).n_live_items == 18


def test_add_refuses_items_of_another_shape():
    table = LeafTable.build(*draw(np.random.default_rng(0), 20), **SMALL)
    with pytest.raises(ValueError, match=r"vectors of shape \(n_items, 3\), got \(1, 4\)"):
        table.add(np.zeros((1, 4)), np.zeros((1, 1), int))
    with pytest.raises(ValueError, match=r"codes of shape \(1, 1\), got \(1, 2\)"):
        table.add(np.zeros((1, 3)), np.zeros((1, 2), int))
    assert table.add(np.zeros((0, 3)), np.zeros((0, 1), int)).n_items == 20


@pytest.mark.parametrize("seconds", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_eight_threads_search_while_one_adds_and_removes(seconds):
    rng = np.random.default_rng(3)
    vectors, codes = draw(rng, 3000, 2)
    queries, query_codes = draw(rng, 4, 2)
    scores = rng.normal(size=(4, 2, 4)).astype(np.float32)
    table = LeafTable.build(vectors, codes, **SMALL)
    shelf = {"now": {"table": table, "vectors": vectors, "live": np.ones(3000, bool)}}
    stop, failures, answers = threading.Event(), [], []

    def search():
        n_answers = 0
        while not stop.is_set():
            now = dict(shelf["now"])
            try:
                got = now["table"].search(queries, scores, query_codes, 5, n_probes=100)
                squares = ((queries[:, None] - now["vectors"]) ** 2).sum(axis=2)
                squares[:, ~now["live"]] = np.inf
                expected = np.argsort(squares, axis=1, kind="stable")[:, :5]
                np.testing.assert_array_equal(got.positions, expected)
            except Exception as error:
                failures.append(error)
                return
            n_answers += 1
        answers.append(n_answers)

    threads = [threading.Thread(target=search) for _ in range(8)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end and not failures:
        now = shelf["now"]
        if rng.random() < 0.5:
            added, added_codes = draw(rng, int(rng.integers(1, 400)), 2)
            table = now["table"].add(added, added_codes)
            vectors = np.concatenate([now["vectors"], added])
            live = np.append(now["live"], np.ones(len(added), bool))
        else:
            gone = rng.permutation(np.flatnonzero(now["live"]))[: int(rng.integers(1, 300))]
            table, vectors, live = now["table"].remove(gone), now["vectors"], now["live"].copy()
            live[gone] = False
        shelf["now"] = {"table": table, "vectors": vectors, "live": live}
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert len(answers) == 8
    assert min(answers) > 0


@pytest.mark.parametrize("sparsity", [1, 3])
def test_radius_search_finds_what_lies_within(cases, sparsity):
    case = cases.make(12, n_items=700, sparsity=sparsity)
    table = LeafTable.build(case.vectors[:600], case.codes[:600], **case.shape)
    table = table.add(case.vectors[600:], case.codes[600:]).remove([3, 650])
    live = np.ones(700, bool)
    live[[3, 650]] = False
    squares = ((case.queries[:, None] - case.vectors) ** 2).sum(axis=2)
    allowed = np.arange(700) % 2 == 0
    for radius, n_probes, options in (
        (0.0, None, {}), (2.0, 1000, {}), (3.0, 3, {}), (np.inf, None, {}), (2.0, 1000, {"allowed": allowed}),
        (2.0, 1000, {"exclude": np.arange(12)}),
    ):  # fmt: skip
        result = table.radius_search(
            case.queries, case.level_scores, case.query_codes, radius, n_probes=n_probes, **options
        )
        for i in range(12):
            usable = live & options.get("allowed", live)
            exclude = i if "exclude" in options else -1
            plan = cases.reference(
                case.vectors, case.codes, usable, case.queries[i], case.level_scores[i], case.query_codes[i],
                0, n_probes=n_probes, branching_factor=4,
            )  # fmt: skip
            inside = np.isin(case.codes, plan.opened).any(axis=1) & usable & (squares[i] <= radius**2)
            inside &= np.arange(700) != exclude
            expected = np.flatnonzero(inside)
            expected = expected[np.argsort(squares[i][expected], kind="stable")]
            got = slice(result.indptr[i], result.indptr[i + 1])
            np.testing.assert_array_equal(result.positions[got], expected)
            np.testing.assert_allclose(result.distances[got] ** 2, squares[i][expected], atol=1e-4)
    for radius in (-1, "a", np.nan):
        with pytest.raises(ValueError, match=f"radius >= 0, got {radius!r}"):
            table.radius_search(case.queries, case.level_scores, case.query_codes, radius)
