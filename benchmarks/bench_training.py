"""Where a training step's time goes, what the masked losses save, the published step, and the time of a fit.

Five tables: (1) seconds of a hash-stage step by part, for each trunk and sparsity; (2) the masked losses
against the naive form over an items x items x buckets mask: seconds, peak memory, and that the values are
equal; (3) items a second of whole steps against a plain torch version of the published step: one forward pass
for the codes and one for the loss, B x B x d masks, the flow network built arc by arc in OR-Tools; (4) the
steps of codes that settle, by how their kernels are launched; (5) seconds of whole fits with the package's
defaults, on as many threads as torch takes, beside what they may take on two cores.

    python benchmarks/bench_training.py               writes benchmarks/results/bench_training-cpu.*
    python benchmarks/bench_training.py --device cuda
    python benchmarks/bench_training.py --smallest    a smoke run of a few seconds, writes nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import machine
import numpy as np
import torch
from published_step import (
    check_same_step,
    naive_distances,
    naive_semihard,
    naive_similarities,
    published_step,
)

from hqsearch import HierarchicalHashEncoder
from hqsearch.assignment import solve_cascades
from hqsearch.embedding import CodeProblem, StageSettings, resolve_captured, resolve_precision
from hqsearch.embedding.capture import N_STEPS_BEFORE, from_cpu
from hqsearch.embedding.losses import (
    masked_l1_distances,
    masked_similarities,
    npairs_loss,
    semihard_triplet_loss,
)
from hqsearch.embedding.networks import StageNetwork, Standardize, build_trunk, n_trunk_outputs, new_head
from hqsearch.embedding.proxies import ProxyHashStage
from hqsearch.embedding.stage import TrainingData
from hqsearch.embedding.training import HashStage

SEED = 0
N_CLASSES, BATCH_SIZE, N_LEVELS, BRANCHING_FACTOR = 64, 128, 2, 64
PENALTIES = {"sibling_penalty": 100.0, "orthogonality_penalty": 0.1}
INPUT_SHAPES = {"mlp": (384,), "conv": (1, 32, 32), "nin": (3, 32, 32)}
PARTS = ("forward", "class scores to CPU", "flow", "loss", "backward", "optimiser")
RESULTS = Path(__file__).parent / "results"
TABLES = ("parts", "losses", "steps", "launches", "fits")
# Seconds that a fit with the defaults may take on two cores, by the shape of what it is of.
FIT_LIMITS = {(13_000, 1, 32, 32): 300, (12_000, 384): 60}


class TimedHashStage(HashStage):
    """The training step itself, with a clock around each of its parts."""

    def start_clocks(self):
        """Forget the figures so far."""
        self.seconds = defaultdict(list)

    @contextmanager
    def clock(self, part):
        """Add the seconds of a block to its part; a device's queue is emptied before each reading."""
        wait_for(self.data.X.device)
        started = time.perf_counter()
        yield
        wait_for(self.data.X.device)
        self.seconds[part].append(time.perf_counter() - started)

    def _on_cpu(self, function, values):
        with self.clock("class scores to CPU"):
            values = values.cpu()
        return super()._on_cpu(function, values)

    def _masked_loss(self, scores, codes):
        with self.clock("loss"):
            return super()._masked_loss(scores, codes)

    def _backward(self, loss):
        with self.clock("backward"):
            super()._backward(loss)

    def _apply(self):
        with self.clock("optimiser"):
            super()._apply()


def wait_for(device):
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_items(shape, n_classes, *, noise):
    """Return items of a shape, float32, each the mean of its class and noise of a scale, and their labels."""
    rng = np.random.default_rng(SEED)
    y = np.arange(shape[0]) % n_classes
    means = rng.normal(size=(n_classes, *shape[1:])).astype(np.float32)
    return means[y] + rng.normal(scale=noise, size=shape).astype(np.float32), y


