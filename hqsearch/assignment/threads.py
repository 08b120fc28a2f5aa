"""Independent pieces of work on joblib threads, at a fraction of a millisecond a call.

A `joblib.Parallel` that starts its threads anew costs about a millisecond a call, and one that waits for its
results polls every 10 ms; a cascade takes 0.2 ms. So the threads are kept between calls, the calling thread
works too, and results are only collected once they are there.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Any

__all__ = ["share_work"]

_crews: dict[tuple[int, int], tuple[Any, threading.Lock]] = {}
_crews_lock = threading.Lock()


def _crew(n_workers: int) -> tuple[Any, threading.Lock]:
    """Return this process's kept joblib threads for `n_workers`, and the lock of whoever uses them."""
    from joblib import Parallel

    key = (os.getpid(), n_workers)  # a forked child has none of its parent's threads
    with _crews_lock:
        if key not in _crews:
            parallel = Parallel(
                n_jobs=n_workers,
                prefer="threads",
                require="sharedmem",
                return_as="generator",
                pre_dispatch="all",
                batch_size=1,
            )
            _crews[key] = parallel.__enter__(), threading.Lock()
            # Threads that are left to the interpreter's end are warned about as unclosed.
            atexit.register(parallel.__exit__, None, None, None)
        return _crews[key]


def share_work(work: Callable[[int], None], n_parts: int, n_workers: int) -> None:
    """Call ``work(0)`` ... ``work(n_parts - 1)``, each once, from `n_workers` threads.

    These are the calling thread and joblib's; whoever is free takes the next part. `work` writes its results
    itself; its first exception is raised here.
    """
    parts = count()
    finished = threading.Semaphore(0)

    def take_parts() -> None:
        while (part := next(parts)) < n_parts:
            work(part)

    def help_out() -> None:
        try:
            take_parts()
        finally:
            finished.release()

    n_helpers = min(n_workers, n_parts) - 1
    if n_helpers < 1:
        take_parts()
        return
    from joblib import delayed

    crew, busy = _crew(n_workers)
    if not busy.acquire(blocking=False):
        # another thread is using these: the machine is busy enough
        take_parts()
        return
    try:
        results = crew(delayed(help_out)() for _ in range(n_helpers))
        try:
            take_parts()
        finally:
            for _ in range(n_helpers):
                finished.acquire()
            # joblib's own thread notes the result a moment later; asked before that, it sleeps for 10 ms
            time.sleep(1e-4)
            list(results)
    finally:
        busy.release()
