import numpy as np
import pytest

faiss = pytest.importorskip("faiss")


@pytest.mark.parametrize("sparsity", [1, 3])
@pytest.mark.parametrize("n_probes", [None, 7])
def test_faiss_returns_the_same_neighbours_from_the_same_leaves(cases, sparsity, n_probes):
    case = cases.make(30, n_items=1500, sparsity=sparsity)
    rng = np.random.default_rng(0)
    case.vectors = rng.normal(size=case.vectors.shape).astype(np.float32)
    case.queries = rng.normal(size=case.queries.shape).astype(np.float32)
    first = np.arange(1500) < 300
    table = cases.build(case).remove([5, 6])
    grown = type(table).build(case.vectors[first], case.codes[first], **case.shape)
    grown = grown.add(case.vectors[~first], case.codes[~first]).remove([5, 6])
    for searched in (table, grown):
        expected = searched.search(case.queries, case.level_scores, case.query_codes, 9, n_probes=n_probes)
        index = searched.to_faiss()
        lists = searched.cells_to_probe(case.level_scores, case.query_codes, 9, n_probes=n_probes)
        index.nprobe = lists.shape[1]
        squares, positions = index.search_preassigned(
            case.queries, 9, lists, np.zeros(lists.shape, np.float32)
        )
        np.testing.assert_array_equal(positions, expected.positions)
        np.testing.assert_allclose(np.sqrt(squares), expected.distances, rtol=1e-5)
        assert index.ntotal == 1498


def test_the_faiss_index_also_searches_by_itself(cases):
    case = cases.make(31, n_items=400)
    index = cases.build(case).to_faiss()
    index.nprobe = index.nlist
    squares, _ = index.search(case.queries, 3)
    true = ((case.queries[:, None] - case.vectors) ** 2).sum(axis=2)
    np.testing.assert_allclose(squares, np.sort(true, axis=1)[:, :3])
