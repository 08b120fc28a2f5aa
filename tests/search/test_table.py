import numpy as np
import pytest

from hqsearch.search import LeafTable, SearchStats


@pytest.mark.parametrize("sparsity", [1, 2, 4])
@pytest.mark.parametrize("probing", ["best_first", "lexicographic"])
@pytest.mark.parametrize(
    ("n_neighbors", "n_probes"), [(1, None), (7, None), (60, None), (3, 1), (3, 5), (5, 1000)]
)
def test_search_follows_the_definition(cases, sparsity, probing, n_neighbors, n_probes):
    case = cases.make(sparsity * 10 + n_neighbors, sparsity=sparsity)
    cases.check(cases.build(case), case, np.ones(300, bool), n_neighbors, n_probes=n_probes, probing=probing)


@pytest.mark.parametrize("sparsity", [1, 3])
def test_each_query_can_leave_out_its_own_entry(cases, sparsity):
    case = cases.make(5, sparsity=sparsity)
    case.queries, case.query_codes = case.vectors[:12].copy(), case.codes[:12].copy()
    exclude = np.arange(12)
    exclude[::4] = -1
    result = cases.check(cases.build(case), case, np.ones(300, bool), 9, exclude=exclude)
    assert result.stats.items == 12 * 300 - 9


@pytest.mark.parametrize("n_probes", [1, 2, 3, 5])
@pytest.mark.parametrize("n_neighbors", [1, 9, 40])
def test_leaving_out_and_fewer_probes_than_leaves_of_a_code(cases, n_probes, n_neighbors):
    case = cases.make(6, sparsity=3)
    # Queries of few codes, several of each, so that some follow one of their own code.
    case.queries, case.query_codes = case.vectors[:12].copy(), case.codes[np.arange(12) % 3].copy()
    cases.check(
        cases.build(case), case, np.ones(300, bool), n_neighbors, n_probes=n_probes, exclude=np.arange(12)
    )


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_who_had_to_open_more_leaves_is_no_example_for_the_next_query(n_jobs):
    # Both queries have leaf 0 first, with three items; one of them leaves one out and has to open leaf 1.
    vectors = np.array([[10], [11], [12], [0], [1], [2]], dtype=np.float32)
    codes = np.array([[0, 2]] * 3 + [[1, 3]] * 3)
    table = LeafTable.build(vectors, codes, branching_factor=2, n_levels=2)
    result = table.search(
        np.zeros((2, 1)), np.zeros((2, 2, 2)), np.array([[0, 1]] * 2), 3,
        n_probes=1, exclude=np.array([0, -1]), n_jobs=n_jobs,
    )  # fmt: skip
    assert result.positions.tolist() == [[3, 4, 5], [0, 1, 2]]
    assert result.stats.leaves_opened == 3


@pytest.mark.parametrize("n_queries", [0, 1, 2, 12])
def test_more_threads_than_queries(cases, n_queries):
    case = cases.make(7, sparsity=2)
    table = cases.build(case)
    arguments = [a[:n_queries] for a in (case.queries, case.level_scores, case.query_codes)]
    one, many = (table.search(*arguments, 5, n_jobs=n_jobs) for n_jobs in (1, 16))
    np.testing.assert_array_equal(one.positions, many.positions)
    assert one.stats == many.stats
    one, many = (table.radius_search(*arguments, 1.5, n_jobs=n_jobs) for n_jobs in (1, 16))
    np.testing.assert_array_equal(one.positions, many.positions)
    assert one.indptr.tolist() == many.indptr.tolist()


@pytest.mark.parametrize("n_neighbors", [1, 16, 49, 300])
def test_opening_all_leaves_equals_an_exhaustive_search_to_the_last_tie(cases, n_neighbors):
    case = cases.make(1, sparsity=2, spread=3)
    squares = ((case.queries[:, None] - case.vectors) ** 2).sum(axis=2)
    expected = np.argsort(squares, axis=1, kind="stable")[:, :n_neighbors]
    result = cases.build(case).search(
        case.queries, case.level_scores, case.query_codes, n_neighbors, n_probes=10**6
    )
    np.testing.assert_array_equal(result.positions, expected)
    assert result.stats.suf() == 1.0
    assert result.n_found == n_neighbors


