"""Searching by leaves against the usual indexes: throughput, latency, precision, memory, growth.

``python benchmarks/bench_search.py`` writes ``benchmarks/results/bench_search.{json,md,png}``;
``--smallest`` runs everything at toy size (a smoke test), ``--large`` adds a million items.

The data are made up, so that anyone can run this anywhere. 1000 class centres lie on the unit sphere; a
vector is its class's centre plus Gaussian noise, as wide as lets an exhaustive search reach a precision@16
of about 0.95. The trained encoder is simulated: each class has a code of its own (two levels; the classes
share first-level buckets), an item or query gets its class's code, but with probability 0.05 that of one of
the five classes whose centres are nearest. With sparsity 4 one of the four leaves is, with probability
0.15, another one of the same parent. Level scores are 1 at the code's buckets, plus uniform noise under 1.
The peers see the same vectors; IVF indexes have as many lists as there are classes, trained by faiss on the
items themselves, and every peer is swept over its own parameter. "At equal precision" compares our default
(own leaves only) with the peer's fastest setting whose precision@16 is at most 0.005 lower or, where none
gets there, with its most precise one. Timings alternate between the methods within a run, and medians are
reported, because machines are shared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from hqsearch.search import LeafTable

RESULTS = Path(__file__).parent / "results"
NOISE = {16: 0.2, 64: 0.135, 256: 0.11}
K = 16


def make_data(n_items, embedding_dim, sparsity, n_queries, n_classes, seed):
    """Draw items and queries as the module's docstring says."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_classes, embedding_dim)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    factor = int(np.ceil(np.sqrt(n_classes * sparsity)))
    factor += -factor % sparsity
    slots = rng.permutation(factor * (factor // sparsity))[:n_classes]
    first = slots // (factor // sparsity) * factor + slots % (factor // sparsity) * sparsity
    class_codes = first[:, None] + np.arange(sparsity)
    similarity = centres @ centres.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1)[:, :5]

    def draw(n):
        labels = rng.integers(0, n_classes, n)
        vectors = rng.standard_normal((n, embedding_dim), dtype=np.float32)
        vectors *= NOISE[embedding_dim]
        vectors += centres[labels]
        wrong = rng.random(n) < 0.05
        taken = np.where(wrong, nearest[labels, rng.integers(0, nearest.shape[1], n)], labels)
        codes = class_codes[taken].copy()
        if sparsity > 1:
            other = codes[:, -1] // factor * factor + rng.integers(0, factor, n)
            flipped = (rng.random(n) < 0.15) & (codes != other[:, None]).all(axis=1)
            codes[flipped, -1] = other[flipped]
        return vectors, labels, codes

    vectors, labels, codes = draw(n_items)
    queries, query_labels, query_codes = draw(n_queries)
    scores = rng.random((n_queries, 2, factor), dtype=np.float32)
    rows = np.arange(n_queries)
    scores[rows, 0, query_codes[:, 0] // factor] += 1
    scores[rows[:, None], 1, query_codes % factor] += 1
    return {
        "vectors": vectors, "labels": labels, "codes": codes,
        "queries": queries, "query_labels": query_labels,
        "query_codes": query_codes, "scores": scores, "factor": factor,
    }  # fmt: skip


def build_peers(data, names, n_lists, threads):
    """Build each peer; return {name: (search(queries, setting), settings, build seconds, bytes)}."""
    import faiss

    faiss.omp_set_num_threads(threads)
    vectors = data["vectors"]
    n_items, dim = vectors.shape
    peers = {}

    def timed(name, build, search, settings, size):
        start = time.perf_counter()
        index = build()
        seconds = time.perf_counter() - start
        peers[name] = (lambda q, setting: search(index, q, setting), settings, seconds, size(index))

    def faiss_size(index):
        return len(faiss.serialize_index(index))

    def fill(index):
        if not index.is_trained:
            index.train(vectors)
        index.add(vectors)
        return index

    def probe(index, q, nprobe):
        index.nprobe = nprobe
        return index.search(q, K)[1]

    for name in names:
        if name == "faiss Flat":
            timed(
                name,
                lambda: fill(faiss.IndexFlatL2(dim)),
                lambda i, q, _: i.search(q, K)[1],
                [None],
                faiss_size,
            )
        elif name == "faiss IVF-Flat":
            flat = faiss.IndexFlatL2(dim)
            timed(
                name,
                lambda f=flat: fill(faiss.IndexIVFFlat(f, dim, n_lists)),
                probe,
                [1, 2, 4, 8, 16],
                faiss_size,
            )
        elif name == "faiss IVF-PQ":
            flat = faiss.IndexFlatL2(dim)
            timed(
                name, lambda f=flat: fill(faiss.IndexIVFPQ(f, dim, n_lists, dim // 4, 8)), probe, [1, 4, 16],
                faiss_size,
            )  # fmt: skip
        elif name == "hnswlib":
            import hnswlib

            def build():
                index = hnswlib.Index("l2", dim)
                index.init_index(n_items, M=16, ef_construction=100, random_seed=0)
                index.add_items(vectors, num_threads=threads)
                return index

            def search(index, q, ef):
                index.set_ef(ef)
                return index.knn_query(q, K, num_threads=threads)[0].astype(np.int64)

            def size(index):
                with tempfile.TemporaryDirectory() as folder:
                    index.save_index(str(Path(folder) / "index"))
                    return (Path(folder) / "index").stat().st_size

            timed(name, build, search, [16, 32, 64, 128], size)
        elif name == "pynndescent":
            from pynndescent import NNDescent

            def build():
                index = NNDescent(vectors, n_neighbors=20, random_state=0, n_jobs=threads)
                index.prepare()
                return index

            timed(name, build, lambda i, q, e: i.query(q, K, epsilon=e)[0], [0.0, 0.1, 0.2], lambda i: None)
        else:
            from sklearn.neighbors import NearestNeighbors

            algorithm = {"sklearn brute": "brute", "sklearn ball tree": "ball_tree"}[name]
            model = NearestNeighbors(n_neighbors=K, algorithm=algorithm, n_jobs=threads)
            timed(
                name, lambda m=model: m.fit(vectors), lambda m, q, _: m.kneighbors(q, return_distance=False),
                [None], lambda m: None,
            )  # fmt: skip
    return peers


# Methods that are timed on fewer queries.
SLOW = ("faiss Flat", "pynndescent", "sklearn brute", "sklearn ball tree")


def measure(data, peers, sizes, threads, storages=("float32",)):
    """Time all methods in turns; return one record for each method and setting."""
    queries, labels = data["queries"], data["labels"]
    methods, records = [], []
    for storage in storages:
        start = time.perf_counter()
        table = LeafTable.build(
            data["vectors"], data["codes"], branching_factor=data["factor"], n_levels=2, storage=storage
        )
        seconds = time.perf_counter() - start

        def search(rows, n_probes, table=table, n_jobs=threads):
            return table.search(
                queries[rows],
                data["scores"][rows],
                data["query_codes"][rows],
                K,
                n_probes=n_probes,
                n_jobs=n_jobs,
            )

        search(slice(0, 300), None)
        search(slice(0, 1), None)
        suffix = "" if storage == "float32" else f" {storage}"
        for n_probes in (None, 4, 8) if storage == "float32" else (None,):
            methods.append(("hqsearch" + suffix, n_probes, search, seconds, table.nbytes))
    for name, (peer, settings, seconds, size) in peers.items():
        for setting in settings:
            methods.append((name, setting, lambda rows, s, p=peer: p(queries[rows], s), seconds, size))
    for name, setting, search, seconds, size in methods:
        print(f"  {name} {setting}", flush=True)
        n_queries = min(len(queries), sizes["slow_queries"] if name in SLOW else sizes["queries"])
        found = search(slice(0, n_queries), setting)
        positions = found.positions if name.startswith("hqsearch") else found
        record = {
            "method": name, "setting": setting, "n_queries": n_queries,
            "build_seconds": seconds, "bytes": size,
            "batch_seconds": [], "positions": positions,
            "bytes_ratio": None if size is None else size / data["vectors"].nbytes,
        }  # fmt: skip
        for k in (1, 4, 16):
            hits = labels[positions[:, :k]] == data["query_labels"][:n_queries, None]
            record[f"precision@{k}"] = float(hits.mean())
        if name.startswith("hqsearch"):
            record["suf"] = found.stats.suf()
        records.append(record)
    for _ in range(sizes["repeats"]):
        for record, (_, setting, search, *_) in zip(records, methods, strict=True):
            start = time.perf_counter()
            search(slice(0, record["n_queries"]), setting)
            record["batch_seconds"].append(time.perf_counter() - start)
    alone = [[] for _ in methods]
    for i in range(sizes["single"]):
        for times, (name, setting, search, *_) in zip(alone, methods, strict=True):
            if i < (20 if name in SLOW else sizes["single"]):
                start = time.perf_counter()
                search(slice(i, i + 1), setting)
                times.append(time.perf_counter() - start)
    truth = next(r["positions"][:, :10] for r in records if r["method"] == "faiss Flat")
    for record, times in zip(records, alone, strict=True):
        found = record.pop("positions")
        n = min(len(found), len(truth))
        shared = [
            len(set(a) & set(b)) for a, b in zip(found[:n, :10].tolist(), truth[:n].tolist(), strict=True)
        ]
        record["recall@10"] = float(np.mean(shared)) / 10
        record["queries_per_second"] = record["n_queries"] / statistics.median(record.pop("batch_seconds"))
        record["p50_us"], record["p99_us"] = (float(np.quantile(times, q)) * 1e6 for q in (0.5, 0.99))
    return records


def compare(records):
    """Set our default against each peer at equal precision; return ratios."""
    ours = records[0]
    verdict = {}
    for name in dict.fromkeys(r["method"] for r in records[1:] if not r["method"].startswith("hqsearch")):
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
    return verdict


def measure_growth(n_items, n_classes, sizes, threads, seed):
    """Our own figures for one table size."""
    data = make_data(n_items, 64, 1, sizes["queries"], n_classes, seed)
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
    data = make_data(n_items + n_added, 64, 1, 1, 1000, seed)
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


def write_markdown(result, path):
    """One table for each data set, one for growth."""
    lines = ["# Search: hqsearch against other indexes", "", f"Machine: {result['machine']}; "]
    lines[-1] += ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines[-1] += (
        f"; {result['threads']} threads, seed {result['seed']}. "
        "Data and protocol: `benchmarks/bench_search.py`."
    )
    for block in result["synthetic"]:
        lines += [
            "",
            "## {n_items} items, {embedding_dim} dimensions, sparsity {sparsity}".format(**block),
            "",
        ]
        lines += [
            "| method | setting | queries/s | p50 µs | p99 µs | P@1 | P@4 | P@16 | recall@10 "
            "| build s | bytes / float32 | SUF |"
        ]
        lines += ["|" + "---|" * 12]
        for r in block["records"]:
            ratio = "" if r["bytes_ratio"] is None else f"{r['bytes_ratio']:.2f}"
            suf = f"{r['suf']:.0f}" if "suf" in r else ""
            lines.append(
                f"| {r['method']} | {'' if r['setting'] is None else r['setting']} "
                f"| {r['queries_per_second']:,.0f} "
                f"| {r['p50_us']:.1f} | {r['p99_us']:.1f} | {r['precision@1']:.3f} | {r['precision@4']:.3f} "
                f"| {r['precision@16']:.3f} | {r['recall@10']:.3f} "
                f"| {r['build_seconds']:.1f} | {ratio} | {suf} |"
            )
        lines += [
            "",
            "| peer | its setting | our throughput / its | our latency / its | over its fastest setting |",
            "|---|---|---|---|---|",
        ]
        for name, v in block["comparison"].items():
            note = "" if v["equal_precision"] else " (less precise)"
            lines.append(
                f"| {name} | {'' if v['setting'] is None else v['setting']}{note} "
                f"| {v['throughput_ratio']:.1f} "
                f"| {v['latency_ratio']:.2f} | {v['fastest_setting_ratio']:.1f} |"
            )
        share = block["comparison"]["faiss Flat"]["share_of_suf"]
        lines += ["", f"Wall-clock over exhaustive faiss Flat search, as a share of SUF: {share:.2f}."]
    lines += ["", "## Growth (64 dimensions, sparsity 1)", ""]
    lines += ["| items | leaves | build s | queries/s | p50 µs | SUF | bytes / float32 |", "|" + "---|" * 7]
    for r in result["growth"]:
        lines.append(
            f"| {r['n_items']} | {r['n_leaves']} | {r['build_seconds']:.2f} | {r['queries_per_second']:,.0f} "
            f"| {r['p50_us']:.1f} | {r['suf']:.0f} | {r['bytes_ratio']:.3f} |"
        )
    lines += ["", "## Changes", ""]
    for r in result["changes"]:
        lines.append(
            "- {n_items} items: {single_adds} single adds in {add_seconds:.2f} s, "
            "{single_removes} single removes in {remove_seconds:.2f} s".format(**r)
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_curves(result, path):
    """Precision against throughput, one panel for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = result["synthetic"]
    figure, axes = plt.subplots(
        1, len(blocks), figsize=(4.5 * len(blocks), 4), squeeze=False, layout="constrained"
    )
    for ax, block in zip(axes[0], blocks, strict=True):
        for name in dict.fromkeys(r["method"] for r in block["records"]):
            rows = [r for r in block["records"] if r["method"] == name]
            ax.plot(
                [r["precision@16"] for r in rows], [r["queries_per_second"] for r in rows], "o-", label=name,
                linewidth=2.5 if name == "hqsearch" else 1, markersize=7 if name == "hqsearch" else 4,
            )  # fmt: skip
        ax.set(
            yscale="log", xlabel="precision@16", ylabel="queries per second",
            title="N = {n_items:,}, d = {embedding_dim}, s = {sparsity}".format(**block),
        )  # fmt: skip
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def write_results(result, folder):
    """Write what is measured so far: a long run that is stopped leaves its finished part."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench_search.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_markdown(result, folder / "bench_search.md")
    draw_curves(result, folder / "bench_search.png")


def main():
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smallest", action="store_true", help="toy sizes, seconds: a smoke test")
    parser.add_argument("--large", action="store_true", help="add the data sets of a million items")
    parser.add_argument("--sets", type=int, nargs="*", help="numbers of the data sets to run, from 0 on")
    parser.add_argument("--peers", nargs="*", help="only these peers, for example 'faiss IVF-Flat'")
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    options = parser.parse_args()
    few = ["faiss Flat", "faiss IVF-Flat", "hnswlib"]
    every = [*few, "faiss IVF-PQ", "pynndescent", "sklearn brute", "sklearn ball tree"]
    sizes = {"queries": options.queries, "slow_queries": 500, "repeats": options.repeats, "single": 1000}
    n_classes, changes = 1000, [(200_000, 100_000)]
    runs = [(200_000, 64, 1, every), (200_000, 64, 4, few), (200_000, 256, 1, few)]
    growth = [(10_000, 10), (100_000, 100), (1_000_000, 1000), (10_000, 1000), (100_000, 1000)]
    if options.large:
        runs += [(1_000_000, 64, 1, few[:2]), (1_000_000, 256, 1, few[:2])]
    if options.sets:
        runs = [runs[i] for i in options.sets]
    if options.smallest:
        sizes = {"queries": 300, "slow_queries": 50, "repeats": 2, "single": 20}
        runs, n_classes, growth, changes = (
            [(3000, 16, 1, few), (3000, 16, 2, few)],
            40,
            [(1000, 10)],
            [(1000, 500)],
        )
    packages = ("numpy", "numba", "faiss-cpu", "hnswlib", "pynndescent", "scikit-learn")
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}", "seed": options.seed,
        "threads": options.threads, "versions": {"python": platform.python_version()},
        "synthetic": [], "growth": [], "changes": [],
    }  # fmt: skip
    for package in packages:
        try:
            result["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    folder = options.output or (Path(tempfile.mkdtemp()) if options.smallest else RESULTS)
    for n_items, dim, sparsity, names in runs:
        data = make_data(n_items, dim, sparsity, sizes["queries"], n_classes, options.seed)
        names = [name for name in names if options.peers is None or name in ("faiss Flat", *options.peers)]
        peers = build_peers(data, names, n_classes, options.threads)
        storages = ("float32", "float16", "int8")
        records = measure(data, peers, sizes, options.threads, storages)
        block = {
            "n_items": n_items, "embedding_dim": dim, "sparsity": sparsity, "noise": NOISE[dim],
            "records": records,
            "comparison": compare(records),
        }  # fmt: skip
        result["synthetic"].append(block)
        print(n_items, dim, sparsity, json.dumps(block["comparison"]), flush=True)
        write_results(result, folder)
        del data, peers
    for n_items, n_leaves in growth:
        result["growth"].append(measure_growth(n_items, n_leaves, sizes, options.threads, options.seed))
    for n_items, n_added in changes:
        result["changes"].append(measure_changes(n_items, n_added, options.seed))
    write_results(result, folder)
    print((folder / "bench_search.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
