"""The papers' experiments as JSON, Markdown tables laid out like the papers', and a picture."""

from __future__ import annotations

import json

import matplotlib as mpl
import matplotlib.ticker
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from search_report import table

KS = (1, 4, 16)
OVER_EPSILON = ", over epsilon"


def collect(result):
    """Sort records by (protocol, direction, system, s): a list over the seeds each."""
    found = {}
    for r in result["records"]:
        found.setdefault((r["protocol"], r["direction"], r["system"], r["s"]), []).append(r)
    return found


def mean(records, name):
    """Mean over the seeds."""
    return float(np.mean([r[name] for r in records]))


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
    names = ("SUF@1", "SUF@16", "P@1", "P@4", "P@16", "R@16", "NMI", "us")
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
        header = ("system", "s", *names[:-2], "NMI", "µs a query")
        lines += table(header, rows)
        lines += curve_table(found, protocol, direction)
    return lines


def curves(found, protocol, direction, k):
    """Mean curve of each system: name to (SUF, precision), along the points that all seeds have.

    A curve of some seeds only is none: galleries are noticed one by one.
    """
    out = {}
    n_seeds = max(
        (len(records) for key, records in found.items() if key[:2] == (protocol, direction)), default=0
    )
    for (p, d, system, _), records in found.items():
        if (
            (p, d) != (protocol, direction)
            or len(records) < n_seeds
            or "curve" not in records[0]
            or f"SUF@{k}" not in records[0]["curve"][0]
        ):
            continue
        n = min(len(r["curve"]) for r in records)
        points = np.array([[(c[f"SUF@{k}"], c[f"P@{k}"]) for c in r["curve"][:n]] for r in records]).mean(0)
        out[system] = points[:, 0], points[:, 1]
    return out


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
    return [
        "",
        "SUF: precision@1 / @16 for 1, 2, 4, ... probed leaves or lists, and from epsilon = 0 up:",
        *table(("system", "curve"), rows),
    ]


def at(curve, suf):
    """Precision of a curve at given speed-ups, linear in log SUF; NaN beyond its ends."""
    order = np.argsort(curve[0])
    x, y = np.log(np.asarray(curve[0])[order]), np.asarray(curve[1])[order]
    return np.interp(np.log(suf), x, y, left=np.nan, right=np.nan)


def against_exhaustive(result, found):
    """Goal (i): as precise as exhaustive search, at a speed-up near the number of classes."""
    for (protocol, direction), s in {(key[:2], key[3]): None for key in found if key[2] == "hqsearch"}:
        ours = found[protocol, direction, "hqsearch", s]
        where = f"{protocol}, {direction}, s = {s}"
        for system in ("exhaustive", "exhaustive, trained embedding alone"):
            # The second one is there only where the embedding can be joined with the hidden layer.
            if system != "exhaustive" and (protocol, direction, system, None) not in found:
                continue
            # Seed by seed: both search embeddings of one network.
            theirs = {r["seed"]: r for r in found[protocol, direction, system, None]}
            pairs = [[r[f"P@{k}"] - theirs[r["seed"]][f"P@{k}"] for r in ours] for k in KS]
            gaps = [float(np.mean(of_seeds)) for of_seeds in pairs]
            slack = [float(np.abs(np.array(d) - np.mean(d)).max()) for d in pairs]
            held = all(gap >= -room for gap, room in zip(gaps, slack, strict=True))
            goal = system.replace("exhaustive", "exhaustive search", 1)
            yield f"precision@1, 4, 16 of {goal}, within the seeds' spread", where, held, points(gaps)
        if s == 1:
            n_classes = result["n_classes"][protocol]
            suf = mean(ours, "SUF@1")
            goal = f"SUF >= 0.8 x {n_classes} classes at s = 1"
            yield goal, f"{protocol}, {direction}", suf >= 0.8 * n_classes, f"{suf:.1f}"


def points(differences):
    """Differences of precision as points."""
    return ", ".join(f"{100 * gap:+.2f}" for gap in differences)


