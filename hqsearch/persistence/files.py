"""Arrays, bytes and sub-folders <-> the files of a data folder, with the checksum of each."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hqsearch.durable_files import flush_file, flush_folder
from hqsearch.persistence.folder import write_bytes

WEIGHTS = "weights.safetensors"

# Arrays from this many bytes on are mapped; below, a page of its own would cost more than it shares.
_MAPPED_FROM = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


class DataWriter:
    """What is to be written, collected before the first file is touched.

    Attributes
    ----------
    arrays : dict of str to ndarray
        To be written as ``{name}.npy``.
    blobs : dict of str to bytes
        To be written as they are.
    folders : dict of str to callable
        Called with the path of a sub-folder that does not exist yet, to write it.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.blobs: dict[str, bytes] = {}
        self.folders: dict[str, Callable[[Path], Any]] = {}

    def add_array(self, name: str, array: np.ndarray) -> str:
        """Take an array to be written; return the name that it got, which may differ from `name`."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", name.lstrip("_."))
        while any(name.casefold() == taken.casefold() for taken in self.arrays):
            name += "_"
        self.arrays[name] = array
        return name

    def write(self, data: Path) -> dict[str, Any]:
        """Write all files into the folder `data`; return the entries of the manifest by file name."""
        files = {f"{name}.npy": _write_array(data / f"{name}.npy", a) for name, a in self.arrays.items()}
        files |= {name: write_bytes(data / name, blob) for name, blob in self.blobs.items()}
        for name, write in self.folders.items():
            write(data / name)
            files |= {f"{name}{rest}": entry for rest, entry in _enter_written(data / name)}
        return files


def _write_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    with path.open("wb") as file:
        writer = _HashingWriter(file)
        np.lib.format.write_array(writer, array, version=(1, 0), allow_pickle=False)
        flush_file(file)
    return {
        "bytes": writer.size,
        "sha256": writer.hash.hexdigest(),
        "dtype": array.dtype.str,
        "shape": list(array.shape),
    }


class _HashingWriter:
    """Passes bytes on to a file: the checksum is of what was meant, not of what the disk gives back."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)


def _enter_written(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Flush and enter what an encoder's own `save` wrote: a file, or a folder of files."""
    if path.is_file():
        with path.open("rb") as file:
            flush_file(file)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [("", {"bytes": path.stat().st_size, "sha256": digest})]
    if not path.is_dir():
        raise ValueError(f"Expected save to write {path.name}, but there is nothing.")
    entries = [
        (f"/{child.name}{rest}", entry)
        for child in sorted(path.iterdir())
        for rest, entry in _enter_written(child)
    ]
    flush_folder(path)
    return entries


class DataReader:
    """Verified access to the files of a data folder.

    Parameters
    ----------
    data : Path
        The folder.
    files : dict
        The manifest's entries.
    mapped : bool, default=False
        Whether larger arrays are mapped into memory instead of read.
    verify : bool, default=False
        Whether values are verified too where they are mapped.

    Raises
    ------
    ValueError
        If a file is missing, has another size, or is there without being named by the manifest.
    """

    def __init__(self, data: Path, files: dict[str, Any], *, mapped: bool = False, verify: bool = False):
        self.data = data
        self.files = files
        self.mapped = mapped
        self.verify = verify
        for name, entry in files.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"The manifest of {data.parent} names a foreign file: {name!r}.")
            path = data / name
            if not path.is_file():
                raise ValueError(f"{path} is missing.")
            if path.stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"{path} is truncated or foreign: expected {entry['bytes']} bytes, "
                    f"got {path.stat().st_size}."
                )
        for path in data.rglob("*"):
            # Hidden files are the system's own: folder settings, files open on a network drive.
            name = path.relative_to(data).as_posix()
            if path.is_file() and name not in files and not path.name.startswith("."):
                raise ValueError(f"{path} is foreign: the manifest does not name it.")

    def blob(self, name: str) -> bytes:
        """Read and verify a file."""
        return self._read(name).tobytes()

    def verify_below(self, folder: str) -> Path:
        """Verify all files of a sub-folder; return its path."""
        for name in self.files:
            if name == folder or name.startswith(f"{folder}/"):
                self._read(name)
        return self.data / folder

    def array(self, name: str, *, guides: bool = True) -> np.ndarray:
        """Read or map an array.

        Parameters
        ----------
        name : str
            Without the suffix.
        guides : bool, default=True
            Whether values lead to places in other arrays. They are verified always, since a wrong one
            would lead a compiled kernel out of its arrays.

        Returns
        -------
        ndarray
            Of the dtype and shape that the manifest says.

        Raises
        ------
        ValueError
            If the file is not such an array, or its checksum differs.
        """
        file = f"{name}.npy"
        path, entry = self.data / file, self._entry(file)
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        if dtype.hasobject:
            raise ValueError(f"{path} is foreign: it holds Python objects.")
        if self.mapped and entry["bytes"] >= _MAPPED_FROM:
            content = _map(path)
            if guides or self.verify:
                self._check(file, content)
        else:
            content = self._read(file)
        return _as_array(path, content, dtype, shape)

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            raise ValueError(f"{self.data / name} is missing from the manifest.")
        return self.files[name]

    def _read(self, name: str) -> np.ndarray:
        """Read a file once: the bytes that are verified are those that are used."""
        size = self._entry(name)["bytes"]
        content = np.empty(size, dtype=np.uint8)
        try:
            with (self.data / name).open("rb") as file:
                got = file.readinto(content.data)
        except FileNotFoundError as error:
            raise ValueError(f"{self.data / name} is missing.") from error
        if got != size:
            raise ValueError(f"{self.data / name} is truncated: expected {size} bytes, got {got}.")
        self._check(name, content)
        return content

    def _check(self, name: str, content: np.ndarray) -> None:
        if hashlib.sha256(content.data).hexdigest() != self._entry(name)["sha256"]:
            raise ValueError(f"{self.data / name} is damaged: its checksum differs from the manifest's.")


def _map(path: Path) -> np.ndarray:
    """Map a file read-only: processes share its pages, and nothing is read until it is used."""
    try:
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing.") from error


def _as_array(path: Path, content: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """View the content of a .npy file as the array that the manifest says."""
    # A header of version 1.0 is at most 10 + 65535 bytes.
    head = io.BytesIO(content[:65545].tobytes())
    try:
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("not version 1.0")
        came_shape, fortran, came_dtype = np.lib.format.read_array_header_1_0(head)
    except (ValueError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path} is damaged or foreign: it has no .npy header ({error}).") from error
    if (came_shape, came_dtype) != (shape, dtype):
        raise ValueError(
            f"{path} is damaged or foreign: expected {dtype} of shape {shape}, got {came_dtype} of shape "
            f"{came_shape}."
        )
    values = content[head.tell() :]
    if values.size != dtype.itemsize * int(np.prod(shape, dtype=object)):
        raise ValueError(f"{path} is damaged or foreign: it has {values.size} bytes of values.")
    array = values.view(dtype) if values.size else np.empty(0, dtype)
    return array.reshape(shape, order="F" if fortran else "C")
