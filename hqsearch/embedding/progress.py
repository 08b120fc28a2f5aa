"""One line a trained epoch, for `verbose >= 1`."""

from __future__ import annotations

import sys
from typing import Any

BAR_WIDTH = 20


def report_epoch(record: dict[str, Any], n_epochs: int) -> None:
    """Write a bar and the epoch's figures to standard output.

    Parameters
    ----------
    record : dict
        An entry of `history_`.
    n_epochs : int
        Epochs planned for the stage.
    """
    filled = round(BAR_WIDTH * record["epoch"] / n_epochs)
    bar = "#" * filled + "." * (BAR_WIDTH - filled)
    figures = "  ".join(
        f"{name} {value:.4f}"
        for name, value in record.items()
        if name not in ("stage", "epoch", "seconds", "criterion", "standard_error")
    )
    sys.stdout.write(
        f"{record['stage']:>6} [{bar}] {record['epoch']}/{n_epochs}  {figures}  {record['seconds']:.2f} s\n"
    )
    sys.stdout.flush()