def closed_set(found):
    """Goal (ii): near the softmax control and above every other baseline, ours at s = 1.

    A baseline counts, at any sparsity, where its speed-up is at least 0.8 of ours.
    """
    for direction in dict.fromkeys(key[1] for key in found if key[0] == "closed"):
        group = {key[2:]: records for key, records in found.items() if key[:2] == ("closed", direction)}
        if ("hqsearch", 1) not in group:
            continue
        ours, where = group["hqsearch", 1], f"closed, {direction}"
        for name in ("softmax", "softmax, listed by codes", "softmax, own leaves"):
            if (name, 1) not in group:
                continue
            control = group[name, 1]
            gaps = [mean(ours, f"P@{k}") - mean(control, f"P@{k}") for k in KS]
            fast = mean(ours, "SUF@16") >= 0.99 * mean(control, "SUF@16")
            goal = f"within 0.5 points of {name}, the control, at its SUF or higher"
            yield goal, where, fast and min(gaps) >= -0.005, points(gaps)
        suf = mean(ours, "SUF@16")
        for (name, s), records in group.items():
            flat = name.startswith(("one level", "Th", "VQ", "LSH")) and not name.endswith(OVER_EPSILON)
            if not flat or mean(records, "SUF@16") < 0.8 * suf:
                continue
            gaps = [mean(ours, f"P@{k}") - mean(records, f"P@{k}") for k in KS]
            yield (
                f"above {name}, s = {s}, at SUF@16 {mean(records, 'SUF@16'):.0f}",
                where,
                min(gaps) >= 0,
                points(gaps),
            )
        for k in (1, 16):
            for name, peer in curves(found, "closed", direction, k).items():
                if not name.startswith("IVF"):
                    continue
                # Beyond its ends its last point on that side.
                suf = np.clip(mean(ours, f"SUF@{k}"), peer[0].min(), peer[0].max())
                gap = mean(ours, f"P@{k}") - float(at(peer, suf))
                yield f"precision@{k} above {name} at SUF {suf:.1f}", where, gap >= 0, points([gap])


def over_of(system):
    """Tell what a system's curve is over by its name: epsilon, or else the number of probes."""
    return OVER_EPSILON if system.endswith(OVER_EPSILON) else ""


def unseen_classes(found):
    """Goal (iii): the curve over n_probes above the control's and IVF's at every speed-up from 5 up.

    The curve over epsilon likewise, where there is one; the control's own one is then its peer.
    """
    for direction in dict.fromkeys(key[1] for key in found if key[0] == "unseen"):
        for k in (1, 16):
            all_curves = curves(found, "unseen", direction, k)
            for peer, over in (
                (peer, over)
                for peer in all_curves
                for over in ("", OVER_EPSILON)
                if f"hqsearch{over}" in all_curves
                and (peer.startswith("IVF-Flat") or (peer.startswith("softmax") and over_of(peer) == over))
            ):
                suf = np.geomspace(5, max(5.1, all_curves[peer][0].max()), 20)
                ours, theirs = at(all_curves[f"hqsearch{over}"], suf), at(all_curves[peer], suf)
                # Where the peer reaches and we do not, it is ahead.
                missing = np.isnan(ours) & ~np.isnan(theirs)
                ahead = (ours - theirs)[~np.isnan(ours - theirs)]
                text = (
                    f"{100 * ahead.min():+.1f} to {100 * ahead.max():+.1f}"
                    if len(ahead)
                    else "no SUF in common"
                )
                if missing.any():
                    text += f"; only the peer reaches SUF {suf[missing].max():.0f}"
                reached = len(ahead) > 0 and not missing.any() and bool((ahead >= 0).all())
                goal = f"precision@{k} curve{over} above {peer} from SUF 5 up"
                yield goal, f"unseen, {direction}", reached, text


def verdicts(result, found):
    """Rows of what is reached: goal, where, whether, by how much."""
    yield from against_exhaustive(result, found)
    yield from closed_set(found)
    yield from unseen_classes(found)


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
        f"Control: {json.dumps(s['control'])}. Automatic: {json.dumps(s.get('auto'))}.",
        f"Machine: {json.dumps(result['machine'])}; versions: {json.dumps(result['versions'])}."
        + (" Systems were measured side by side: their times say little." if beside else ""),
        "",
        "## Reached or not",
    ]
    rows = [(g, where, "yes" if ok else "no", text) for g, where, ok, text in verdicts(result, found)]
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
}


def draw(result, found, path):
    """Precision against SUF, a panel for each protocol and k, test->train."""
    protocols = list(result["n_items"])
    figure, axes = plt.subplots(
        len(protocols), 2, figsize=(10, 3.9 * len(protocols)), squeeze=False, layout="constrained"
    )
    for row, protocol in zip(axes, protocols, strict=True):
        for ax, k in zip(row, (1, 16), strict=True):
            drawn = curves(found, protocol, "test->train", k)
            for name, colour in COLOURS.items():
                if name in drawn:
                    ax.plot(*drawn[name], marker="o", markersize=4, label=name, color=colour)
            exhaustive = mean(found[protocol, "test->train", "exhaustive", None], f"P@{k}")
            ax.axhline(exhaustive, color="#666666", linestyle=":", label="exhaustive")
            ax.set(xscale="log", xlabel="Search speed-up factor", ylabel=f"Precision@{k}", title=protocol)
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
