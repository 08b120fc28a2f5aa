"""Learn hash codes for handwritten digits, search with them, and draw the hash tree.

Run with `make quickstart` or `python examples/quickstart.py`. Prints one Markdown table: exhaustive search of
the learned embedding against the hash index at sparsity 1 to 4, on the 30 % of the digits that were held out,
searched among the other 70 %; means over three seeds, and the largest distance of a seed from its mean.
Writes the hash tree with the digits in their leaves to `quickstart.png`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from sklearn.datasets import load_digits
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.display import HashTreeDisplay
from hqsearch.metrics import bucket_nmi, precision_at_k

SEEDS = (0, 1, 2)
SPARSITIES = (1, 2, 3, 4)
KS = (1, 4, 16)


def microseconds_a_query(ask: Callable[[], Any], n_queries: int, n_runs: int = 7) -> float:
    """Median time of a batch of queries, after a first call that compiles, per query."""
    ask()
    seconds = []
    for _ in range(n_runs):
        started = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - started)
    return 1e6 * float(np.median(seconds)) / n_queries


def evaluate(seed: int, memory: str) -> tuple[dict[str, list[float]], HierarchicalHashIndex, np.ndarray]:
    """Figures of every row of the table for one split, the index at sparsity 1, and its items."""
    X, y = load_digits(return_X_y=True)
    X, X_query, y, y_query = train_test_split(X, y, test_size=0.3, stratify=y, random_state=seed)
    rows: dict[str, list[float]] = {}
    for sparsity in SPARSITIES:
        encoder = HierarchicalHashEncoder(sparsity=sparsity, random_state=seed, memory=memory).fit(X, y)
        if not rows:
            # The embedding does not depend on the sparsity: with `memory` its training is shared.
            scan = NearestNeighbors(n_neighbors=max(KS), algorithm="brute").fit(encoder.embed(X))
            found = scan.kneighbors(encoder.embed(X_query), return_distance=False)
            micros = microseconds_a_query(lambda e=encoder: scan.kneighbors(e.embed(X_query)), len(X_query))
            precisions = [100 * precision_at_k(y_query, y[found], k=k) for k in KS]
            rows["exhaustive"] = [*precisions, 1.0, np.nan, micros]
        index = HierarchicalHashIndex(FrozenEstimator(encoder), n_neighbors=max(KS)).fit(X, y)
        found, stats = index.kneighbors(X_query, return_distance=False, return_stats=True)
        micros = microseconds_a_query(lambda i=index: i.kneighbors(X_query), len(X_query))
        # Each k is a search of its own: fewer neighbours may need fewer leaves.
        precisions = [
            100 * precision_at_k(y_query, y[index.kneighbors(X_query, k, return_distance=False)]) for k in KS
        ]
        nmi = bucket_nmi(encoder.encode(X_query), y_query)
        rows[f"hash index, s = {sparsity}"] = [*precisions, stats.suf(), nmi, micros]
        if sparsity == 1:
            first_index = index
    return rows, first_index, X


def markdown_table(runs: list[dict[str, list[float]]]) -> str:
    """Mean and spread of each figure over the seeds, as a Markdown table."""
    names = [*(f"precision@{k}" for k in KS), "SUF@16", "NMI", "µs a query"]
    formats = [*(["{:.2f} ± {:.2f}"] * 3), "{:.2f} ± {:.2f}", "{:.3f} ± {:.3f}", "{:.0f} ± {:.0f}"]
    lines = ["| search | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for row in runs[0]:
        figures = np.array([run[row] for run in runs])
        means, spreads = figures.mean(0), np.abs(figures - figures.mean(0)).max(0)
        cells = [
            "–" if np.isnan(mean) else form.format(mean, spread)
            for form, mean, spread in zip(formats, means, spreads, strict=True)
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"), help="where to draw the tree")
    picture = parser.parse_args().picture
    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as memory:
        results = []
        for seed in SEEDS:
            print(f"seed {seed}: training at sparsity 1 to 4 ...", flush=True)
            results.append(evaluate(seed, memory))
    print(f"\n{markdown_table([rows for rows, _, _ in results])}\n")
    _, index, X = results[0]
    display = HashTreeDisplay.from_estimator(index, X, index.labels_, images=X.reshape(-1, 8, 8))
    display.figure_.savefig(picture, dpi=100)
    print(f"The hash tree, with digits in their leaves, is in {picture}.")


if __name__ == "__main__":
    main()
