"""A folder that is replaced as a whole: one data folder, and a manifest that names it.

The manifest is the only file that is ever replaced, by a rename. The data folder that it names was written
and flushed before, under a name of its own, and the one before is removed afterwards. So whoever is killed
at whatever moment leaves a manifest with all its data: the old or the new.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hqsearch.durable_files import flush_file, flush_folder, locked_folder

T = TypeVar("T")

MANIFEST = "manifest.json"
FORMAT = "hqsearch"
# 2: the items of an index have centroids of their leaves; those of 1 are made anew.
# 3: an encoder's embedding can be joined with the hidden layer.
# 4: its hash stage can start with a new trunk.
# 5: an index can have a gallery, which its encoder's embedding depends on.
# 6: galleries have an epsilon, and encoders compare score gaps to know them.
# 7: a softmax control's hidden layer is at unit length.
FORMAT_VERSION = 7

_DATA = re.compile(r"data-[0-9a-f]{16}")


def write_folder(
    path: str | os.PathLike, contents: dict[str, Any], write_data: Callable[[Path], dict[str, Any]]
) -> None:
    """Write a folder, or replace the one that is there, in one step.

    Parameters
    ----------
    path : path-like
        The folder. Parents are made where they are missing.
    contents : dict
        What the manifest says, beside the format and the files.
    write_data : callable
        Called with a new, empty folder; writes and flushes all files and returns the manifest's `files`.

    Raises
    ------
    ValueError
        If `path` is a file, or a folder that holds something else.
    OSError
        If the disk refuses. What was there before is there still.
    """
    path = Path(path)
    _check_target(path)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    # One writer at a time: each removes the data folders that are not its own.
    with locked_folder(path):
        data = path / f"data-{secrets.token_hex(8)}"
        try:
            data.mkdir()
            manifest = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                **contents,
                "data": data.name,
                "files": write_data(data),
            }
            draft = data / MANIFEST
            write_bytes(draft, _dump(manifest | {"sha256": _checksum(manifest)}))
            flush_folder(data)
            draft.replace(path / MANIFEST)
        except BaseException:
            shutil.rmtree(data, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise
        flush_folder(path)
        flush_folder(path.parent)
        for entry in path.iterdir():
            if _DATA.fullmatch(entry.name) and entry != data:
                shutil.rmtree(entry, ignore_errors=True)


def read_folder(path: str | os.PathLike, read: Callable[[Path, dict[str, Any]], T]) -> T:
    """Read a folder, again where a writer replaced it meanwhile.

    Parameters
    ----------
    path : path-like
        The folder.
    read : callable
        Called with the data folder and the manifest.

    Returns
    -------
    object
        What `read` returned.

    Raises
    ------
    ValueError
        If there is no such folder, or its manifest is missing, damaged, foreign or of a newer version.
    """
    path = Path(path)
    while True:
        manifest = read_manifest(path)
        try:
            return read(path / manifest["data"], manifest)
        except (ValueError, OSError):
            # Its data folder may have gone in the middle of reading; then there is a new one.
            if read_manifest(path)["data"] == manifest["data"]:
                raise


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and verify the manifest of a folder.

    Raises
    ------
    ValueError
        As `read_folder`.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"Expected {path} to be a folder that save wrote, but it is a file.")
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(f"Expected {path} to be a folder that save wrote, but {file} is missing.")
    try:
        manifest = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or foreign: it is not JSON ({error}).") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is damaged or foreign: it does not say format {FORMAT!r}.")
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version}, but this version of hqsearch reads at most "
            f"{FORMAT_VERSION}: install a newer hqsearch."
        )
    checksum = manifest.pop("sha256", None)
    if checksum != _checksum(manifest) or version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(f"{file} is damaged: its own checksum differs.")
    if not _DATA.fullmatch(str(manifest.get("data"))):
        raise ValueError(f"{file} is foreign: it names no data folder.")
    return manifest


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Write and flush a file; return its entry in the manifest's `files`."""
    with path.open("wb") as file:
        file.write(data)
        flush_file(file)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _check_target(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"Expected {path} to be a folder or not to exist, but it is a file.")
    if not path.is_dir():
        return
    if (path / MANIFEST).exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads((path / MANIFEST).read_bytes().decode("utf-8"))["format"] == FORMAT:
                return
    elif all(_DATA.fullmatch(entry.name) for entry in path.iterdir()):
        # Empty, or what a killed first save left.
        return
    raise ValueError(
        f"Expected {path} to be a folder that save wrote, an empty one or none, but it holds "
        f"{min(entry.name for entry in path.iterdir())}."
    )


def _dump(manifest: dict[str, Any]) -> bytes:
    # No newline at the end: it could be cut off without a trace.
    return json.dumps(manifest, indent=1, allow_nan=False).encode("utf-8")


def _checksum(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
