"""What all recorded experiments reach, on one page.

``python benchmarks/paper_summary.py`` reads ``benchmarks/results/paper-*.json`` and writes
``paper-summary.md`` beside them: for each data set and loss how many goals of a kind are reached, and the
smallest difference; then their figures side by side.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from paper_goals import (
    BASELINES,
    CONTROL,
    CURVE_CONTROL,
    CURVE_HNSW,
    CURVE_IVF,
    CURVE_MIXED,
    FURTHER_LEAVES,
    PRECISION,
    SLOWER,
    SPEEDUP,
    verdicts,
)
from paper_tables import tables
from search_report import table

RESULTS = Path(__file__).parent / "results"
# Data sets and losses in the order of the table.
DATASETS = ("glyph100", "fashion_mnist", "letters", "digits", "cifar100", "imagenet32")
LOSSES = ("proxy", "npairs", "triplet")
# Kind of goal, and of which protocol; a goal of the first kind is asked in both.
COLUMNS = {
    "(i) closed": (PRECISION, "closed"),
    "(i) unseen": (PRECISION, "unseen"),
    "(i) speed-up": (SPEEDUP, ""),
    "(ii) control": (CONTROL, ""),
    "(ii) baselines": (BASELINES, ""),
    "(ii) slower ones": (SLOWER, ""),
    "control, further leaves": (FURTHER_LEAVES, ""),
    "(iii) control": (CURVE_CONTROL, ""),
    "(iii) its codes, our embedding": (CURVE_MIXED, ""),
    "(iii) IVF": (CURVE_IVF, ""),
    "HNSW": (CURVE_HNSW, ""),
}
TEXT = """# Goals reached

Written by `python benchmarks/paper_summary.py` from the recorded results. Each cell: goals reached of those
asked, and in brackets the smallest difference in points of precision (of a speed-up the least ratio to 0.8 x
the number of classes).

- (i) precision of exhaustive search of the same encoder, within the seeds' spread, at every s, in the closed
  set and among unseen classes, and how many of those are at or above it at 1, 4 and 16; speed-up at s = 1.
- (ii) closed set, s = 1: within 0.5 points of the softmax control, in each way to search it and at its
  speed-up; above every flat baseline and codes of one level, which count from 0.8 of our speed-up on, and
  above IVF and HNSW at our speed-up, or at the end of their curves. Slower flat baselines and codes of one
  level, from SUF 5 on: our curve over the number of probes above them at 1 and 16, at their speed-up,
  searched in the same way where that is as fast. The control's further leaves: our curve above its own, in
  each way to search it, at every SUF from 5 up, though no goal asks for it.
- (iii) unseen classes, s = 1: curves above the control's, in each way to search it, above those of its codes
  beside our embedding, and above IVF's on that, at every SUF from 5 up. Near SUF 5 all curves of an embedding
  are within hundredths of exhaustive search of it, where it is chance who is ahead. A curve that ends before
  its peer's counts as not reached; a peer that ends below SUF 5 is none. HNSW likewise, though
  no goal asks for it.

Where the embedding is not joined with the hidden layer (npairs and triplet, closed set) exhaustive search and
that of the trained embedding alone are the same, and count twice."""


def summary_cell(found, kind, protocol):
    """Goals of a kind and protocol, reached and asked, and the worst difference."""
    asked = (v for v in found if v.reached is not None)
    rows = [v for v in asked if v.kind == kind and v.where.startswith(protocol)]
    if not rows:
        return "–"
    # Curves may have no SUF in common.
    differences = [v.worst for v in rows if not math.isnan(v.worst)]
    text = f" ({min(differences):{'.1f' if kind == SPEEDUP else '+.1f'}})" if differences else ""
    # Of precisions the seeds' spread is allowed for; a reader may not allow it.
    above = f", {sum(v.worst >= 0 for v in rows)} at or above" if kind == PRECISION else ""
    return f"{sum(v.reached for v in rows)} of {len(rows)}{above}{text}"


def name_of(result):
    """Name an experiment: data set, loss, and settings where they are not the defaults."""
    settings = result["settings"]
    name = f"{settings['dataset']}, {settings['loss']}"
    return name if settings["preset"] == "default" else f"{name}, {settings['preset']}"


def summary_row(name, result, found):
    """One experiment: its name, sparsities, and a cell for each column."""
    cells = (summary_cell(found, kind, protocol) for kind, protocol in COLUMNS.values())
    return name, ", ".join(map(str, result["settings"]["sparsities"])), *cells


def order_of(result):
    """Where an experiment comes in the table: those of the defaults first."""
    settings = result["settings"]
    place = DATASETS.index(settings["dataset"]), LOSSES.index(settings["loss"])
    return settings["preset"] != "default", *place, settings["preset"]


def summary(results):
    """Write the page for some results, but for those on held-out training items, which are for choices."""
    recorded = [result for result in results if not result["settings"]["validation_only"]]
    recorded = [(name_of(result), result, verdicts(result)) for result in sorted(recorded, key=order_of)]
    rows = [summary_row(*experiment) for experiment in recorded]
    of_defaults = [found for found in recorded if found[1]["settings"]["preset"] == "default"]
    lines = [TEXT, *table(("data, loss", "s", *COLUMNS), rows), *tables(of_defaults)]
    return "\n".join(lines) + "\n"


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("paper-*.json"))]
    (folder / "paper-summary.md").write_text(summary(results))
    print(f"written to {folder / 'paper-summary.md'}")


if __name__ == "__main__":
    main()
