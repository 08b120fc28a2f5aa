"""Other indexes on an embedding: exhaustive search, faiss IVF-Flat over nprobe, HNSW over ef."""

from __future__ import annotations

import time

import faiss
import numpy as np
from paper_goals import KS

from hqsearch.metrics import precision_at_k, recall_at_k

# Times are of one thread, as those of our search.
faiss.omp_set_num_threads(1)

PROBES = (1, 2, 4, 8, 16, 32, 64, 128)
# From one on: below k it is k.
EFS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def measure(y, labels, ks=KS):
    """Precision and recall at each k from the neighbours' labels."""
    return {f"P@{k}": precision_at_k(y, labels[:, :k]) for k in ks} | {
        f"R@{k}": recall_at_k(y, labels[:, :k]) for k in ks
    }


def _without_own(ids, own, k):
    """First `k` ids of each row that are not the query itself."""
    kept = ids != own[:, None]
    order = np.argsort(~kept, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1)[:, :k]


def _ivf(system, direction, gallery, queries, own, y, base_y, n_lists):
    """Search IVF-Flat over nprobe; as our index does, a query goes on to further lists until k are found."""
    quantizer = faiss.IndexFlatL2(gallery.shape[1])
    ivf = faiss.IndexIVFFlat(quantizer, gallery.shape[1], int(n_lists))
    # faiss asks for 39 items a list and warns below; few lists of few items are what is asked here.
    ivf.cp.min_points_per_centroid = 1
    ivf.train(gallery)
    ivf.add(gallery)
    sizes = np.array([ivf.invlists.list_size(i) for i in range(n_lists)])
    left_out = bool(own[0] >= 0)
    n_items = len(gallery) - left_out
    # Candidates in the nearest list, in the two nearest, ...; a query's own list, its nearest, has it too.
    candidates = sizes[quantizer.search(queries, int(n_lists))[1]].cumsum(1) - left_out
    curve = []
    for nprobe in [p for p in PROBES if p <= n_lists]:
        point = {"nprobe": nprobe}
        for k in (1, 16):
            probed = np.maximum(nprobe, 1 + (candidates < min(k, n_items)).sum(1))
            ids = _probe(ivf, queries, probed, k + left_out)
            n_scored = np.take_along_axis(candidates, probed[:, None] - 1, 1).mean()
            ids = _without_own(ids, own, k)
            # Of fewer than k items there are not k.
            hit = (base_y[ids] == y[:, None]) & (ids >= 0)
            point |= {f"SUF@{k}": n_items / n_scored, f"P@{k}": float(hit.mean())}
        curve.append(point)
    yield {"system": system, "s": None, "direction": direction, "n_lists": int(n_lists), "curve": curve}


def _probe(ivf, queries, probed, n_asked):
    """Ids that IVF finds in as many lists as each query is to probe."""
    ids = np.empty((len(queries), n_asked), np.int64)
    for nprobe in np.unique(probed):
        rows = probed == nprobe
        ivf.nprobe = int(nprobe)
        ids[rows] = ivf.search(queries[rows], n_asked)[1]
    return ids


def _hnsw_curve(gallery, queries, own, y, base_y, encode_us):
    """Points of HNSW over ef.

    hnswlib, which is timed, does not count its distances; faiss does, whose graph has the same parameters.
    Speed-up and precision are of that one graph, hnswlib's precision stands beside them.
    """
    # Not for the other peers.
    import hnswlib

    n_links, ef_construction = 16, 200
    graph = hnswlib.Index("l2", gallery.shape[1])
    graph.init_index(len(gallery), M=n_links, ef_construction=ef_construction, random_seed=0)
    graph.set_num_threads(1)
    graph.add_items(gallery)
    counted = faiss.IndexHNSWFlat(gallery.shape[1], n_links)
    counted.hnsw.efConstruction = ef_construction
    counted.add(gallery)
    left_out = bool(own[0] >= 0)
    for ef in EFS:
        point = {"ef": ef}
        for k in (1, 16):
            n_asked = min(k + left_out, len(gallery))
            graph.set_ef(max(ef, n_asked))
            started = time.perf_counter()
            ids = graph.knn_query(queries, n_asked)[0].astype(np.int64)
            us = encode_us + 1e6 * (time.perf_counter() - started) / len(y)
            counted.hnsw.efSearch = max(ef, n_asked)
            faiss.cvar.hnsw_stats.reset()
            counted_ids = counted.search(queries, n_asked)[1]
            n_distances = faiss.cvar.hnsw_stats.ndis / len(queries) - left_out
            point[f"SUF@{k}"] = (len(gallery) - left_out) / n_distances
            for name, found in ((f"P@{k}", counted_ids), (f"hnswlib P@{k}", ids)):
                point[name] = precision_at_k(y, base_y[_without_own(found, own, k)])
        # Of the 16 neighbours, which were asked for last.
        point["us"] = us
        yield point


def search_as_many_lists(vectors, n_leaves, places):
    """IVF-Flat with as many lists as our index has leaves: the same table, but for who made its cells."""
    for direction, base in places.directions.items():
        gallery, queries = (np.ascontiguousarray(vectors[name], np.float32) for name in (base, "query"))
        own = np.arange(len(queries)) if base == "query" else np.full(len(queries), -1)
        y, base_y = places.labels["query"], places.labels[base]
        n_lists = min(n_leaves[direction], len(gallery))
        yield from _ivf("IVF-Flat, as many lists", direction, gallery, queries, own, y, base_y, n_lists)


def search_peers(system, vectors, encode_us, places, *, n_lists=None):
    """Exhaustive search of an embedding, and with `n_lists` IVF-Flat over nprobe and HNSW over ef."""
    for direction, base in places.directions.items():
        gallery, queries = (np.ascontiguousarray(vectors[name], np.float32) for name in (base, "query"))
        y, base_y = places.labels["query"], places.labels[base]
        own = np.arange(len(y)) if base == "query" else np.full(len(y), -1)
        n_asked = min(max(KS) + (base == "query"), len(gallery))
        flat = faiss.IndexFlatL2(gallery.shape[1])
        flat.add(gallery)
        flat.search(queries[:64], n_asked)  # starts what a first search starts
        started = time.perf_counter()
        ids = flat.search(queries, n_asked)[1]
        us = encode_us + 1e6 * (time.perf_counter() - started) / len(y)
        measured = measure(y, base_y[_without_own(ids, own, max(KS))])
        suf = {f"SUF@{k}": 1.0 for k in KS}
        yield {"system": system, "s": None, "direction": direction, "us": us, **measured, **suf}
        if n_lists is None:
            continue
        yield from _ivf("IVF-Flat", direction, gallery, queries, own, y, base_y, n_lists)
        yield {"system": "HNSW", "s": None, "direction": direction} | {
            "curve": list(_hnsw_curve(gallery, queries, own, y, base_y, encode_us))
        }
