"""Fitted encoders, baselines and indexes -> folders."""

from __future__ import annotations

import inspect
import os
import platform
import warnings
from importlib import metadata
from typing import Any

from sklearn.base import BaseEstimator
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted

from hqsearch.persistence.files import WEIGHTS, DataWriter
from hqsearch.persistence.folder import write_folder
from hqsearch.persistence.import_paths import import_path
from hqsearch.persistence.values import UnsavableError, encode

_PACKAGES = ("hqsearch", "numpy", "scipy", "scikit-learn", "numba", "torch", "safetensors")
# Counts of searches begin anew, and metadata routing is configuration of a process, not of an index.
_NOT_SAVED = ("_state", "_metadata_request")


class SaveMixin:
    """`save` of all estimators of this package: an encoder, a baseline or an index."""

    def save(self, path: str | os.PathLike) -> None:
        """Save the fitted estimator as a folder of plain files, without pickle.

        The folder holds `manifest.json` (parameters, versions, the checksum of every file) and a data folder
        with arrays, `weights.safetensors`, and a folder of the same kind for an encoder that the estimator
        holds. One that is there already is replaced in one step: whoever is killed meanwhile leaves the old
        or the new one, and processes that have mapped the old one keep it.

        Parameters
        ----------
        path : path-like
            The folder: a new one, an empty one, or one that `save` wrote.

        Raises
        ------
        NotFittedError
            A ValueError, if the estimator is not fitted.
        ValueError
            If `path` is a file or a folder that holds something else, labels are objects other than strings,
            an encoder that the estimator holds has no `save(path)` and `load(path)`, or a network or an
            encoder that is a parameter was replaced since `fit`. Nothing is written then.
        OSError
            If the disk refuses. What was there before is there still.

        Warns
        -----
        UserWarning
            If a parameter can be kept by pickle only. The loaded estimator has its default instead.

        Notes
        -----
        A `memory` object is saved as its location. A network of your own is saved as its weights and its
        import path; its code is not saved, see `load`. An encoder that is a parameter and not frozen is saved
        as its parameters, and comes back unfitted.
        """
        check_is_fitted(self)
        contents, writer = _take_apart(self)
        write_folder(path, contents, writer.write)


def _take_apart(estimator: Any) -> tuple[dict[str, Any], DataWriter]:
    """Encode all before anything is written: what cannot be saved is refused here."""
    writer = DataWriter()
    names = estimator.get_params(deep=False)
    # One copy of the attributes: another thread may change the estimator meanwhile.
    attributes = dict(vars(estimator))
    state = {
        name: _encode_attribute(value, name, writer)
        for name, value in attributes.items()
        if name not in names and name not in _NOT_SAVED
    }
    contents = {
        "estimator": type(estimator).__name__,
        "packages": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "parameters": _encode_parameters(estimator, attributes, writer),
        "state": state,
    }
    return contents, writer


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        # A copy of the source, not an installed package.
        return "unknown"


def _encode_attribute(value: Any, name: str, writer: DataWriter) -> Any:
    if name == "_model" and type(value).__module__.startswith("hqsearch."):
        from hqsearch.embedding import pack_model

        structure, writer.blobs[WEIGHTS] = pack_model(value)
        return {"model": [encode(structure, name, writer), _encode_network(value._network)]}
    if name == "encoder_" and value is not None:
        return {"encoder": [import_path(type(value)), _add_encoder(value, "encoder", writer)]}
    # The items' parts go by their own names.
    return encode(value, "" if name == "_items" else name, writer)


def _encode_network(network: Any) -> Any:
    if isinstance(network, str):
        return network
    return (
        {"module": import_path(type(network))} if _is_module(network) else {"callable": import_path(network)}
    )


def _is_module(network: Any) -> bool:
    return hasattr(network, "state_dict") and not isinstance(network, type)


def _add_encoder(encoder: Any, folder: str, writer: DataWriter) -> str:
    """Have an encoder saved into a sub-folder; return its name."""
    save, load = (getattr(type(encoder), name, None) for name in ("save", "load"))
    if not callable(save) or not callable(load):
        raise ValueError(
            "Expected encoder to have a method save(path) and a classmethod load(path), as "
            f"HierarchicalHashEncoder has, but {type(encoder).__name__} lacks them."
        )
    if save is SaveMixin.save:
        # Taken apart now, so that what cannot be saved is refused before anything is written.
        check_is_fitted(encoder)
        contents, inner = _take_apart(encoder)
        writer.folders[folder] = lambda path: write_folder(path, contents, inner.write)
    else:
        writer.folders[folder] = encoder.save
    return folder


def _encode_parameters(estimator: Any, learned: dict[str, Any], writer: DataWriter) -> dict[str, Any]:
    """Encode parameters; leave out, with a warning, those that JSON cannot hold.

    `learned` are the attributes of what was fitted with them: the estimator itself, or its fitted clone.
    """
    encoded = {}
    for name, value in estimator.get_params(deep=False).items():
        try:
            encoded[name] = _encode_parameter(name, value, learned, writer)
        except UnsavableError as error:
            default = inspect.signature(type(estimator).__init__).parameters[name].default
            warnings.warn(
                f"The loaded {type(estimator).__name__} will have {name}={default!r}, the default. {error}",
                UserWarning,
                stacklevel=4,
            )
    return encoded


def _encode_parameter(name: str, value: Any, learned: dict[str, Any], writer: DataWriter) -> Any:
    if isinstance(value, BaseEstimator):
        is_frozen = isinstance(value, FrozenEstimator)
        given, fitted = value.estimator if is_frozen else value, learned.get("encoder_")
        if type(given) is not type(fitted):
            # Its class is taken from the fitted one, which is trusted or given.
            raise ValueError(
                f"Expected {name} to be of the class that was fitted, {type(fitted).__name__}, got "
                f"{type(given).__name__}; fit again."
            )
        if is_frozen:
            return {"frozen": _encode_frozen(given, fitted, writer)}
        return {"estimator": _encode_parameters(given, vars(fitted), writer)}
    if name == "network" and not isinstance(value, str):
        trained = getattr(learned.get("_model"), "_network", None)
        # An index clones its encoder, and a clone has modules of its own.
        if trained is not value and not (_is_module(value) and type(trained) is type(value)):
            raise ValueError(
                "Expected network to be what the encoder was fitted with, but it was changed since; "
                "fit again."
            )
        return {"network": None}
    if name == "memory" and hasattr(value, "cache"):
        # The place is what matters of a cache; making a Memory makes its folder, which loading should not.
        value = getattr(value, "location", value)
    if name == "checkpoint_dir" and isinstance(value, os.PathLike):
        value = os.fspath(value)
    return encode(value, f"parameter {name}", writer)


def _encode_frozen(encoder: Any, fitted: Any, writer: DataWriter) -> list[Any]:
    """Encode a frozen encoder: as `fitted`, the estimator's own one, with other parameters, if it is that."""
    names = encoder.get_params(deep=False)
    learned, held = ({k: v for k, v in vars(e).items() if k not in names} for e in (encoder, fitted))
    if learned.keys() == held.keys():
        changed = {k: v for k, v in vars(encoder).items() if v is not vars(fitted)[k]}
        if not changed.keys() & learned.keys():
            return ["encoder", {k: encode(v, f"parameter {k}", writer) for k, v in changed.items()}]
    return [_add_encoder(encoder, "frozen_encoder", writer), {}]