def make_stage(trunk_name, sparsity, loss, device, *, kind=TimedHashStage, captured=False, compiled=False):
    """Return a hash stage on random items of the trunk's usual shape, ready to step."""
    shape = INPUT_SHAPES[trunk_name]
    X, y = make_items((4 * BATCH_SIZE, *shape), N_CLASSES, noise=1.0)
    generator = torch.Generator().manual_seed(SEED)
    standardize = Standardize.from_items(X, np.arange(len(X)))
    trunk = build_trunk(trunk_name, shape, generator)
    width = n_trunk_outputs(trunk, standardize, torch.from_numpy(X[:2]))
    network = StageNetwork(
        standardize, trunk, new_head(width, N_LEVELS * BRANCHING_FACTOR, generator, std=0.01)
    ).to(device)
    settings = StageSettings(
        loss=loss,
        regularization=0.01,
        margin=0.5,
        epochs=1000,
        learning_rate=1e-3,
        trunk_learning_rate=1e-4,
        batch_size=BATCH_SIZE,
        classes_per_batch=N_CLASSES,
        precision=resolve_precision("auto", trunk_name, shape, torch.device(device)),
        captured=captured,
    )
    problem = CodeProblem(
        n_levels=N_LEVELS,
        branching_factor=BRANCHING_FACTOR,
        sparsity=sparsity,
        solve=lambda scores: solve_cascades(scores, sparsity=sparsity, **PENALTIES),
        validate=lambda *_: {},
    )
    everything, nothing = np.arange(len(y)), np.empty(0, np.int64)
    data = TrainingData(torch.from_numpy(X).to(device), y, everything, nothing)
    stage = kind(network, data, settings, problem=problem, seed=SEED)
    stage._initialize()
    if kind is TimedHashStage:
        stage.start_clocks()
    elif kind is ProxyHashStage:
        stage._start_codes()
    network.train()
    if compiled:
        stage.network = torch.compile(network)
    return stage


def draw(stage):
    """Return the items of the next step, on the device."""
    items, _ = stage._batches.draw()
    return torch.from_numpy(items).to(stage.data.X.device)


def time_parts(trunk_name, sparsity, loss, device, n_steps):
    """Median seconds of each part of a step, and of the whole step."""
    stage = make_stage(trunk_name, sparsity, loss, device)
    solve = stage.problem.solve

    def timed_solve(scores):
        with stage.clock("flow"):
            return solve(scores)

    def timed_forward(x, forward=stage.network.forward):
        with stage.clock("forward"):
            return forward(x)

    object.__setattr__(stage.problem, "solve", timed_solve)
    stage.network.forward = timed_forward
    for _ in range(3):
        stage._train_step(draw(stage))
    stage.start_clocks()
    for _ in range(n_steps):
        items = draw(stage)
        with stage.clock("step"):
            stage._train_step(items)
    medians = {part: statistics.median(stage.seconds[part]) for part in (*PARTS, "step")}
    return {"trunk": trunk_name, "objective": loss, "sparsity": sparsity, **medians}


# --- whole steps, ours and the published one


def compare_steps(trunk_name, sparsity, loss, device, n_steps):
    """Items a second of our step and of the plain one, in turns."""
    captured = resolve_captured(trunk_name, device)
    ours, plain = (
        make_stage(trunk_name, sparsity, loss, device, kind=HashStage, captured=how)
        for how in (captured, False)
    )
    # Both draw, so that they go on with the same items.
    draw(ours)
    check_same_step(plain, draw(plain), PENALTIES)
    seconds = {"ours": [], "plain": []}
    n_before = N_STEPS_BEFORE + 1 if captured else 2
    for step in range(n_steps + n_before):
        for name, stage, run in (
            ("ours", ours, ours._update),
            ("plain", plain, lambda items: published_step(plain, items, PENALTIES)),
        ):
            items = draw(stage)
            wait_for(device)
            started = time.perf_counter()
            run(items)
            wait_for(device)
            if step >= n_before:
                seconds[name].append(time.perf_counter() - started)
    rates = {name: BATCH_SIZE / statistics.median(values) for name, values in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        **{"trunk": trunk_name, "objective": loss, "sparsity": sparsity},
        "our precision": ours.settings.precision,
        **{f"{name} items/s": rate for name, rate in rates.items()},
        "ratio": statistics.median(ratios),
    }


# --- the launches of a step


def compare_launches(trunk_name, objective, device, forms, n_steps, n_runs=5):
    """Microseconds of a step in each form, in turns of `n_steps`, and the seconds of the first steps."""
    row = {"trunk": trunk_name, "objective": objective}
    kind = ProxyHashStage if objective == "proxy" else HashStage

    def run(stage, n):
        wait_for(device)
        started = time.perf_counter()
        for _ in range(n):
            items, _ = stage._batches.draw()
            stage._update(from_cpu(stage.data.train[items], device))
            stage._schedule.step()
        wait_for(device)
        return time.perf_counter() - started

    stages, seconds = {}, defaultdict(list)
    for form in forms:
        how = {name: name in form for name in ("captured", "compiled")}
        stages[form] = make_stage(trunk_name, 1, objective, device, kind=kind, **how)
        # Capturing, compiling, and what libraries do at first.
        row[f"{form}, first 5 steps, s"] = run(stages[form], 5)
    for _ in range(n_runs):
        for form, stage in stages.items():
            seconds[form].append(run(stage, n_steps) / n_steps)
    for form in forms:
        row[f"{form}, us"] = 1e6 * statistics.median(seconds[form])
    return row


