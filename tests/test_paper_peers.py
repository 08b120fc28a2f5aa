"""Other indexes in the papers' experiments, against plain loops; what kept records are told apart by."""

import faiss
import numpy as np
import paper
import pytest
from paper_peers import _ivf


@pytest.mark.parametrize("among_themselves", [False, True])
@pytest.mark.parametrize(("n_items", "n_lists"), [(300, 40), (12, 3)])
def test_ivf_goes_on_to_further_lists_until_k_are_found(among_themselves, n_items, n_lists):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, n_items)
    X = (rng.normal(size=(10, 4))[y] + rng.normal(size=(n_items, 4))).astype(np.float32)
    queries = X if among_themselves else X + rng.normal(scale=0.1, size=X.shape).astype(np.float32)
    own = np.arange(n_items) if among_themselves else np.full(n_items, -1)
    (record,) = _ivf("IVF-Flat", "test->test", X, queries, own, y, y, n_lists)
    # The same lists once more.
    quantizer = faiss.IndexFlatL2(4)
    ivf = faiss.IndexIVFFlat(quantizer, 4, n_lists)
    ivf.cp.min_points_per_centroid = 1
    ivf.train(X)
    list_of = quantizer.search(X, 1)[1][:, 0]
    distances = np.square(queries[:, None] - quantizer.reconstruct_n(0, n_lists)).sum(-1)
    n_others = n_items - among_themselves
    for point in record["curve"]:
        for k in (1, 16):
            n_scored, hits = [], []
            for i, order in enumerate(distances.argsort(1)):
                found = np.empty(0, int)
                for n_probed, cell in enumerate(order):
                    if n_probed >= point["nprobe"] and len(found) >= k:
                        break
                    members = np.flatnonzero(list_of == cell)
                    found = np.concatenate([found, members[members != own[i]]])
                n_scored.append(len(found))
                nearest = found[np.square(X[found] - queries[i]).sum(1).argsort()][:k]
                hits.append((y[nearest] == y[i]).sum() / k)
            assert point[f"P@{k}"] == pytest.approx(np.mean(hits))
            assert point[f"SUF@{k}"] == pytest.approx(n_others / np.mean(n_scored))


def test_data_that_are_cut_or_shaped_otherwise_are_other_data():
    items = np.arange(12, dtype=np.uint8)

    def digest_of(*arrays):
        return paper.digest(buffer for array in arrays for buffer in paper.buffers_of(array))

    kinds = [(items,), (items[:5], items[5:]), (items[:6], items[6:]), (items.reshape(3, 4),)]
    kinds += [(items.view(np.int8),), (items.astype(float),)]
    assert len({digest_of(*arrays) for arrays in kinds}) == len(kinds)
    assert digest_of(items[::2]) == digest_of(items[::2].copy())
