"""Settings of an encoder side by side, on held-out training items: what a default is chosen by.

``python benchmarks/compare.py --dataset letters --vary sibling_penalty=0,100 hash_epochs=10,20`` fits an
encoder for every combination and seed and prints a Markdown table: precision@1 / @16 in per cent of
exhaustive search of the embedding and of the index, and its speed-up, in both directions of both protocols.
Test items are never looked at: a stratified tenth of the training items takes their place, and unseen classes
are among those that the papers' experiments train on. ``--search n_probes=4`` sets parameters of the index.
``--smallest`` is a smoke run.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import paper_data
from paper_presets import value_of
from search_report import table
from sklearn.frozen import FrozenEstimator
from sklearn.neighbors import NearestNeighbors

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.metrics import precision_at_k

KS = (1, 16)


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", choices=paper_data.NAMES, default="digits")
    parser.add_argument("--data-home", type=Path, help="folder or file of the data set")
    parser.add_argument("--vary", nargs="*", default=[], metavar="NAME=VALUE,VALUE", help="every combination")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of all encoders")
    parser.add_argument("--search", nargs="*", default=[], metavar="NAME=VALUE", help="of all indexes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocols", nargs="+", choices=paper_data.PROTOCOLS, default=paper_data.PROTOCOLS)
    parser.add_argument("--limit", type=int, help="at most this many training items, stratified")
    parser.add_argument("--work", type=Path, default=Path(".paper"), help="where metric stages are kept")
    parser.add_argument("--smallest", action="store_true", help="a smoke run of digits")
    return parser.parse_args()


def named(given):
    """Read NAME=VALUE pairs."""
    return {name: value_of(value) for name, _, value in (text.partition("=") for text in given)}


def combinations(vary):
    """List every combination of what is varied, a dict each; values are parted by commas."""
    names, choices = [], []
    for text in vary:
        name, _, values = text.partition("=")
        try:
            values = json.loads(f"[{values}]")
        except json.JSONDecodeError:
            values = [value_of(value) for value in values.split(",")]
        names.append(name)
        choices.append(values)
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*choices)]


def measure(index, X, y, queries, query_y):
    """Precision@1 and @16 of exhaustive search and of a fitted index, and its SUF@1.

    Without queries, None, every item is one.
    """
    own = queries is None
    asked, labels = (X, y) if own else (queries, query_y)
    scan = NearestNeighbors(algorithm="brute").fit(index.embed(X))
    figures = []
    for k in KS:
        # scikit-learn's convention: without queries an item is not its own neighbour.
        exact = scan.kneighbors(None if own else index.embed(asked), k, return_distance=False)
        found, stats = index.kneighbors(None if own else asked, k, return_distance=False, return_stats=True)
        figures.append([precision_at_k(labels, y[ids]) for ids in (exact, found)] + [stats.suf()])
    (exact1, index1, suf), (exact16, index16, _) = figures
    return 100 * exact1, 100 * exact16, 100 * index1, 100 * index16, suf


def compare(task, settings, search, seeds):
    """Mean figures over the seeds: test->train, test->test."""
    rows = []
    for seed in seeds:
        coder = FrozenEstimator(HierarchicalHashEncoder(random_state=seed, **settings).fit(task.X, task.y))
        of_training = HierarchicalHashIndex(coder, **search).fit(task.gallery_X)
        of_queries = HierarchicalHashIndex(coder, **search).fit(task.query_X)
        rows.append(
            (
                measure(of_training, task.gallery_X, task.gallery_y, task.query_X, task.query_y),
                measure(of_queries, task.query_X, task.query_y, None, None),
            )
        )
    return np.mean(rows, 0)


def text_of(figures):
    """Exhaustive search, index, SUF."""
    exact1, exact16, index1, index16, suf = figures
    return f"{exact1:.1f} / {exact16:.1f}", f"{index1:.1f} / {index16:.1f}", f"{suf:.0f}"


def main():
    """Run from the command line."""
    arguments = parse_arguments()
    if arguments.smallest:
        arguments.dataset, arguments.limit, arguments.seeds = "digits", 300, [0]
        arguments.vary, arguments.protocols = ["metric_epochs=2", "hash_epochs=2,3"], ["closed"]
    X_train, X_test, y_train, y_test = paper_data.load(arguments.dataset, arguments.data_home)
    X_train, y_train = paper_data.limited(X_train, y_train, arguments.limit)
    data = X_train, X_test, y_train, y_test
    shared = named(arguments.set) | {"memory": str(arguments.work / "compare")}
    if "random_state" in shared or any("random_state" in varied for varied in combinations(arguments.vary)):
        raise SystemExit("seeds are set by --seeds")
    rows = []
    for protocol in arguments.protocols:
        task = paper_data.make_task(data, protocol, validation_only=True)
        for varied in combinations(arguments.vary):
            settings = ", ".join(f"{name}={json.dumps(value)}" for name, value in varied.items())
            both = compare(task, shared | varied, named(arguments.search), arguments.seeds)
            rows.append((protocol, settings or "defaults", *itertools.chain(*map(text_of, both))))
            print(*rows[-1], sep="; ", flush=True)
    header = ("exhaustive", "index", "SUF")
    print(
        f"\n{arguments.dataset}, {json.dumps(named(arguments.set))}, held-out training items, seeds "
        f"{arguments.seeds}: test->train, then test->test, @1 / @16"
    )
    print("\n".join(table(("protocol", "settings", *header, *header), rows)))


if __name__ == "__main__":
    main()