# --- the masked losses alone


def make_loss(loss, form, n_items, d, sparsity, device):
    """Return a function that runs one forward and backward pass and gives the loss's value."""
    rng = np.random.default_rng(SEED)
    scores = torch.tensor(rng.normal(size=(n_items, d)), dtype=torch.float32, device=device)
    classes = np.arange(n_items) // 2
    class_active = np.stack([rng.choice(d, sparsity, replace=False) for _ in range(classes.max() + 1)])
    active = torch.from_numpy(class_active[classes]).to(device)
    codes = torch.zeros(n_items, d, device=device).scatter_(1, active, 1.0)
    same = (codes @ codes.T) > sparsity - 0.5

    def run():
        x = scores.clone().requires_grad_()
        if loss == "npairs":
            a, p = x[0::2], x[1::2]
            half = codes[0::2]
            similarities = (
                masked_similarities(a, p, half, half) if form == "ours" else naive_similarities(a, p, half)
            )
            value = npairs_loss(similarities, same[0::2, 1::2], a, p, 0.01)
        elif form == "ours":
            value = semihard_triplet_loss(masked_l1_distances(x, active), same, 0.5)
        else:
            value = naive_semihard(naive_distances(x, codes), same, 0.5)
        value.backward()
        return value.item()

    return run


