"""Time the exact solver of one level against OR-Tools, HiGHS and networkx on the same integer instances.

Every solver gets the same costs and builds its own network inside the timed call. Scores are multiples of
2**-30, so the integers of all solvers describe the same problem exactly; equal energies are checked.

    python benchmarks/bench_flow.py --json --markdown --plot     writes benchmarks/results/bench_flow.*
    python benchmarks/bench_flow.py --smallest                   a smoke run of a few seconds
"""

import argparse
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path

import machine
import numpy as np

from hqsearch.assignment import LevelNetwork, certificate, solve_cascades, solve_level
from hqsearch.assignment.solvers import codes_by

SCALE = 2**30
SIZES = (32, 64, 128, 256, 512)
TENTH = round(0.1 * SCALE) / SCALE
PROBLEMS = {
    "k=1": {"sparsity": 1, "orthogonality_penalty": 1.0},
    "k=4": {"sparsity": 4, "orthogonality_penalty": 1.0},
    "k=4, n/2 groups": {"sparsity": 4, "orthogonality_penalty": TENTH, "sibling_penalty": 100.0},
}
RESULTS = Path(__file__).parent / "results"


def make_instance(n_classes, n_buckets, problem, seed):
    """Return uniform scores, parents and the network that the other solvers get."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, SCALE, (n_classes, n_buckets)) / SCALE
    parents = rng.integers(0, n_classes // 2, n_classes) if "groups" in problem else None
    settings = PROBLEMS[problem]
    groups = np.arange(n_classes) if parents is None else np.unique(parents, return_inverse=True)[1]
    network = LevelNetwork(
        costs=-np.rint(scores * SCALE).astype(np.int64),
        groups=groups,
        sparsity=settings["sparsity"],
        sibling_cost=0 if parents is None else int(settings["sibling_penalty"] * SCALE),
        orthogonality_cost=int(settings["orthogonality_penalty"] * SCALE),
        shift=30,
    )
    return scores, parents, network


def seconds(call):
    """Return the result of a call and the seconds it took.

    These are processor seconds: all solvers run in one thread, and a shared machine's wall clock
    counts the neighbours' work too.
    """
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def median_seconds(call, limit, most):
    """Return the median seconds of three runs of a call, or of up to `most` within `limit` seconds."""
    times = []
    while len(times) < 3 or (len(times) < most and sum(times) < limit):
        times.append(seconds(call)[1])
    return statistics.median(times)


def run_cell(n_classes, n_buckets, problem, seed, n_rounds):
    """Time all solvers on one size and problem; ours and OR-Tools take turns."""
    scores, parents, network = make_instance(n_classes, n_buckets, problem, seed)
    settings = PROBLEMS[problem]

    def ours():
        return solve_level(scores, parents, **settings)

    codes = ours()
    energy = network.energy(codes)
    cell = {"n_classes": n_classes, "branching_factor": n_buckets, "problem": problem, "energy": energy}
    ours_seconds, ortools_seconds = [], []
    for _ in range(n_rounds):
        ours_seconds.append(median_seconds(ours, 0.05, 20))
        other, elapsed = seconds(lambda: codes_by("ortools", network))
        ortools_seconds.append(elapsed)
        if network.energy(other) != energy:
            raise RuntimeError(f"energies differ: {cell}, OR-Tools {network.energy(other)}")
    cell["hqsearch"] = statistics.median(ours_seconds)
    cell["ortools"] = statistics.median(ortools_seconds)
    for solver, largest in (("scipy", 64 * 64), ("networkx", 32 * 32)):
        if n_classes * n_buckets <= largest:
            other, cell[solver] = seconds(lambda solver=solver: codes_by(solver, network))
            if abs(network.energy(other) - energy) > 1e-6 * SCALE:
                raise RuntimeError(f"energies differ: {cell}, {solver} {network.energy(other)}")
    cell["ratio"] = cell["ortools"] / cell["hqsearch"]
    if n_classes * n_buckets >= 256 * 256:
        penalties = {name: value for name, value in settings.items() if name != "sparsity"}
        cell["certified"] = certificate(scores, codes, parents, **penalties).optimal
        if not cell["certified"]:
            raise RuntimeError(f"not optimal: {cell}")
    return cell


def run_parallel(seed, n_rounds):
    """Time 64 cascades of 64 classes, 2 levels, 64 buckets, by one thread and by two, by the wall clock."""
    batch = np.random.default_rng(seed).normal(size=(64, 64, 2, 64))
    walls = {(sparsity, n_jobs): [] for sparsity in (1, 4) for n_jobs in (1, 2)}
    processors = {key: [] for key in walls}
    for _ in range(n_rounds):
        for sparsity, n_jobs in walls:
            start = time.perf_counter(), time.process_time()
            solve_cascades(batch, sparsity=sparsity, n_jobs=n_jobs)
            walls[sparsity, n_jobs].append(time.perf_counter() - start[0])
            processors[sparsity, n_jobs].append(time.process_time() - start[1])
    wall = {key: statistics.median(values) for key, values in walls.items()}
    processor = {key: statistics.median(values) for key, values in processors.items()}
    return {
        f"sparsity {sparsity}": {
            "one_thread": wall[sparsity, 1],
            "two_threads": wall[sparsity, 2],
            "speed_up": wall[sparsity, 1] / wall[sparsity, 2],
            # what two idle cores could reach: twice one thread's work over both threads' work
            "most_on_idle_cores": 2 * processor[sparsity, 1] / processor[sparsity, 2],
        }
        for sparsity in (1, 4)
    }


def fitted_exponents(cells, solver):
    """Fit seconds = a * n_classes**b * branching_factor**c over the cells by least squares; return b, c."""
    rows = [c for c in cells if solver in c]
    design = np.array([[1, np.log(c["n_classes"]), np.log(c["branching_factor"])] for c in rows])
    solution = np.linalg.lstsq(design, np.log([c[solver] for c in rows]), rcond=None)[0]
    return {"n_classes": round(float(solution[1]), 2), "branching_factor": round(float(solution[2]), 2)}


def geometric_mean(values):
    """Return the geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def summarise(cells):
    """Return the ratios and the growth, per problem and over all."""
    summary = {}
    for problem in (*PROBLEMS, "all"):
        chosen = [c for c in cells if problem in (c["problem"], "all")]
        ratios = [c["ratio"] for c in chosen]
        summary[problem] = {
            "geometric_mean": round(geometric_mean(ratios), 1),
            "least": round(min(ratios), 1),
        }
        if len(chosen) > 4:
            for solver in ("hqsearch", "ortools"):
                summary[problem][f"exponents_{solver}"] = fitted_exponents(chosen, solver)
    return summary


