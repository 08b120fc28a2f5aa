"""The search benchmark's result as JSON, Markdown and a picture."""

from __future__ import annotations

import json

HEADER = (
    "method", "s", "setting", "queries/s", "p50 µs", "p99 µs", "P@1", "P@4", "P@16", "recall@10", "build s",
    "bytes / float32", "SUF",
)  # fmt: skip


def table(header, rows):
    """Lines of a Markdown table; None is an empty cell."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |")
    return ["", *lines]


def record_row(r):
    """One method at one setting."""
    return (
        r["method"], r["sparsity"], r["setting"], f"{r['queries_per_second']:,.0f}", f"{r['p50_us']:.1f}",
        f"{r['p99_us']:.1f}", *(f"{r[name]:.3f}" for name in ("precision@1", "precision@4", "precision@16")),
        f"{r['recall@10']:.3f}", f"{r['build_seconds']:.1f}",
        None if r["bytes_ratio"] is None else f"{r['bytes_ratio']:.2f}",
        None if r["suf"] is None else f"{r['suf']:.1f}",
    )  # fmt: skip


def summary_rows(result):
    """Each data set and sparsity against the peers that the goals name."""
    for block in result["sets"]:
        for verdict in block["comparison"]:
            peers = verdict["peers"]
            ratios = []
            for name in ("faiss IVF-Flat", "hnswlib"):
                v = peers.get(name)
                note = "" if v is None or v["equal_precision"] else " (it is less precise)"
                ratios.append(None if v is None else f"{v['throughput_ratio']:.1f} at {v['setting']}{note}")
            ivf = peers.get("faiss IVF-Flat")
            latency = None if ivf is None else f"{ivf['latency_ratio']:.2f}"
            share = f"{peers['faiss Flat']['share_of_suf']:.2f}"
            ours = (block["title"], verdict.get("method", "hqsearch"), verdict["sparsity"])
            yield *ours, *ratios, latency, f"{verdict['suf']:.0f}", share


def storage_rows(result):
    """Give what each storage costs in precision."""
    for block in result["sets"]:
        for r in block["records"]:
            if r["method"].startswith("hqsearch") and "," not in r["method"] and r["setting"] is None:
                storage = r["method"].partition(" ")[2] or "float32"
                precisions = (f"{r[f'precision@{k}']:.4f}" for k in (1, 4, 16))
                size, rate = f"{r['bytes_ratio']:.2f}", f"{r['queries_per_second']:,.0f}"
                yield block["title"], r["sparsity"], storage, *precisions, f"{r['suf']:.1f}", size, rate


def write_markdown(result, path):
    """Write a summary, then one table for each data set."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# Search: hqsearch against other indexes", "",
        f"Machine: {', '.join(map(str, result['machine'].values()))}; {versions}; "
        f"{result['threads']} threads, seed {result['seed']}. "
        "Data and protocol: `benchmarks/bench_search.py`.",
        "", "## Summary", "",
        "Ratios of queries a second at equal precision@16, and of one query's median time (lower is better).",
    ]  # fmt: skip
    lines += table(
        (
            "data", "ours", "s", "times best faiss IVF-Flat (nprobe)", "times best hnswlib (ef)",
            "latency / IVF-Flat", "SUF", "wall-clock over Flat / SUF",
        ),
        summary_rows(result),
    )  # fmt: skip
    lines += ["", "## Storage"]
    lines += table(
        ("data", "s", "storage", "P@1", "P@4", "P@16", "SUF", "bytes / float32", "queries/s"),
        storage_rows(result),
    )
    for block in result["sets"]:
        lines += ["", f"## {block['title']}", *table(HEADER, map(record_row, block["records"]))]
        for verdict in block["comparison"]:
            ours = f"{verdict.get('method', 'hqsearch')}, sparsity {verdict['sparsity']}"
            lines += ["", f"{ours}, against each peer at equal precision@16:"]
            rows = [
                (
                    name, v["setting"], "yes" if v["equal_precision"] else "no, it is less precise",
                    f"{v['throughput_ratio']:.1f}", f"{v['latency_ratio']:.2f}",
                    f"{v['fastest_setting_ratio']:.1f}",
                )
                for name, v in verdict["peers"].items()
            ]  # fmt: skip
            lines += table(
                (
                    "peer", "setting", "as precise", "our throughput / its", "our latency / its",
                    "over its fastest setting",
                ),
                rows,
            )  # fmt: skip
    if result["growth"]:
        rows = [
            (
                r["n_items"], r["n_leaves"], f"{r['build_seconds']:.2f}", f"{r['queries_per_second']:,.0f}",
                f"{r['p50_us']:.1f}", f"{r['suf']:.0f}", f"{r['bytes_ratio']:.3f}",
            )
            for r in result["growth"]
        ]  # fmt: skip
        lines += ["", "## Growth (64 dimensions, sparsity 1)"]
        lines += table(("items", "leaves", "build s", "queries/s", "p50 µs", "SUF", "bytes / float32"), rows)
    if result["changes"]:
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

    blocks = result["sets"]
    figure, axes = plt.subplots(
        1, len(blocks), figsize=(4.5 * len(blocks), 4), squeeze=False, layout="constrained"
    )
    # One colour for a method in every panel, and none for two methods.
    methods = dict.fromkeys((r["method"], r["sparsity"]) for block in blocks for r in block["records"])
    colors = dict(zip(methods, matplotlib.color_sequences["tab20"], strict=False))
    handles = {}
    for ax, block in zip(axes[0], blocks, strict=True):
        for name, sparsity in dict.fromkeys((r["method"], r["sparsity"]) for r in block["records"]):
            rows = [r for r in block["records"] if (r["method"], r["sparsity"]) == (name, sparsity)]
            ours = name == "hqsearch"
            label = name if sparsity is None else f"{name}, s = {sparsity}"
            (handles[label],) = ax.plot(
                [r["precision@16"] for r in rows], [r["queries_per_second"] for r in rows], "o-",
                label=label, color=colors[name, sparsity],
                linewidth=2.5 if ours else 1, markersize=7 if ours else 4,
            )  # fmt: skip
        ax.set(yscale="log", xlabel="precision@16", ylabel="queries per second")
        ax.set_title(block["title"], fontsize=10)
        ax.grid(alpha=0.3)
    figure.legend(handles=handles.values(), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_results(result, folder, name):
    """Write what is measured so far: a long run that is stopped leaves its finished part."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_markdown(result, folder / f"{name}.md")
    draw_curves(result, folder / f"{name}.png")
