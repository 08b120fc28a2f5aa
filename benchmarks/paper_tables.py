"""Tables of all recorded experiments side by side: means of the seeds, differences in points of precision."""

from __future__ import annotations

import math

from paper_goals import (
    BASELINES,
    CONTROL,
    CURVE_CONTROL,
    CURVE_HNSW,
    CURVE_IVF,
    CURVE_MIXED,
    DIRECTIONS,
    FURTHER_LEAVES,
    KS,
    OVER_EPSILON,
    WAYS,
    collect,
    mean,
)
from paper_report import cell
from search_report import table

EXHAUSTIVE, TRAINED_ALONE = "exhaustive", "exhaustive, trained embedding alone"
# Flat baselines by the beginning of their names.
FLAT = {"one level": "codes of one level", "VQ": "k-means cells", "Th": "thresholds", "LSH": "hyperplanes"}


def speedup(records):
    """Mean speed-up, with a digit behind the point where it is small."""
    suf = mean(records, "SUF@1")
    return f"{suf:.0f}" if suf >= 10 else f"{suf:.1f}"


def systems_of(found, protocol):
    """List what is shown of a protocol at s = 1: a label, and the key of its records in each direction.

    The control is searched as an index does by default, in the closed set in the best of its ways in either
    direction. Where the embedding is not joined with the hidden layer, the trained one is the same and is
    left out.
    """
    # Some have curves alone.
    found = {key: records for key, records in found.items() if "P@1" in records[0]}
    shown = [(EXHAUSTIVE, EXHAUSTIVE, None), ("trained embedding alone", TRAINED_ALONE, None)]
    shown += [(name, f"hqsearch{way}", 1) for way, name in WAYS.items()]
    rows = [(label, [(protocol, direction, *system) for direction in DIRECTIONS]) for label, *system in shown]
    rows.append(("softmax control", [best_control(found, protocol, direction) for direction in DIRECTIONS]))
    scans = [(protocol, direction, "softmax, exhaustive", None) for direction in DIRECTIONS]
    rows.append(("softmax control, exhaustive", scans))
    rows = [row for row in rows if row[1][0] in found]
    joined, alone = (found.get((protocol, DIRECTIONS[0], name, None)) for name in (EXHAUSTIVE, TRAINED_ALONE))
    same = alone and all(mean(joined, f"P@{k}") == mean(alone, f"P@{k}") for k in KS)
    return [row for row in rows if not (same and row[1][0][2] == TRAINED_ALONE)]


def best_control(found, protocol, direction):
    """Key of the control's records: searched as an index does, in the closed set in its best way; or None."""
    keys = [(protocol, direction, f"softmax{way}", 1) for way in WAYS]
    keys = [key for key in keys if key in found]
    if protocol == "closed":
        keys.sort(key=lambda key: -mean(found[key], "P@1"))
    return keys[0] if keys else None


def with_leaves(records, n_items):
    """Speed-up where a query's comparisons with the centroids of leaves are counted too, as if with items."""
    # The codes' own leaves are found without any, and exhaustive search has none.
    ranked = 0 if records[0]["system"].endswith("own leaves") else mean(records, "n_leaves")
    return n_items / (n_items / mean(records, "SUF@1") + ranked)


def precision_rows(name, result, found, protocol):
    """Speed-up and precision of our ways, exhaustive search and the control, at s = 1."""
    _, n_gallery, n_queries = result["n_items"][protocol]
    for label, keys in systems_of(found, protocol):
        row = [name, label]
        for key, n_items in zip(keys, (n_gallery, n_queries), strict=True):
            records = found.get(key)
            if records is None:
                row += ["–"] * 4
                continue
            suf = with_leaves(records, n_items) if "n_leaves" in records[0] else 1.0
            row += [
                f"{mean(records, 'SUF@1'):.1f}",
                f"{suf:.1f}",
                cell(records, "P@1"),
                cell(records, "P@16"),
            ]
        yield row
        name = ""


def sparsity_rows(name, found, protocol):
    """Differences to exhaustive search at 1 and 16, and the speed-up, at every sparsity."""
    for direction in DIRECTIONS:
        row = [name, direction]
        for s in (1, 2, 3, 4):
            ours = found.get((protocol, direction, "hqsearch", s))
            theirs = found.get((protocol, direction, EXHAUSTIVE, None))
            if ours is None or theirs is None:
                row.append("–")
                continue
            gaps = (100 * (mean(ours, f"P@{k}") - mean(theirs, f"P@{k}")) for k in (1, 16))
            row.append(" / ".join(f"{gap:+.1f}" for gap in gaps) + f", {speedup(ours)}")
        if any(shown != "–" for shown in row[2:]):
            yield row
            name = ""


