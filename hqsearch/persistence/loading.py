"""Folders -> fitted encoders, baselines and indexes."""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path
from typing import Any

from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted

from hqsearch.persistence.files import WEIGHTS, DataReader
from hqsearch.persistence.folder import MANIFEST, read_folder
from hqsearch.persistence.import_paths import import_if_allowed, import_own
from hqsearch.persistence.saving import SaveMixin
from hqsearch.persistence.values import decode


def load_estimator(
    cls: type,
    path: str | os.PathLike,
    *,
    mmap_mode: str | None = None,
    verify: bool = False,
    encoder: Any = None,
    network: Any = None,
    trusted: bool = False,
) -> Any:
    """Read an estimator that `SaveMixin.save` wrote.

    Parameters
    ----------
    cls : type
        Its class.
    path : path-like
        The folder.
    mmap_mode, verify, encoder, network, trusted
        As in `HierarchicalHashIndex.load`.

    Returns
    -------
    estimator
        Fitted, of class `cls`.

    Raises
    ------
    ValueError
        If a file is missing, damaged or foreign, the folder holds another estimator or a newer format, or
        something has to be imported that was neither given nor is trusted.
    """
    if mmap_mode not in (None, "r"):
        raise ValueError(f"Expected mmap_mode to be None or 'r', got {mmap_mode!r}.")

    def read(data: Path, manifest: dict[str, Any]) -> Any:
        file = data.parent / MANIFEST
        if manifest.get("estimator") != cls.__name__:
            raise ValueError(f"Expected {file} to be of a {cls.__name__}, got {manifest.get('estimator')!r}.")
        try:
            reader = DataReader(data, manifest["files"], mapped=mmap_mode == "r", verify=verify)
            return _Loader(file, reader, encoder, network, trusted).build(cls, manifest)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{file} is foreign: it does not describe a {cls.__name__} ({error!r})."
            ) from error

    return read_folder(path, read)


def _has_encoder(thing: Any) -> bool:
    """Whether a class or estimator is a baseline of this package, which holds an encoder and loads it."""
    cls: Any = thing if isinstance(thing, type) else type(thing)
    return issubclass(cls, SaveMixin) and "encoder" in inspect.signature(cls.load).parameters


# What parameters that older folders lack stood for.
_BEFORE = {"hidden_weight": 0.0, "hash_trunk": "metric", "epsilon": 0.0}
# And what attributes that older folders lack stood for.
_ATTRIBUTES_BEFORE: dict[str, dict[str, Any]] = {
    "HierarchicalHashEncoder": {
        "score_gap_": None,
        "distance_ratio_": None,
        "class_means_": None,
        "epsilon_": 0.0,
    },
    "HierarchicalHashIndex": {"gallery_": None},
}
# Of format 5, which are of no use any more.
_ATTRIBUTES_GONE = ("confidence_",)


