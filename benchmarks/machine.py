"""What a benchmark was run on, for its results."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def processor_name():
    """Return the processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit():
    """Return this checkout's commit, "-dirty" behind it where code has changed since; None outside of one."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        # Results are written here, one after the other: they don't count.
        changed = _git("status", "--porcelain", "--", "hqsearch", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(*arguments):
    root = Path(__file__).parents[1]
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


def describe():
    """Processor, cores, system, Python and commit."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": commit(),
    }
