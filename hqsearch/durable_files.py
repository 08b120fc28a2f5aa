"""Files that are whole on the disk before anything that follows, for saved folders and checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step: whoever is killed meanwhile leaves the old or the new one.

    Parameters
    ----------
    path : Path
        The file, in a folder that exists.
    data : bytes
        Its content.

    Raises
    ------
    OSError
        If the disk refuses. What was there before is there still.
    """
    # One name for all drafts, so that killed writers leave one at most; the next writer takes it over.
    draft = path.with_name(f"{path.name}.draft")
    with locked_folder(path.parent):
        try:
            with draft.open("wb") as file:
                file.write(data)
                flush_file(file)
            draft.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


def flush_file(file: Any) -> None:
    """Have a file's bytes on the disk before anything that follows."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Have a folder's entries on the disk, where the system lets a folder be opened."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Let one writer of a folder in at a time.

    The lock goes when the process does. On systems without it, two must not write to one folder at once.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems have no locks.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
