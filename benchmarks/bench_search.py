"""Searching by leaves against the usual indexes: throughput, latency, precision, memory, growth.

``python benchmarks/bench_search.py`` writes ``benchmarks/results/bench_search.{json,md,png}``; ``--large``
adds a million items, ``--smallest`` runs everything at toy size (a smoke test), ``--sets glyph100 digits``
runs real items with a trained encoder and writes ``bench_search_storage.{json,md,png}``.

The made-up data can be made anywhere. 1000 class centres lie on the unit sphere; a vector is its class's
centre plus Gaussian noise, as wide as lets an exhaustive search reach a precision@16 of about 0.95. The
trained encoder is simulated: each class has a code of its own (two levels; the classes share first-level
buckets), an item or query gets its class's code, but with probability 0.05 that of one of the five classes
whose centres are nearest. With sparsity 4 one of the four leaves is, with probability 0.15, another one of
the same parent. Level scores are 1 at the code's buckets, plus uniform noise under 1.

The real items are scikit-learn's digits (70 % to train on and to search, 30 % as queries, three seeds) and
the glyphs of ``--glyph100`` (queries are glyphs of font families that training never saw). Training on those
takes minutes, so ``--cache`` keeps what the encoder made of them.

The peers see the same vectors; IVF indexes have as many lists as there are classes, trained by faiss on the
items themselves, and every peer is swept over its own parameter. Ours are a table, asked for the leaves of
the queries' codes (`probing="best_first"` of an index), and "hqsearch, centroids", the items of an index with
its default listing and probing, which ranks all leaves first. "At equal precision" compares either, opening
as many leaves as a code has, with the peer's fastest setting whose precision@16 is at most 0.005 lower or,
where none gets there, with its most precise one. A method answers as many of the queries as it can in about
a second, timings alternate between the methods within a run, and medians are reported, because machines are
shared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
from search_data import NOISE, digits_data, glyph_data, make_data, simulate_encoder
from search_peers import build_peer
from search_report import write_results

from hqsearch.items import FittedItems
from hqsearch.search import LeafTable

RESULTS = Path(__file__).parent / "results"
K = 16
BURST = 20
STORAGES = ("float32", "float16", "int8")
CENTROIDS = "hqsearch, centroids"
FEW = ["faiss Flat", "faiss IVF-Flat", "hnswlib"]
EVERY = [*FEW, "faiss IVF-PQ", "pynndescent", "sklearn brute", "sklearn ball tree"]


class Method:
    """An index at one setting: how to ask it, and what is known of it before it is timed."""

    def __init__(self, name, setting, search, build_seconds, n_bytes, sparsity=None):
        self.name, self.setting, self.sparsity = name, setting, sparsity
        self.search, self.build_seconds, self.n_bytes = search, build_seconds, n_bytes
        self.n_queries, self.batch_seconds, self.single_seconds = 0, [], []

    def time(self, rows, seconds):
        """Search for rows of the queries; append what it took to a list."""
        start = time.perf_counter()
        found = self.search(rows, self.setting)
        seconds.append(time.perf_counter() - start)
        return found


def our_methods(data, codes, sparsity, threads):
    """Build our table in each storage."""
    methods = []
    queries = data["queries"]
    for storage in STORAGES:
        start = time.perf_counter()
        table = LeafTable.build(
            data["vectors"], codes["codes"], branching_factor=codes["factor"], n_levels=2, storage=storage
        )
        seconds = time.perf_counter() - start

        def search(rows, n_probes, table=table):
            return table.search(
                queries[rows], codes["scores"][rows], codes["query_codes"][rows], K,
                n_probes=n_probes, n_jobs=threads,
            )  # fmt: skip

        # Kernels are compiled, or read from their cache, by the first calls.
        search(slice(0, 300), None)
        search(slice(0, 1), None)
        name = "hqsearch" if storage == "float32" else f"hqsearch {storage}"
        for n_probes in (None, 4, 8) if storage == "float32" else (None,):
            methods.append(Method(name, n_probes, search, seconds, table.nbytes, sparsity))
    if "describe_items" in codes:
        methods += centroid_methods(data, codes, sparsity, threads)
    return methods


def centroid_methods(data, codes, sparsity, threads):
    """Build the items of an index, which ranks all leaves by their centroids before it opens some."""
    start = time.perf_counter()
    items = FittedItems.from_blocks(
        codes["describe_items"](),
        branching_factor=codes["factor"],
        n_levels=2,
        listing="centroids",
        n_jobs=threads,
    )
    seconds = time.perf_counter() - start

    def search(rows, n_probes):
        described = data["queries"][rows], codes["scores"][rows], codes["query_codes"][rows]
        return items.search(described, K, n_probes=n_probes, n_jobs=threads)

    search(slice(0, 300), None)
    search(slice(0, 1), None)
    n_bytes = items.table.nbytes + items.centroids.nbytes
    return [Method(CENTROIDS, n_probes, search, seconds, n_bytes, sparsity) for n_probes in (None, 4)]


def peer_methods(data, names, n_lists, threads):
    """Build the peers."""
    methods = []
    for name in names:
        print(f"  building {name}", flush=True)
        peer = build_peer(name, data["vectors"], K, n_lists, threads)
        for setting in peer.settings:
            methods.append(
                Method(
                    name, setting, lambda rows, s, p=peer: p.search(data["queries"][rows], s),
                    peer.build_seconds, peer.n_bytes,
                )
            )  # fmt: skip
    return methods


def count_affordable(method, queries, sizes):
    """Count the queries that a method answers in the time that it has; small batches say little."""
    n_queries = min(len(queries), sizes["first_queries"])
    while True:
        seconds = []
        method.time(slice(0, n_queries), seconds)
        method.time(slice(0, n_queries), seconds)
        affordable = int(n_queries * sizes["seconds"] / min(seconds))
        if n_queries == len(queries) or affordable < 8 * n_queries:
            return min(len(queries), max(n_queries, affordable))
        n_queries = min(len(queries), 4 * n_queries)


def measure(data, methods, sizes):
    """Time all methods in turns; return one record for each."""
    records, positions = [], []
    for method in methods:
        print(f"  {method.name} {method.setting}", flush=True)
        ours = method.name.startswith("hqsearch")
        method.n_queries = len(data["queries"]) if ours else count_affordable(method, data["queries"], sizes)
        found = method.time(slice(0, method.n_queries), [])
        positions.append(found.positions if ours else found)
        records.append(
            {
                "method": method.name, "setting": method.setting, "sparsity": method.sparsity,
                "n_queries": method.n_queries, "build_seconds": method.build_seconds, "bytes": method.n_bytes,
                "bytes_ratio": None if method.n_bytes is None else method.n_bytes / data["vectors"].nbytes,
                "suf": found.stats.suf() if ours else None,
            }
        )  # fmt: skip
    for _ in range(sizes["repeats"]):
        for method in methods:
            method.time(slice(0, method.n_queries), method.batch_seconds)
    # In bursts: right after another method's threads, a query finds cold caches and busy cores.
    for first in range(0, min(sizes["single"], len(data["queries"])), BURST):
        for method in methods:
            if sum(method.single_seconds) < sizes["seconds"]:
                for i in range(first, min(first + BURST, len(data["queries"]))):
                    method.time(slice(i, i + 1), method.single_seconds)
    truth = next(found for found, m in zip(positions, methods, strict=True) if m.name == "faiss Flat")[:, :10]
    for record, method, found in zip(records, methods, positions, strict=True):
        for k in (1, 4, 16):
            hits = data["labels"][found[:, :k]] == data["query_labels"][: len(found), None]
            record[f"precision@{k}"] = float(hits.mean())
        n = min(len(found), len(truth))
        pairs = zip(found[:n, :10].tolist(), truth[:n].tolist(), strict=True)
        record["recall@10"] = sum(len(set(a) & set(b)) for a, b in pairs) / (10 * n)
        record["queries_per_second"] = method.n_queries / statistics.median(method.batch_seconds)
        record["p50_us"], record["p99_us"] = (
            float(np.quantile(method.single_seconds, q)) * 1e6 for q in (0.5, 0.99)
        )
    return records


def compare(records, sparsity, method):
    """Set one of our methods at one sparsity against each peer at equal precision; return ratios."""
    ours = next(r for r in records if r["method"] == method and r["sparsity"] == sparsity)
    verdict = {}
    for name in dict.fromkeys(r["method"] for r in records if not r["method"].startswith("hqsearch")):
        rows = [r for r in records if r["method"] == name]
        good = [r for r in rows if r["precision@16"] >= ours["precision@16"] - 0.005]
        best = (
            max(good, key=lambda r: r["queries_per_second"])
            if good
            else max(rows, key=lambda r: r["precision@16"])
        )
        verdict[name] = {
            "setting": best["setting"], "equal_precision": bool(good),
            "throughput_ratio": ours["queries_per_second"] / best["queries_per_second"],
            "latency_ratio": ours["p50_us"] / best["p50_us"],
            "fastest_setting_ratio": ours["queries_per_second"] / max(r["queries_per_second"] for r in rows),
        }  # fmt: skip
    verdict["faiss Flat"]["share_of_suf"] = verdict["faiss Flat"]["throughput_ratio"] / ours["suf"]
    return {"method": method, "sparsity": sparsity, "suf": ours["suf"], "peers": verdict}


def measure_set(title, data, coded, names, n_lists, sizes, threads):
    """Measure one data set; `coded` maps each sparsity to its codes."""
    print(title, flush=True)
    methods = [m for sparsity, codes in coded.items() for m in our_methods(data, codes, sparsity, threads)]
    methods += peer_methods(data, names, n_lists, threads)
    records = measure(data, methods, sizes)
    return {
        "title": title, "n_items": len(data["vectors"]), "embedding_dim": data["vectors"].shape[1],
        "records": records,
        "comparison": [
            compare(records, sparsity, name)
            for name in ("hqsearch", CENTROIDS)
            if any(r["method"] == name for r in records)
            for sparsity in coded
        ],
    }  # fmt: skip


def measure_growth(n_items, n_classes, sizes, threads, seed):
    """Our own figures for one table size."""
    data = make_data(n_items, 64, sizes["queries"], n_classes, seed)
    data |= simulate_encoder(data, 1, seed)
    start = time.perf_counter()
    table = LeafTable.build(data["vectors"], data["codes"], branching_factor=data["factor"], n_levels=2)
    seconds = time.perf_counter() - start
    arguments = (data["queries"], data["scores"], data["query_codes"])
    times, alone = [], []
    for _ in range(sizes["repeats"]):
        start = time.perf_counter()
        found = table.search(*arguments, K, n_jobs=threads)
        times.append(time.perf_counter() - start)
    for i in range(min(sizes["single"], sizes["queries"])):
        start = time.perf_counter()
        table.search(*(a[i : i + 1] for a in arguments), K)
        alone.append(time.perf_counter() - start)
    return {
        "n_items": n_items, "n_leaves": table.n_leaves_, "build_seconds": seconds, "suf": found.stats.suf(),
        "queries_per_second": sizes["queries"] / statistics.median(times),
        "p50_us": float(np.median(alone)) * 1e6, "bytes_ratio": table.nbytes / data["vectors"].nbytes,
    }  # fmt: skip


def measure_changes(n_items, n_added, seed):
    """Seconds of single adds and removes on a table of `n_items`."""
    data = make_data(n_items + n_added, 64, 1, 1000, seed)
    data |= simulate_encoder(data, 1, seed)
    vectors, codes = data["vectors"], data["codes"]
    table = LeafTable.build(vectors[:n_items], codes[:n_items], branching_factor=data["factor"], n_levels=2)
    table.add(vectors[:2000], codes[:2000])
    start = time.perf_counter()
    for i in range(n_items, n_items + n_added):
        table = table.add(vectors[i : i + 1], codes[i : i + 1])
    added = time.perf_counter() - start
    start = time.perf_counter()
    for i in range(0, n_added, 10):
        table = table.remove([i])
    removed = time.perf_counter() - start
    return {
        "n_items": n_items, "single_adds": n_added, "add_seconds": added,
        "single_removes": len(range(0, n_added, 10)), "remove_seconds": removed,
    }  # fmt: skip


def describe_run(options):
    """Everything about a run that is not a measurement."""
    result = {
        "machine": machine.describe(), "seed": options.seed, "threads": options.threads, "versions": {},
        "sets": [], "growth": [], "changes": [],
    }  # fmt: skip
    for package in ("numpy", "numba", "faiss-cpu", "hnswlib", "pynndescent", "scikit-learn"):
        try:
            result["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def run_real(options, sizes, result, folder):
    """Measure items that an encoder was trained on."""
    for name in options.sets:
        if name == "glyph100" and not options.glyph100.is_file():
            print(f"glyph100 skipped: there is no file {options.glyph100}")
            continue
        for seed in (0,) if name == "glyph100" else range(3):
            if name == "glyph100":
                data = glyph_data(options.glyph100, options.cache)
            else:
                data = digits_data(seed, options.cache)
            # Methods that are too slow for all queries get a fair sample of them.
            order = np.random.default_rng(seed).permutation(len(data["queries"]))
            data |= {part: data[part][order] for part in ("queries", "query_labels", "query_codes", "scores")}
            n_classes = len(np.unique(data["labels"]))
            title = f"{name}, seed {seed}"
            block = measure_set(title, data, {1: data}, FEW, n_classes, sizes, options.threads)
            result["sets"].append(block)
            write_results(result, folder, "bench_search_storage")


def run_made_up(options, sizes, result, folder):
    """Measure made-up items, then growth and changes."""
    runs = [(200_000, 64, (1, 4), EVERY), (200_000, 256, (1, 4), [*FEW, "faiss IVF-PQ"])]
    n_classes, changes = 1000, [(200_000, 100_000)]
    growth = [(10_000, 10), (100_000, 100), (1_000_000, 1000), (10_000, 1000), (100_000, 1000)]
    if options.large:
        # hnswlib, IVF-PQ and pynndescent take from minutes to most of an hour to build over a million items.
        peers = [*FEW, "faiss IVF-PQ", "pynndescent"] if options.all_peers else FEW[:2]
        runs += [(1_000_000, 64, (1, 4), peers), (1_000_000, 256, (1, 4), peers)]
    if options.smallest:
        runs, n_classes, growth, changes = [(3000, 16, (1, 2), FEW)], 40, [(1000, 10)], [(1000, 500)]
    for n_items, dim, sparsities, names in runs:
        data = make_data(n_items, dim, sizes["queries"], n_classes, options.seed)
        coded = {sparsity: simulate_encoder(data, sparsity, options.seed) for sparsity in sparsities}
        names = [name for name in names if options.peers is None or name in ("faiss Flat", *options.peers)]
        title = f"{n_items} items, {dim} dimensions, noise {NOISE[dim]}"
        result["sets"].append(measure_set(title, data, coded, names, n_classes, sizes, options.threads))
        write_results(result, folder, "bench_search")
        del data, coded
    for n_items, n_leaves in growth:
        result["growth"].append(measure_growth(n_items, n_leaves, sizes, options.threads, options.seed))
    for n_items, n_added in changes:
        result["changes"].append(measure_changes(n_items, n_added, options.seed))
    write_results(result, folder, "bench_search")


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smallest", action="store_true", help="toy sizes, seconds: a smoke test")
    parser.add_argument("--large", action="store_true", help="add the data sets of a million items")
    parser.add_argument(
        "--all-peers", action="store_true", help="with --large, graphs and PQ over a million too"
    )
    parser.add_argument("--sets", nargs="*", choices=("glyph100", "digits"), help="real items instead")
    parser.add_argument("--glyph100", type=Path, default=Path("../shared/data/glyph100.npz"))
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "hqsearch", help="where encodings are kept"
    )
    parser.add_argument("--peers", nargs="*", help="only these peers, for example 'faiss IVF-Flat'")
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    options = parser.parse_args()
    # A method answers what it can in so many seconds, but at least the first queries.
    sizes = {
        "queries": options.queries, "first_queries": 50, "seconds": 1.0,
        "repeats": options.repeats, "single": 1000,
    }  # fmt: skip
    if options.smallest:
        sizes = {"queries": 300, "first_queries": 50, "seconds": 0.05, "repeats": 2, "single": 20}
    elif options.sets:
        sizes["seconds"] = 4.0
    folder = options.output or (Path(tempfile.mkdtemp()) if options.smallest else RESULTS)
    run = run_real if options.sets else run_made_up
    run(options, sizes, describe_run(options), folder)


if __name__ == "__main__":
    main()
