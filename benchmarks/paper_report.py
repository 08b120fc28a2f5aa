"""The papers' experiments as JSON, Markdown tables laid out like the papers', and a picture."""

from __future__ import annotations

import json

import matplotlib as mpl
import matplotlib.ticker
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from paper_goals import DIRECTIONS, KS, collect, curves, mean, verdicts
from search_report import table

LEGEND = (
    '*hqsearch* is the index with its defaults, *listed by codes* with `listing="codes"`, and *own leaves*, '
    'the codes\' leaves, with `probing="best_first"`; other systems likewise. *one level*: learned codes of '
    "one level; *Th*: thresholds; *VQ*: k-means cells; *LSH*: random hyperplanes; *softmax*: the control."
)


def spread(records, name):
    """Farthest seed from the mean."""
    values = np.array([r[name] for r in records])
    return float(np.abs(values - values.mean()).max())


def cell(records, name):
    """Mean ± farthest seed, precisions in per cent."""
    scale, digits = (100, 2) if name[0] in "PR" else (1, 3 if name == "NMI" else 1)
    return f"{scale * mean(records, name):.{digits}f} ± {scale * spread(records, name):.{digits}f}"


def precision_tables(result, found):
    """One table for each protocol and direction."""
    lines = []
    # Recall@1 is precision@1.
    names = (*(f"SUF@{k}" for k in KS), *(f"P@{k}" for k in KS), "R@4", "R@16", "NMI", "us")
    for protocol, direction in dict.fromkeys(key[:2] for key in found):
        n_train, n_gallery, n_query = result["n_items"][protocol]
        n_gallery = n_query if direction == "test->test" else n_gallery
        lines += ["", f"## {protocol}, {direction}", ""]
        lines += [
            f"{n_train:,} training items; {n_query:,} queries against {n_gallery:,} items of "
            f"{result['n_classes'][protocol]} classes."
        ]
        rows = []
        for key, records in found.items():
            if key[:2] != (protocol, direction) or "P@1" not in records[0]:
                continue
            s = "" if key[3] is None else key[3]
            rows.append((key[2], s, *(cell(records, n) if n in records[0] else "–" for n in names)))
        rows.sort(
            key=lambda row: (not row[0].startswith("exhaustive"), not row[0].startswith("hqsearch"), row[0])
        )
        header = ("system", "s", *names[:-1], "µs a query")
        lines += table(header, rows)
        lines += curve_table(found, protocol, direction)
    return lines


def curve_table(found, protocol, direction):
    """Precision@1 / @16 along the number of probed leaves or lists."""
    ones, sixteens = (curves(found, protocol, direction, k) for k in (1, 16))
    rows = []
    for name, (suf, p1) in ones.items():
        p16 = sixteens[name][1]
        rows.append(
            (
                name,
                "; ".join(
                    f"{a:.1f}: {100 * b:.1f} / {100 * c:.1f}" for a, b, c in zip(suf, p1, p16, strict=True)
                ),
            )
        )
    if not rows:
        return []
    hnsw = next((r[0]["curve"][0] for key, r in found.items() if key[2] == "HNSW"), {})
    # Of older records precision is that of another graph than the distances.
    graph = "faiss" if "hnswlib P@1" in hnsw else "hnswlib, its distances counted by faiss"
    return [
        "",
        "SUF: precision@1 / @16 for 1, 2, 4, ... probed leaves or lists, from epsilon = 0 and from ef = 1 up "
        f"(HNSW: {graph}):",
        *table(("system", "curve"), rows),
    ]


def write(result, stem):
    """Write ``stem``.json, .md and .png."""
    found = collect(result)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    s = result["settings"]
    beside = result["machine"].get("n_jobs", 1) != 1
    lines = [
        f"# {s['dataset']}, loss {s['loss']}",
        "",
        f"`python benchmarks/paper.py` with preset {s['preset']}, parameters {json.dumps(s['parameters'])}; "
        f"seeds {', '.join(map(str, result['seeds']))}; means ± the farthest seed."
        + (" Held-out training items take the place of test items." if s["validation_only"] else "")
        + (f" Left out: {', '.join(result['without'])}." if result.get("without") else ""),
        (f"Control: {json.dumps(s['control'])}. " if "softmax" not in result.get("without", ()) else "")
        + f"Automatic: {json.dumps(s.get('auto'))}.",
        f"Machine: {json.dumps(result['machine'])}; versions: {json.dumps(result['versions'])}."
        + (" Systems were measured side by side: their times say little." if beside else ""),
        "",
        LEGEND,
        "",
        "## Reached or not",
    ]
    words = {True: "yes", False: "no", None: "–"}
    rows = [(v.goal, v.where, words[v.reached], v.figure) for v in verdicts(result)]
    lines += table(("goal", "where", "reached", "difference in points, or figure"), rows)
    lines += precision_tables(result, found)
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(result, found, stem.with_suffix(".png"))


# The curves that are drawn.
COLOURS = {
    "hqsearch": "#d8432e",
    "hqsearch, over epsilon": "#f27b35",
    "hqsearch, listed by codes": "#8d1f3c",
    "hqsearch, own leaves": "#f0a59b",
    "one level": "#e8a33d",
    "softmax": "#3b6fb5",
    "softmax, our embedding": "#7fb0e3",
    "IVF-Flat": "#4d9a6a",
    "IVF-Flat, as many lists": "#9fceb0",
    "HNSW": "#8a7a5c",
}


def draw(result, found, path):
    """Precision against SUF, a row of panels for each protocol and direction, a panel for each k."""
    places = [(protocol, direction) for protocol in result["n_items"] for direction in DIRECTIONS]
    figure, axes = plt.subplots(
        len(places), 2, figsize=(10, 3.6 * len(places)), squeeze=False, layout="constrained"
    )
    for row, place in zip(axes, places, strict=True):
        for ax, k in zip(row, (1, 16), strict=True):
            drawn = curves(found, *place, k)
            for name, colour in COLOURS.items():
                if name in drawn:
                    ax.plot(*drawn[name], marker="o", markersize=4, label=name, color=colour)
            exhaustive = mean(found[*place, "exhaustive", None], f"P@{k}")
            ax.axhline(exhaustive, color="#666666", linestyle=":", label="exhaustive")
            ax.set(xscale="log", xlabel="Search speed-up factor", ylabel=f"Precision@{k}")
            ax.set_title(", ".join(place))
            ax.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            ax.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
    # Some curves are in some panels only.
    drawn = (zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes.ravel())
    handles = {name: handle for panel in drawn for handle, name in panel}
    style = {"loc": "outside lower center", "ncols": 5, "frameon": False, "fontsize": 8}
    figure.legend(handles.values(), handles.keys(), **style)
    figure.savefig(path, dpi=100)
    plt.close(figure)