def peak_bytes(loss, form, n_items, d, sparsity, device):
    """Peak memory of one pass above what was in use before, in bytes; on the CPU in a process of its own."""
    if device.type == "cuda":
        run = make_loss(loss, form, n_items, d, sparsity, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, "--peak-of", loss, form, str(n_items), str(d), str(sparsity)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(loss, form, n_items, d, sparsity):
    """Print the growth of this process's peak resident memory over one pass."""
    make_loss(loss, form, 8, 8, 1, torch.device("cpu"))()  # loads what torch loads lazily
    run = make_loss(loss, form, int(n_items), int(d), int(sparsity), torch.device("cpu"))
    before = peak_resident_bytes()
    run()
    print(peak_resident_bytes() - before)


def peak_resident_bytes():
    """Peak resident memory of this process; getrusage would give its parent's where that was higher."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def compare_losses(loss, n_items, d, sparsity, device, n_runs):
    """Seconds and peak bytes of both forms, in turns, after checking that their values agree."""
    forms = {form: make_loss(loss, form, n_items, d, sparsity, device) for form in ("ours", "naive")}
    values = {form: run() for form, run in forms.items()}
    if not np.isclose(values["ours"], values["naive"], rtol=1e-4):
        raise RuntimeError(f"the two forms of {loss} disagree: {values}")
    seconds = defaultdict(list)
    for _ in range(n_runs):
        for form, run in forms.items():
            started = time.perf_counter()
            run()
            wait_for(device)
            seconds[form].append(time.perf_counter() - started)
    row = {"objective": loss, "items": n_items, "d": d, "sparsity": sparsity}
    for form in forms:
        row[f"{form} ms"] = 1e3 * statistics.median(seconds[form])
        row[f"{form} MiB"] = peak_bytes(loss, form, n_items, d, sparsity, device) / 2**20
    row["time ratio"] = row["naive ms"] / row["ours ms"]
    row["memory ratio"] = row["naive MiB"] / max(row["ours MiB"], 1e-3)
    return row


# --- whole fits


def time_fit(shape, loss, device, **parameters):
    """Seconds of a fit with the defaults of a loss, beside what it may take."""
    X, y = make_items(shape, 100, noise=3.0)
    encoder = HierarchicalHashEncoder(loss=loss, device=device.type, random_state=SEED, **parameters)
    started = time.perf_counter()
    encoder.fit(X, y)
    seconds = time.perf_counter() - started
    limit = FIT_LIMITS.get(shape, "–")
    epochs = Counter(record["stage"] for record in encoder.history_)
    return {
        "items": " x ".join(map(str, shape)),
        "loss": loss,
        "shared_trunk": encoder.shared_trunk,
        "epochs": " + ".join(str(n) for n in epochs.values()),
        "precision": resolve_precision(encoder.precision, encoder.network, shape[1:], device),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "may take, s": limit,
        "reached": "–" if limit == "–" else "yes" if seconds <= limit else "no",
    }


def table(rows):
    """Rows of equal keys as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        lines.append(
            "| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |"
        )
    return "\n".join(lines)


def parts_rows(figures):
    """Milliseconds of each part and the flow's share of the step, as table rows."""
    rows = []
    for row in figures:
        cells = {f"{part}, ms": 1e3 * row[part] for part in (*PARTS, "step")}
        share = f"{100 * row['flow'] / row['step']:.1f} %"
        rows.append({k: row[k] for k in ("trunk", "objective", "sparsity")} | cells | {"flow share": share})
    return rows


def as_markdown(figures, machines):
    """Tables by their names as Markdown, each with what it was measured on."""
    shape = f"C = {N_CLASSES} classes, B = {BATCH_SIZE} items, K = {N_LEVELS}, d = {BRANCHING_FACTOR}"
    titles = {
        "parts": f"Hash-stage step: {shape}; medians.",
        "losses": "Masked losses, forward and backward pass, against the naive items x items x d form:",
        "steps": "Whole steps against the published step written plainly in torch and OR-Tools, in float32:",
        "launches": "Steps by how their kernels are launched; npairs and triplet solve codes in each:",
        "fits": "Whole fits with the defaults but for `shared_trunk`, of made-up items of 100 classes:",
    }
    shown = {name: parts_rows(rows) if name == "parts" else rows for name, rows in figures.items()}
    return "\n\n".join(
        f"{titles[name]}\n\n{table(rows)}\n\nMachine: {json.dumps(machines[name])}"
        for name, rows in shown.items()
    )


def package_version(name):
    """Installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main():
    """Run the comparisons and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument(
        "--tables", nargs="+", default=TABLES, choices=TABLES, help="keep the others' results"
    )
    parser.add_argument("--peak-of", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print_peak(*arguments.peak_of)
        return
    device = torch.device(arguments.device)
    small, tables = arguments.smallest, set(arguments.tables)
    # A nin step takes seconds on a CPU, so few of them give a steady median.
    steps = {"mlp": 2 if small else 40, "nin": 8 if device.type == "cpu" else 40}
    stem = RESULTS / f"bench_training-{arguments.device}"
    earlier = stem.with_suffix(".json")
    keep = tables != set(TABLES) and earlier.exists()
    figures = json.loads(earlier.read_text(encoding="utf-8")) if keep else {}
    settings = [
        (trunk, sparsity, loss)
        for trunk in (["mlp"] if small else ["mlp", "nin"])
        for loss in ("npairs", "triplet")
        for sparsity in (1, 4)
    ]
    if "parts" in tables:
        figures["parts"] = [time_parts(*setting, device, steps[setting[0]]) for setting in settings]
    if "losses" in tables:
        sizes = [(64, 32, 1)] if small else [(128, 64, 1), (128, 64, 4), (512, 64, 4), (512, 512, 1)]
        figures["losses"] = [
            compare_losses(loss, *size, device, 2 if small else 5)
            for loss in ("npairs", "triplet")
            for size in sizes
        ]
    if "steps" in tables:
        figures["steps"] = [
            compare_steps(*setting, device, max(2, steps[setting[0]] // 2)) for setting in settings
        ]
    if "launches" in tables:
        forms = ["one by one", "compiled"]
        if device.type == "cuda":
            forms += ["captured", "compiled and captured"]
        # Compiling takes up to half a minute for each row, nothing for a smoke run.
        trunks = ["mlp"] if small else ["mlp", "conv", "nin"] if device.type == "cuda" else ["mlp", "conv"]
        figures["launches"] = [
            compare_launches(trunk, objective, device, forms[:1] if small else forms, 2 if small else 50)
            for trunk in trunks
            for objective in ("proxy", "npairs", "triplet")
        ]
    if "fits" in tables:
        # What is compiled at first is compiled by this one.
        time_fit((400, 16), "proxy", device, metric_epochs=1, hash_epochs=1)
        smoke = {"metric_epochs": 1, "hash_epochs": 1} if small else {}
        figures["fits"] = [
            time_fit(shape, loss, device, shared_trunk=shared_trunk, **smoke)
            for shape in ([(400, 16)] if small else FIT_LIMITS)
            for loss, shared_trunk in (
                *((loss, False) for loss in ("proxy", "npairs", "triplet")),
                ("proxy", "frozen"),
            )
        ]
    described = {
        **machine.describe(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {
            name: package_version(name) for name in ("hqsearch", "torch", "numpy", "numba", "ortools")
        },
    }
    # Tables may be of different runs.
    machines = figures.get("machines", {}) | dict.fromkeys(tables, described)
    # What neither this run nor an earlier one has measured is left out.
    figures = {name: figures[name] for name in TABLES if name in figures}
    text = as_markdown(figures, machines)
    print(text)
    if small:
        return
    RESULTS.mkdir(exist_ok=True)
    figures = {"seed": SEED, "machines": {name: machines[name] for name in figures}, **figures}
    stem.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
