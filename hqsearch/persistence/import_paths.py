"""Classes and functions <-> import paths, followed only where that is allowed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from sklearn.base import BaseEstimator


def import_path(thing: Any) -> str:
    """Where a class or function is found, as ``module:name``."""
    return f"{getattr(thing, '__module__', '?')}:{getattr(thing, '__qualname__', '?')}"


def import_trusted(path: str) -> Any:
    """Import what an import path names.

    Raises
    ------
    ValueError
        If it cannot be imported, as what was made in a script or within a function.
    """
    module, _, name = path.partition(":")
    try:
        thing: Any = import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} can't be imported ({error}): pass it to load instead.") from error
    return thing


def import_own(path: str) -> type[BaseEstimator] | None:
    """Import an estimator of this package, which needs no trust; None for anything else.

    Raises
    ------
    ValueError
        If this package has no such name.
    """
    if path.startswith("hqsearch."):
        own = import_trusted(path)
        if isinstance(own, type) and issubclass(own, BaseEstimator):
            return own
    return None


def import_if_allowed(path: str, file: Path, argument: str, *, trusted: bool) -> Any:
    """Import what a manifest names, or say how to allow it.

    Parameters
    ----------
    path : str
        The import path.
    file : Path
        The manifest.
    argument : str
        Argument of `load` that could have given it instead.
    trusted : bool
        Whether the caller trusts the manifest. Estimators of this package need no trust.

    Returns
    -------
    object
        The class or function.

    Raises
    ------
    ValueError
        If it is neither trusted nor of this package, or cannot be imported.
    """
    if trusted:
        return import_trusted(path)
    own = import_own(path)
    if own is not None:
        return own
    name = path.rpartition(":")[2]
    raise ValueError(
        f"{file} names {path}, which is no part of hqsearch. Pass it, as in load(path, {argument}={name}), "
        "or allow its import with load(path, trusted=True)."
    )