def test_equal_vectors_have_equal_distances_wherever_they_lie(cases):
    rng = np.random.default_rng(0)
    vector = rng.normal(size=(1, 67)).astype(np.float32)
    n_items = 201
    table = LeafTable.build(
        np.repeat(vector, n_items, axis=0), rng.integers(0, 7, (n_items, 1)), branching_factor=7, n_levels=1
    )
    queries = np.concatenate([vector, rng.normal(size=(6, 67)).astype(np.float32)])
    scores = np.zeros((7, 1, 7), np.float32)
    result = table.search(queries, scores, np.zeros((7, 1), int), n_items, n_probes=7)
    assert (result.distances == result.distances[:, :1]).all()
    assert (result.positions == np.arange(n_items)).all()
    assert (result.distances[0] == 0).all()


@pytest.mark.parametrize("n_jobs", [1, 2, 3])
def test_results_do_not_depend_on_threads_or_on_how_queries_are_split(cases, n_jobs, monkeypatch):
    monkeypatch.setattr("hqsearch.search.batches._SLICE", 7)
    rng = np.random.default_rng(2)
    case = cases.make(3, n_items=900, n_queries=40, embedding_dim=19, sparsity=2)
    case.vectors = rng.normal(size=case.vectors.shape).astype(np.float32)
    case.queries = rng.normal(size=case.queries.shape).astype(np.float32)
    table = cases.build(case)
    whole = table.search(case.queries, case.level_scores, case.query_codes, 12, n_probes=6, n_jobs=n_jobs)
    total = SearchStats()
    for i in range(40):
        one = table.search(
            case.queries[i : i + 1], case.level_scores[i : i + 1], case.query_codes[i : i + 1], 12, n_probes=6
        )
        np.testing.assert_array_equal(one.positions[0], whole.positions[i])
        np.testing.assert_array_equal(one.distances[0], whole.distances[i])
        total += one.stats
    assert total == whole.stats


def test_results_do_not_depend_on_the_order_of_storage(cases):
    case = cases.make(4, sparsity=2)
    rng = np.random.default_rng(4)
    case.vectors = rng.normal(size=case.vectors.shape).astype(np.float32)
    shuffle = rng.permutation(300)
    arguments = (case.queries, case.level_scores, case.query_codes, 8)
    straight = cases.build(case).search(*arguments)
    case.vectors, case.codes = case.vectors[shuffle], case.codes[shuffle]
    shuffled = cases.build(case).search(*arguments)
    np.testing.assert_array_equal(shuffle[shuffled.positions], straight.positions)
    np.testing.assert_array_equal(shuffled.distances, straight.distances)


def test_one_item_and_no_query_and_no_item_are_served():
    vector = np.array([[3.0, 4.0]], dtype=np.float32)
    one = LeafTable.build(vector, np.array([[8]]), branching_factor=3, n_levels=2)
    scores = np.zeros((1, 2, 3), np.float32)
    result = one.search(np.zeros((1, 2), np.float32), scores, np.array([[0]]), 1)
    assert (result.positions.tolist(), result.distances.tolist()) == ([[0]], [[5.0]])
    assert (result.stats.leaves_opened, result.stats.empty_leaves) == (2, 1)
    nothing = one.search(np.zeros((0, 2), np.float32), scores[:0], np.zeros((0, 1), int), 1)
    assert nothing.positions.shape == (0, 1)
    assert np.isnan(nothing.stats.suf())
    empty = LeafTable.build(
        np.zeros((0, 2), np.float32), np.zeros((0, 1), int), branching_factor=3, n_levels=2
    )
    result = empty.search(np.zeros((1, 2), np.float32), scores, np.array([[0]]), 2)
    assert (result.positions.tolist(), result.n_found, empty.n_leaves_) == ([[-1, -1]], 0, 0)
    assert np.isinf(result.distances).all()


def test_a_billion_leaves_cost_nothing_until_they_hold_items():
    rng = np.random.default_rng(0)
    codes = np.sort(rng.choice(10**9, 500, replace=False))[:, None]
    vectors = rng.normal(size=(500, 4)).astype(np.float32)
    table = LeafTable.build(vectors, codes, branching_factor=1000, n_levels=3)
    scores = rng.normal(size=(5, 3, 1000)).astype(np.float32)
    result = table.search(vectors[:5], scores, np.full((5, 1), 123), 20)
    assert result.n_found == 20
    assert result.stats.leaves_opened == 5 * 21
    assert table.nbytes < 100_000


