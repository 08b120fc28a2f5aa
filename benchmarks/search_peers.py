"""Peers of the search benchmark: each is built, and says how it is asked and how large it is."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

# Rounds of k-means; faiss runs 25 unless told otherwise, which would take most of the benchmark.
TRAINING_ROUNDS = 10


class Peer:
    """A built index with the settings to sweep: `search(queries, setting)` gives positions."""

    def __init__(self, build, search, settings, size=lambda index: None):
        start = time.perf_counter()
        self.index = build()
        self.build_seconds = time.perf_counter() - start
        self.settings, self.n_bytes = settings, size(self.index)
        self._search = search

    def search(self, queries, setting):
        """Positions of the nearest items."""
        return self._search(self.index, queries, setting)


def build_peer(name, vectors, n_neighbors, n_lists, threads):
    """Build the peer of that name."""
    n_items, dim = vectors.shape
    if name.startswith("faiss"):
        return _build_faiss(name, vectors, n_neighbors, n_lists, threads)
    if name == "hnswlib":
        import hnswlib

        def build():
            index = hnswlib.Index("l2", dim)
            index.init_index(n_items, M=16, ef_construction=100, random_seed=0)
            index.add_items(vectors, num_threads=threads)
            return index

        def search(index, queries, ef):
            index.set_ef(ef)
            return index.knn_query(queries, n_neighbors, num_threads=threads)[0].astype(np.int64)

        def size(index):
            with tempfile.TemporaryDirectory() as folder:
                index.save_index(str(Path(folder) / "index"))
                return (Path(folder) / "index").stat().st_size

        return Peer(build, search, [16, 32, 64, 128], size)
    if name == "pynndescent":
        from pynndescent import NNDescent

        def prepare():
            index = NNDescent(vectors, n_neighbors=20, random_state=0, n_jobs=threads)
            index.prepare()
            return index

        return Peer(
            prepare, lambda i, q, epsilon: i.query(q, n_neighbors, epsilon=epsilon)[0], [0.0, 0.1, 0.2]
        )
    from sklearn.neighbors import NearestNeighbors

    algorithm = {"sklearn brute": "brute", "sklearn ball tree": "ball_tree"}[name]
    model = NearestNeighbors(n_neighbors=n_neighbors, algorithm=algorithm, n_jobs=threads)
    return Peer(lambda: model.fit(vectors), lambda m, q, _: m.kneighbors(q, return_distance=False), [None])


def _build_faiss(name, vectors, n_neighbors, n_lists, threads):
    import faiss

    faiss.omp_set_num_threads(threads)
    n_items, dim = vectors.shape
    centroids = faiss.IndexFlatL2(dim)
    index, settings, code_bytes = {
        "faiss Flat": (centroids, [None], 4 * dim),
        "faiss IVF-Flat": (faiss.IndexIVFFlat(centroids, dim, n_lists), [1, 2, 4, 8, 16], 4 * dim),
        "faiss IVF-PQ": (faiss.IndexIVFPQ(centroids, dim, n_lists, dim // 4, 8), [1, 4, 16], dim // 4),
    }[name]

    def build():
        if name != "faiss Flat":
            index.cp.niter = TRAINING_ROUNDS
            index.train(vectors)
        index.add(vectors)
        return index

    def search(index, queries, n_probes):
        if n_probes is not None:
            index.nprobe = n_probes
        return index.search(queries, n_neighbors)[1]

    n_bytes = n_items * code_bytes
    if name != "faiss Flat":
        n_bytes += 8 * n_items + 4 * n_lists * dim
    peer = Peer(build, search, settings, lambda index: n_bytes)
    # faiss does not keep the quantizer of an IVF index alive.
    peer.centroids = centroids
    return peer