class _Loader:
    """Puts one estimator together, with what the caller gave for what cannot be saved."""

    def __init__(self, file: Path, reader: DataReader, encoder: Any, network: Any, trusted: bool):
        self.file = file
        self.reader = reader
        self.encoder = encoder.estimator if isinstance(encoder, FrozenEstimator) else encoder
        self.network = network
        self.trusted = trusted

    def build(self, cls: type, manifest: dict[str, Any]) -> Any:
        kept = {name: value for name, value in manifest["state"].items() if name not in _ATTRIBUTES_GONE}
        state = {name: self._attribute(value, manifest) for name, value in kept.items()}
        estimator = self._make(cls, manifest["parameters"], state.get("encoder_"), state.get("_model"))
        vars(estimator).update(_ATTRIBUTES_BEFORE.get(manifest["estimator"], {}) | state)
        if "_items" in state:
            self._settle_encoder(estimator)
        return estimator

    def _settle_encoder(self, index: Any) -> None:
        """Refuse an encoder whose codes are not those of the table; give a given one the index's sparsity."""
        names = ("branching_factor", "n_levels")
        came, expected = ({n: getattr(tree, n) for n in names} for tree in (index.encoder_, index._items))
        if came != expected:
            raise ValueError(f"{self.file} expects an encoder with {expected}, got one with {came}.")
        # Ours came back with the sparsity of the fit; the index's parameter may have been set since.
        came_back = isinstance(index.encoder_, SaveMixin) and index.encoder_ is not self.encoder
        if not came_back and index.sparsity not in (None, index.encoder_.sparsity):
            # The caller's encoder stays as it is.
            index.encoder_ = copy.copy(index.encoder_).set_params(sparsity=index.sparsity)

    def _attribute(self, saved: Any, manifest: dict[str, Any]) -> Any:
        if isinstance(saved, dict) and "model" in saved:
            structure, network = saved["model"]
            input_shape = decode(manifest["state"]["_input_shape"], self.reader)
            return self._model(structure, network, input_shape)
        if isinstance(saved, dict) and "encoder" in saved:
            return self._encoder(*saved["encoder"])
        try:
            return decode(saved, self.reader)
        except ValueError as error:
            # Checks of the arrays among each other don't know their files.
            text = str(error)
            raise error if str(self.reader.data) in text else ValueError(f"{self.file}: {text}") from error

    def _model(self, structure: Any, network: Any, input_shape: tuple[int, ...]) -> Any:
        from hqsearch.embedding import unpack_model

        if isinstance(network, dict):
            (path,) = network.values()
            given = self.network
            if given is None:
                given = import_if_allowed(path, self.file, "network", trusted=self.trusted)
        else:
            given = network
        weights = self.reader.blob(WEIGHTS)
        try:
            return unpack_model(
                decode(structure, self.reader),
                weights,
                network=given,
                is_module=isinstance(network, dict) and "module" in network,
                input_shape=input_shape,
            )
        except ValueError as error:
            raise ValueError(f"{self.reader.data / WEIGHTS} does not fit: {error}") from error

    def _encoder(self, path: str, folder: str) -> Any:
        """Load an encoder from its sub-folder, by the given class or one that may be imported."""
        place = self.reader.verify_below(folder)
        given = self.encoder
        if given is None or (_has_encoder(import_own(path)) and not _has_encoder(given)):
            # A baseline of this package, and what is given is the encoder that the baseline holds.
            given = import_if_allowed(path, self.file, "encoder", trusted=self.trusted)
        if isinstance(given, type):
            return self._load_by(given, place)
        check_is_fitted(given)
        return given

    def _load_by(self, cls: Any, place: Path) -> Any:
        if not issubclass(cls, SaveMixin):
            return cls.load(place)
        options = {"network": self.network, "trusted": self.trusted}
        if _has_encoder(cls) and not _has_encoder(self.encoder):
            options["encoder"] = self.encoder
        return cls.load(place, **options)

    def _make(self, cls: type, saved: dict[str, Any], encoder: Any, model: Any) -> Any:
        parameters = self._parameters(saved, encoder, model)
        # Before format 3 every embedding was the trained one alone, before 4 the hash stage went on with the
        # metric stage's trunk, and before 6 a query opened no leaves for being hardly farther.
        known = inspect.signature(cls).parameters
        before = {name: value for name, value in _BEFORE.items() if name in known}
        return cls(**(before | parameters))

    def _parameters(self, saved: dict[str, Any], encoder: Any, model: Any) -> dict[str, Any]:
        return {name: self._parameter(value, encoder, model) for name, value in saved.items()}

    def _parameter(self, saved: Any, encoder: Any, model: Any) -> Any:
        if not isinstance(saved, dict):
            return decode(saved, self.reader)
        ((kind, content),) = saved.items()
        if kind == "network":
            return model._network
        if kind == "estimator":
            inner, model = (getattr(encoder, name, None) for name in ("encoder_", "_model"))
            return self._make(type(encoder), content, inner, model)
        if kind == "frozen":
            folder, changed = content
            if folder == "encoder":
                parameters = self._parameters(changed, encoder, None)
                return FrozenEstimator(copy.copy(encoder).set_params(**parameters))
            return FrozenEstimator(self._load_by(type(encoder), self.reader.verify_below(folder)))
        return decode(saved, self.reader)