def least(verdicts):
    """Give the smallest difference of some goals."""
    worst = [v.worst for v in verdicts if not math.isnan(v.worst)]
    return f"{min(worst):+.1f}" if worst else "–"


def baseline_rows(name, found):
    """Smallest differences in the closed set, at s = 1, by kinds of baselines."""
    for direction in DIRECTIONS:
        here = [v for v in found if v.where == f"closed, {direction}"]
        flat = [v for v in here if v.kind == BASELINES]
        row = [name, direction, least([v for v in here if v.kind == CONTROL])]
        row += [least([v for v in flat if v.goal.startswith(f"above {begin}")]) for begin in FLAT]
        row += [least([v for v in flat if index in v.goal]) for index in ("IVF", "HNSW")]
        if any(shown != "–" for shown in row[2:]):
            yield row
            name = ""


# Whose curves ours are compared with: a title, the kind of goal, and the peer.
PEERS = {
    "closed": [(f"control, {name}", FURTHER_LEAVES, f"softmax{way}") for way, name in WAYS.items()],
    "unseen": [
        ("control", CURVE_CONTROL, "softmax"),
        ("its codes, our embedding", CURVE_MIXED, "softmax, our embedding"),
        ("IVF, a list a class", CURVE_IVF, "IVF-Flat"),
        ("IVF, as many lists", CURVE_IVF, "IVF-Flat, as many lists"),
        ("HNSW", CURVE_HNSW, "HNSW"),
    ],
}


def curve_rows(name, found, protocol):
    """Differences of the curves over the number of probes, from SUF 5 up."""
    for direction in DIRECTIONS:
        for k in (1, 16):
            here = [v for v in found if v.where == f"{protocol}, {direction}" and f"@{k} curve" in v.goal]
            here = [v for v in here if OVER_EPSILON not in v.goal]
            row = [name, f"{direction}, @{k}"]
            for _, kind, peer in PEERS[protocol]:
                figures = [v.figure for v in here if v.kind == kind and f" {peer} from" in v.goal]
                row.append(figures[0] if figures else "–")
            if any(shown != "–" for shown in row[2:]):
                yield row
                name = ""


def of_protocol(title, protocol, experiments):
    """Lines of the tables that both protocols have."""
    asked = [experiment[:3] for experiment in experiments if protocol in experiment[1]["n_items"]]
    searched = "in the best of its three ways at 1" if protocol == "closed" else "as an index does by default"
    in_both = ("SUF", "with leaves", "P@1", "P@16")
    rows = [row for name, result, found in asked for row in precision_rows(name, result, found, protocol)]
    return [
        "",
        f"## {title}",
        "",
        f"s = 1, means ± the farthest seed, first {', then '.join(DIRECTIONS)}. The control is searched",
        f"{searched}. *With leaves*: the SUF if comparisons with the centroids of leaves are",
        "counted too.",
        *table(("data, loss", "system", *in_both, *in_both), rows),
        "",
        "Index minus exhaustive search at 1 / 16, and its SUF, at every sparsity:",
        *table(
            ("data, loss", "direction", *(f"s = {s}" for s in (1, 2, 3, 4))),
            [row for name, _, found in asked for row in sparsity_rows(name, found, protocol)],
        ),
    ]


def curve_table(experiments, protocol):
    """Lines of the table of curves."""
    return [
        "",
        "Curve over the number of probed leaves minus its peers', from SUF 5 up, as far as both reach:",
        *table(
            ("data, loss", "where", *(title for title, *_ in PEERS[protocol])),
            [row for name, _, _, found in experiments for row in curve_rows(name, found, protocol)],
        ),
    ]


def tables(experiments):
    """Lines of all tables for ``(name, result, verdicts)`` of each experiment."""
    experiments = [(name, result, collect(result), found) for name, result, found in experiments]
    return [
        *of_protocol("Closed set", "closed", experiments),
        "",
        "Index at s = 1 minus baselines of at least 0.8 of its SUF, the least difference of any of them",
        "and of precision@1, @4 and @16 (the control in its three ways, at any SUF):",
        *table(
            ("data, loss", "direction", "control", *FLAT.values(), "IVF", "HNSW"),
            [row for name, _, _, found in experiments for row in baseline_rows(name, found)],
        ),
        *curve_table(experiments, "closed"),
        *of_protocol("Unseen classes", "unseen", experiments),
        *curve_table(experiments, "unseen"),
    ]
