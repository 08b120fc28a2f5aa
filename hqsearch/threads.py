"""Independent pieces of work on kept threads, at a few hundredths of a millisecond a call.

joblib says how many threads there should be (`effective_n_jobs` knows its contexts), but its own pool costs
a millisecond to start and 0.4 ms a call when it is kept, against 0.1 ms for a cascade or for two hundred
queries. So the threads are those of the standard library, kept between calls, and the calling thread works
too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count

__all__ = ["share_work"]


@cache
def _helpers(n_helpers: int, process: int) -> ThreadPoolExecutor:
    """Return the kept threads of a process; a forked child has none of its parent's."""
    return ThreadPoolExecutor(n_helpers, thread_name_prefix="hqsearch")


def share_work(work: Callable[[int], None], n_parts: int, n_workers: int) -> None:
    """Call ``work(0)`` ... ``work(n_parts - 1)``, each once, from `n_workers` threads.

    These are the calling thread and kept ones; whoever is free takes the next part. `work` writes its results
    itself; an exception of it is raised here.
    """
    parts = count()
    stopped = False

    def take_parts() -> None:
        nonlocal stopped
        try:
            while not stopped and (part := next(parts)) < n_parts:
                work(part)
        except BaseException:
            # Also of Ctrl-C, which only the calling thread gets: the others end with what they have begun.
            stopped = True
            raise

    n_helpers = min(n_workers, n_parts) - 1
    if n_helpers < 1:
        take_parts()
        return
    helpers = _helpers(n_workers - 1, os.getpid())
    shares = [helpers.submit(take_parts) for _ in range(n_helpers)]
    try:
        take_parts()
    finally:
        # A share that has not begun would find nothing left: other callers keep the threads busy.
        begun = [share for share in shares if not share.cancel()]
        errors = [share.exception() for share in begun]
    for error in errors:
        if error is not None:
            raise error
