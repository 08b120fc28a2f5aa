"""Whether a saved estimator came back whole, and a small one to save."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.utils.validation import check_is_fitted

from hqsearch import HierarchicalHashEncoder


def small_encoder(**parameters):
    return HierarchicalHashEncoder(
        **({"metric_epochs": 1, "hash_epochs": 1, "branching_factor": 8, "random_state": 0} | parameters)
    )


def assert_same_encoder(loaded, encoder, X):
    check_is_fitted(loaded)
    for method in ("embed", "level_scores", "encode"):
        ours, theirs = getattr(loaded, method)(X), getattr(encoder, method)(X)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert (loaded.transform(X) != encoder.transform(X)).nnz == 0
    np.testing.assert_array_equal(loaded.classes_, encoder.classes_)
    assert loaded.classes_.dtype == encoder.classes_.dtype
    assert loaded.history_ == encoder.history_
    assert vars(loaded).keys() == vars(encoder).keys()


def assert_same_index(loaded, index, X):
    check_is_fitted(loaded)
    for queries in (X, None):
        for probes in (None, 20):
            ours = loaded.kneighbors(queries, n_probes=probes, return_stats=True)
            theirs = index.kneighbors(queries, n_probes=probes, return_stats=True)
            np.testing.assert_array_equal(ours[0], theirs[0])
            np.testing.assert_array_equal(ours[1], theirs[1])
            assert ours[2] == theirs[2]
    assert vars(loaded).keys() == vars(index).keys()


def files_of(path):
    return sorted(file for file in Path(path).rglob("*") if file.is_file())


def damages(path, rng):
    """Ways to spoil a file, each as a name and its new content (None: no file)."""
    content = path.read_bytes()
    yield "missing", None
    yield "empty", b""
    for cut in (1, int(rng.integers(1, len(content)))):
        yield "truncated", content[:-cut]
    yield "longer", content + b"\0"
    for place in (0, len(content) - 1, *rng.integers(0, len(content), 4)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        yield f"flipped at {place}", bytes(flipped)
    yield "foreign", rng.bytes(len(content))


def assert_every_damage_is_refused(path, load):
    """Spoil every file below a saved folder in every way: `load` has to refuse it by the file's name."""
    rng = np.random.default_rng(0)
    for file in files_of(path):
        content = file.read_bytes()
        for kind, spoiled in damages(file, rng):
            if spoiled is None:
                file.unlink()
            else:
                file.write_bytes(spoiled)
            with pytest.raises(ValueError, match=r".") as refusal:
                load()
            assert file.name in str(refusal.value), f"{kind} {file.name}: {refusal.value}"
        file.write_bytes(content)
    load()