def test_leaves_list_their_items(cases):
    case = cases.make(6, sparsity=2)
    table = cases.build(case)
    assert table.occupied_leaves().tolist() == np.unique(case.codes).tolist()
    assert table.n_leaves_ == np.unique(case.codes).size
    for leaf, size in zip(table.occupied_leaves(), table.leaf_sizes(), strict=True):
        expected = np.flatnonzero((case.codes == leaf).any(axis=1))
        assert table.items_in_leaf(leaf).tolist() == expected.tolist()
        assert size == expected.size
    assert table.items_in_leaf(63).size == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": np.zeros((3, 0))}, "vectors of shape"),
        ({"vectors": np.zeros(3)}, "vectors of shape"),
        ({"vectors": np.full((3, 2), np.nan)}, "vectors contains NaN"),
        ({"vectors": np.full((3, 2), np.inf)}, "vectors contains NaN"),
        ({"codes": np.zeros((2, 1), int)}, r"codes of shape \(3, sparsity >= 1\), got \(2, 1\)"),
        ({"codes": np.zeros((3, 1))}, "integer dtype, got float64"),
        ({"codes": np.array([[0], [1], [-1]])}, r"codes in \[0, 9\), got -1 to 1"),
        ({"codes": np.array([[0], [1], [9]])}, r"codes in \[0, 9\), got 0 to 9"),
        ({"codes": np.array([[0, 1], [1, 1], [0, 2]])}, "a leaf twice"),
        ({"branching_factor": 0}, "branching_factor >= 1"),
        ({"branching_factor": 2**40}, r"<= 2 \*\* 62"),
        ({"storage": "float8"}, "storage to be one of"),
        ({"storage": "float16", "vectors": np.full((3, 2), 1e5)}, "within ±65504"),
    ],
)
def test_build_refuses_wrong_input(change, message):
    arguments = {
        "vectors": np.zeros((3, 2)),
        "codes": np.zeros((3, 1), int),
        "branching_factor": 3,
        "n_levels": 2,
    }
    with pytest.raises(ValueError, match=message):
        LeafTable.build(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": np.zeros((2, 3))}, r"queries of shape \(n_queries, 2\), got \(2, 3\)"),
        ({"queries": np.full((2, 2), np.nan)}, "queries contains NaN"),
        ({"level_scores": np.zeros((2, 2, 4))}, r"level_scores of shape \(2, 2, 3\)"),
        ({"level_scores": np.full((2, 2, 3), np.nan)}, "level_scores contains NaN"),
        ({"codes": np.zeros((3, 1), int)}, "codes of shape"),
        ({"n_neighbors": 0}, "n_neighbors to be an integer >= 1, got 0"),
        ({"n_neighbors": 1.5}, "n_neighbors to be an integer >= 1, got 1.5"),
        ({"n_probes": 0}, "n_probes to be an integer >= 1, got 0"),
        ({"probing": "depth"}, "probing to be one of"),
        ({"exclude": np.array([0])}, r"exclude of shape \(2,\)"),
        ({"exclude": np.array([0, 3])}, r"exclude in \[-1, 3\)"),
        ({"allowed": np.ones(2, bool)}, r"allowed of shape \(3,\)"),
        ({"allowed": np.ones(3, int)}, "dtype bool"),
    ],
)
def test_search_refuses_wrong_input(change, message):
    table = LeafTable.build(np.zeros((3, 2)), np.array([[0], [1], [2]]), branching_factor=3, n_levels=2)
    arguments = {
        "queries": np.zeros((2, 2), np.float32), "level_scores": np.zeros((2, 2, 3), np.float32),
        "codes": np.zeros((2, 1), int), "n_neighbors": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        table.search(**(arguments | change))


def test_stats_add_up():
    one = SearchStats(1, 2, 3, 4, 5, 10)
    assert one + one == SearchStats(2, 4, 6, 8, 10, 20)
    assert one.suf() == 2.0
    assert SearchStats(items=1).suf() == float("inf")