def markdown(report):
    """Return the report as Markdown tables."""
    lines = ["# One level, exact: processor seconds against OR-Tools", ""]
    for key in ("machine", "versions", "seed", "date"):
        lines.append(f"- {key}: {report[key]}")
    lines += [
        "",
        "| problem | geometric mean | least | growth here | growth of OR-Tools |",
        "|---|---|---|---|---|",
    ]
    for problem, facts in report["summary"].items():
        growth = [
            "n^{n_classes} d^{branching_factor}".format(**facts[key]) if key in facts else ""
            for key in ("exponents_hqsearch", "exponents_ortools")
        ]
        lines.append(
            f"| {problem} | {facts['geometric_mean']}x | {facts['least']}x | {growth[0]} | {growth[1]} |"
        )
    for problem in PROBLEMS:
        cells = {
            (c["n_classes"], c["branching_factor"]): c for c in report["cells"] if c["problem"] == problem
        }
        widths = sorted({d for _, d in cells})
        lines += ["", f"## {problem}: milliseconds here (times faster than OR-Tools)", ""]
        lines.append("| n \\ d | " + " | ".join(map(str, widths)) + " |")
        lines.append("|---" * (len(widths) + 1) + "|")
        for n_classes in sorted({n for n, _ in cells}):
            row = []
            for width in widths:
                cell = cells.get((n_classes, width))
                row.append("" if cell is None else f"{cell['hqsearch'] * 1e3:.3f} ({cell['ratio']:.0f}x)")
            lines.append(f"| {n_classes} | " + " | ".join(row) + " |")
    small = [c for c in report["cells"] if "scipy" in c]
    lines += ["", "## All solvers, small sizes: milliseconds", ""]
    lines += ["| n x d | problem | here | OR-Tools | scipy | networkx |", "|---|---|---|---|---|---|"]
    for c in small:
        times = [f"{c[s] * 1e3:.3g}" if s in c else "" for s in ("hqsearch", "ortools", "scipy", "networkx")]
        lines.append(
            f"| {c['n_classes']} x {c['branching_factor']} | {c['problem']} | " + " | ".join(times) + " |"
        )
    lines += ["", "## 64 cascades of 64 classes, 2 levels, d = 64: wall-clock milliseconds", ""]
    lines += ["| | one thread | two threads | speed-up | most on idle cores |", "|---|---|---|---|---|"]
    for name, facts in report["parallel"].items():
        lines.append(
            f"| {name} | {facts['one_thread'] * 1e3:.1f} | {facts['two_threads'] * 1e3:.1f} "
            f"| {facts['speed_up']:.2f}x | {facts['most_on_idle_cores']:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def plot(report, path):
    """Draw seconds over n * d, one line a solver: the median over the cells of equal n * d."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PROBLEMS), figsize=(13, 4.2), sharey=True, layout="constrained")
    names = {
        "hqsearch": "hqsearch",
        "ortools": "OR-Tools",
        "scipy": "scipy (HiGHS, LSA)",
        "networkx": "networkx",
    }
    for ax, problem in zip(axes, PROBLEMS, strict=True):
        for solver, name in names.items():
            times = {}
            for c in report["cells"]:
                if c["problem"] == problem and solver in c:
                    times.setdefault(c["n_classes"] * c["branching_factor"], []).append(c[solver])
            sizes = sorted(times)
            ax.plot(
                sizes, [statistics.median(times[size]) for size in sizes], "o-", markersize=3.5, label=name
            )
        ax.set(title=problem, xlabel="n * d", xscale="log", yscale="log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    """Run the grid and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smallest", action="store_true", help="one small size of each problem")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the solvers take turns")
    parser.add_argument("--seed", type=int, default=0)
    for kind in ("json", "markdown", "plot"):
        parser.add_argument(
            f"--{kind}", action="store_true", help=f"write benchmarks/results/bench_flow ({kind})"
        )
    options = parser.parse_args()

    for solver in ("scipy", "networkx"):  # their imports are not their work
        codes_by(solver, make_instance(4, 4, "k=4, n/2 groups", options.seed)[2])
        codes_by(solver, make_instance(4, 4, "k=1", options.seed)[2])
    sizes = [(32, 32)] if options.smallest else [*product(SIZES, SIZES), (1000, 128)]
    n_rounds = 1 if options.smallest else options.rounds
    cells = []
    for problem, (n_classes, n_buckets) in product(PROBLEMS, sizes):
        cells.append(run_cell(n_classes, n_buckets, problem, options.seed, n_rounds))
        cell = cells[-1]
        print(
            f"{problem:16} n={n_classes:4} d={n_buckets:3}  {cell['hqsearch'] * 1e3:8.3f} ms, "
            f"OR-Tools {cell['ortools'] * 1e3:8.2f} ms, {cell['ratio']:6.1f}x",
            flush=True,
        )
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "seed": options.seed,
        "rounds": n_rounds,
        "machine": {
            **machine.describe(),
            "load": [round(load, 1) for load in os.getloadavg()],
        },
        "versions": {name: version(name) for name in ("numpy", "numba", "scipy", "networkx", "ortools")},
        "cells": cells,
        "summary": summarise(cells),
        "parallel": run_parallel(options.seed, 3 if options.smallest else 41),
    }
    RESULTS.mkdir(exist_ok=True)
    if options.json:
        (RESULTS / "bench_flow.json").write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown:
        (RESULTS / "bench_flow.md").write_text(markdown(report))
    if options.plot:
        plot(report, RESULTS / "bench_flow.png")
    print(json.dumps({"summary": report["summary"], "parallel": report["parallel"]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
