import json
import re

import numpy as np
import pytest
from plain_encoder import PlainEncoder
from saved_estimators import assert_every_damage_is_refused, files_of
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.baselines import SoftmaxHashEncoder
from hqsearch.persistence import folder as folders
from hqsearch.search import table_arrays, table_from_arrays


def refusal(path, **options):
    """Message of the ValueError that loading raises."""
    try:
        HierarchicalHashIndex.load(path, **options)
    except ValueError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("options", [{}, {"mmap_mode": "r", "verify": True}], ids=["read", "mapped"])
def test_every_damage_to_every_file_is_refused_by_the_files_name(index, tmp_path, options, monkeypatch):
    monkeypatch.setattr("hqsearch.persistence.files._MAPPED_FROM", 1)
    index.save(tmp_path)
    assert {file.suffix for file in files_of(tmp_path)} == {".npy", ".json", ".safetensors"}
    assert_every_damage_is_refused(tmp_path, lambda: HierarchicalHashIndex.load(tmp_path, **options))


def test_a_mapped_index_verifies_all_but_the_values_of_vectors_and_scores(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("hqsearch.persistence.files._MAPPED_FROM", 1)
    plain.save(tmp_path)
    unverified = set()
    for file in files_of(tmp_path):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        message = refusal(tmp_path, mmap_mode="r", encoder=PlainEncoder)
        if message == "loaded":
            unverified.add(file.name)
        else:
            assert file.name in message
        # Header and size are verified always.
        for spoiled in (content[:-1], content.replace(b"descr", b"desrc"), content.replace(b"'<", b"'>")):
            if spoiled != content:
                file.write_bytes(spoiled)
                with pytest.raises(ValueError, match=re.escape(file.name)):
                    HierarchicalHashIndex.load(tmp_path, "r", encoder=PlainEncoder)
        file.write_bytes(content)
    figures = ("table.segment0.packed", "cell_scores.scores", "centroids.vectors.segment0.packed")
    assert unverified == {f"{name}.npy" for name in figures}


def test_a_file_that_the_manifest_does_not_name_is_refused(plain, tmp_path):
    plain.save(tmp_path)
    (data,) = tmp_path.glob("data-*")
    (tmp_path / "README.md").write_text("beside the data anything may lie")
    (data / ".hidden").write_text("and the system's own files")
    HierarchicalHashIndex.load(tmp_path, encoder=PlainEncoder)
    (data / "more.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"more.npy is foreign: the manifest does not name it"):
        HierarchicalHashIndex.load(tmp_path, encoder=PlainEncoder)


def rewrite_manifest(path, change):
    """Change a manifest as somebody would who also mends its checksum."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    change(manifest)
    file.write_text(json.dumps(manifest | {"sha256": folders._checksum(manifest)}))


def test_a_newer_format_is_refused(plain, tmp_path):
    plain.save(tmp_path)
    rewrite_manifest(tmp_path, lambda manifest: manifest.update(format_version=8))
    with pytest.raises(ValueError, match=r"manifest.json has format version 8, .*reads at most 7: install"):
        HierarchicalHashIndex.load(tmp_path, encoder=PlainEncoder)


def test_a_control_of_an_older_format_keeps_its_hidden_layer_as_it_is(digits, tmp_path):
    X, y, X_query, _ = digits
    control = SoftmaxHashEncoder(epochs=1, random_state=0).fit(X, y)
    control.save(tmp_path)
    np.testing.assert_array_equal(SoftmaxHashEncoder.load(tmp_path).embed(X_query), control.embed(X_query))

    def as_before(manifest):
        manifest["format_version"] = 6
        del manifest["state"]["_unit_length"]

    rewrite_manifest(tmp_path, as_before)
    hidden = SoftmaxHashEncoder.load(tmp_path).embed(X_query)
    lengths = np.linalg.norm(hidden, axis=1, keepdims=True)
    assert lengths.std() > 0.1
    np.testing.assert_allclose(hidden / lengths, control.embed(X_query), atol=1e-6)


def test_a_gallery_of_an_older_format_opens_the_leaves_that_it_did(digits, tmp_path):
    X, y, X_query, _ = digits
    encoder = HierarchicalHashEncoder(metric_epochs=1, hash_epochs=1, embedding_dim=16, random_state=0)
    encoder.fit(X[y < 7], y[y < 7])
    # Wide enough to be of other classes.
    encoder.score_gap_ = (1e3, 0.0)
    index = HierarchicalHashIndex(FrozenEstimator(encoder)).fit(X)
    index.save(tmp_path)

    def as_before(manifest):
        manifest["format_version"] = 5
        del manifest["parameters"]["epsilon"]
        del manifest["state"]["gallery_"]["object"][1]["epsilon"]

    rewrite_manifest(tmp_path, as_before)
    loaded = HierarchicalHashIndex.load(tmp_path)
    assert (loaded.epsilon, loaded.gallery_.epsilon) == (0, 0)
    np.testing.assert_array_equal(loaded.kneighbors(X_query)[1], index.kneighbors(X_query, epsilon=0.0)[1])
    assert index.kneighbors(X_query, return_stats=True)[2].leaves_opened > len(X_query)


def test_an_encoder_of_an_older_format_goes_on_being_trained_as_it_was(digits, tmp_path):
    X, y, X_query, _ = digits
    encoder = HierarchicalHashEncoder(metric_epochs=1, hash_epochs=1, hidden_weight=0, random_state=0)
    expected = encoder.fit(X, y).embed(X_query)
    encoder.save(tmp_path)

    def as_before(manifest):
        manifest["format_version"] = 2
        for name in ("hidden_weight", "hash_trunk"):
            del manifest["parameters"][name]
        manifest["state"]["confidence_"] = manifest["state"].pop("score_gap_")

    rewrite_manifest(tmp_path, as_before)
    loaded = HierarchicalHashEncoder.load(tmp_path)
    assert loaded.score_gap_ is None
    assert not hasattr(loaded, "confidence_")
    np.testing.assert_array_equal(loaded.embed(X_query), expected)
    assert (loaded.hidden_weight, loaded.hash_trunk) == (0, "metric")
    np.testing.assert_array_equal(clone(loaded).fit(X, y).embed(X_query), expected)


class FewParameters(HierarchicalHashEncoder):
    """A user's own, that leaves some parameters out."""

    def __init__(self, *, hidden_weight="auto", metric_epochs=1, hash_epochs=1, random_state=0):
        super().__init__(
            hidden_weight=hidden_weight,
            metric_epochs=metric_epochs,
            hash_epochs=hash_epochs,
            random_state=random_state,
        )


def test_an_encoder_of_a_subclass_with_fewer_parameters_loads(digits, tmp_path):
    X, y, X_query, _ = digits
    encoder = FewParameters(hidden_weight=0.5).fit(X, y)
    encoder.save(tmp_path)
    loaded = FewParameters.load(tmp_path)
    assert loaded.get_params() == encoder.get_params()
    np.testing.assert_array_equal(loaded.embed(X_query), encoder.embed(X_query))


def test_an_index_of_an_older_format_fits_again_as_it_was_fitted(digits, tmp_path):
    X, y, X_query, _ = digits
    encoder = HierarchicalHashEncoder(metric_epochs=1, hash_epochs=1, hidden_weight=0, random_state=0)
    index = HierarchicalHashIndex(encoder).fit(X, y)
    index.save(tmp_path)

    def as_before(manifest):
        manifest["format_version"] = 2
        for name in ("hidden_weight", "hash_trunk"):
            del manifest["parameters"]["encoder"]["estimator"][name]
        del manifest["state"]["gallery_"]

    rewrite_manifest(tmp_path, as_before)
    loaded = HierarchicalHashIndex.load(tmp_path)
    assert loaded.gallery_ is None
    assert (loaded.encoder.hidden_weight, loaded.encoder.hash_trunk) == (0, "metric")
    expected = index.kneighbors(X_query)
    for found in (loaded.kneighbors(X_query), clone(loaded).fit(X, y).kneighbors(X_query)):
        np.testing.assert_array_equal(found[1], expected[1])


def test_an_index_that_lists_by_centroids_goes_on_doing_so(plain, items, tmp_path):
    index = HierarchicalHashIndex(PlainEncoder(), listing="centroids").fit(items[:200])
    index.save(tmp_path)
    loaded = HierarchicalHashIndex.load(tmp_path, "r", encoder=PlainEncoder)
    for changed in (index, loaded):
        changed.add(items[200:])
    np.testing.assert_array_equal(loaded.table_.stored_codes(), index.table_.stored_codes())
    assert (index.table_.stored_codes()[200:] != index.encoder_.encode(items[200:])).any()


def test_an_index_saved_before_there_were_centroids_gets_them(items, tmp_path):
    def make_old(manifest):
        manifest["format_version"] = 1
        for name in ("centroids", "listing"):
            del manifest["state"]["_items"]["object"][1][name]

    emptied = HierarchicalHashIndex(PlainEncoder(), listing="codes").fit(items)
    codes = emptied.table_.stored_codes()[:, 0]
    for gone in (np.flatnonzero(codes == codes.max()), np.arange(len(items))):
        emptied.remove(np.setdiff1d(gone, np.flatnonzero(emptied._items.table._live_flags == 0)))
        emptied.save(tmp_path)
        rewrite_manifest(tmp_path, make_old)
        loaded = HierarchicalHashIndex.load(tmp_path, encoder=PlainEncoder)
        assert loaded.n_samples_fit_ == emptied.n_samples_fit_
        if loaded.n_samples_fit_:
            assert loaded._items._leaf_sizes.sum() == loaded.n_samples_fit_
            assert not np.isin(loaded.kneighbors(items, 3)[1], gone).any()
    fitted = HierarchicalHashIndex(PlainEncoder(), listing="codes").fit(items)
    fitted.save(tmp_path)
    rewrite_manifest(tmp_path, make_old)
    loaded = HierarchicalHashIndex.load(tmp_path, encoder=PlainEncoder)
    ours, theirs = loaded._items.centroids, fitted._items.centroids
    np.testing.assert_array_equal(ours.leaf_ids, theirs.leaf_ids)
    assert loaded.kneighbors(items, n_probes=4)[1].shape == (len(items), 5)
    # Made of the mean scores of the items that share a code, so about the same.
    described = items, loaded.encoder_.level_scores(items)
    assert (ours.nearest(*described, 1) == theirs.nearest(*described, 1)).mean() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"../../x.npy": {"bytes": 1}}), r"foreign file: '../../x.npy'"),
        (lambda m: m["files"].update({"/etc/hosts": {"bytes": 1}}), r"foreign file: '/etc/hosts'"),
        (lambda m: m.update(data="../elsewhere"), "names no data folder"),
        (lambda m: m.update(format="other"), "does not say format 'hqsearch'"),
        (lambda m: m.pop("state"), "manifest.json is foreign"),
        (lambda m: m["state"].update(n_features_in_={"unheard": 1}), "manifest.json: .*known kind"),
        (lambda m: m["state"].update(n_features_in_={"array": "other"}), "other.npy is missing"),
        (lambda m: m["files"]["labels.npy"].update(dtype="|O"), "labels.npy is foreign: .*Python objects"),
        (lambda m: m["files"]["labels.npy"].update(shape=[2]), r"labels.npy .*int64 of shape \(2,\)"),
        (lambda m: m["parameters"].update(surprise=1), "manifest.json is foreign.*surprise"),
        (lambda m: m["state"].update(encoder_={"encoder": ["os:system", "encoder"]}), "trusted=True"),
        (lambda m: m["state"].update(encoder_={"encoder": ["hqsearch.index:os", "encoder"]}), "trusted=True"),
    ],
)  # fmt: skip
def test_a_made_up_manifest_is_refused(plain, tmp_path, change, message):
    plain.save(tmp_path)
    rewrite_manifest(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        HierarchicalHashIndex.load(tmp_path, encoder=None if message == "trusted=True" else PlainEncoder)


def test_arrays_of_python_objects_are_never_unpickled(plain, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    plain.save(tmp_path)
    (data,) = tmp_path.glob("data-*")
    file = data / "labels.npy"
    np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)

    def enter(manifest):
        content = file.read_bytes()
        entry = {"bytes": len(content), "sha256": folders.hashlib.sha256(content).hexdigest()}
        manifest["files"]["labels.npy"] |= entry

    rewrite_manifest(tmp_path, enter)
    with pytest.raises(ValueError, match=r"labels.npy is damaged or foreign"):
        HierarchicalHashIndex.load(tmp_path, encoder=PlainEncoder)


def test_every_array_is_a_plain_npy_file(index, tmp_path):
    index.save(tmp_path)
    for file in tmp_path.rglob("*.npy"):
        assert np.load(file, allow_pickle=False).dtype.kind in "biufU"


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("positions", lambda a: a.fill(10**6)),
        ("positions", lambda a: a.fill(0)),
        ("cell_start", lambda a: a.__setitem__(1, 10**6)),
        ("cell_codes", lambda a: a.fill(16)),
        ("cell_live", lambda a: a.__setitem__(0, 10**6)),
        ("leaf_ids", lambda a: a.__setitem__(0, a[1])),
        ("leaf_start", lambda a: a.__setitem__(-1, 10**6)),
        ("leaf_cells", lambda a: a.fill(-1)),
    ],
)
def test_places_outside_a_table_are_refused_before_a_kernel_reads_them(plain, name, spoil):
    numbers, arrays = table_arrays(plain._items.table)
    arrays = {key: array.copy() for key, array in arrays.items()}
    spoil(arrays[f"segment0.{name}"])
    with pytest.raises(ValueError, match=r"Expected (segment0|live)"):
        table_from_arrays(numbers, arrays)
    arrays[f"segment0.{name}"] = arrays[f"segment0.{name}"][:-1]
    with pytest.raises(ValueError, match="Expected segment0"):
        table_from_arrays(numbers, arrays)


def test_what_is_no_saved_folder_is_refused_by_its_name(plain, encoder, tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    for path, message in (
        (file, "file to be a folder.*it is a file"),
        (tmp_path, "manifest.json is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            HierarchicalHashIndex.load(path)
    with pytest.raises(ValueError, match=r"nowhere.manifest.json is missing"):
        HierarchicalHashIndex.load(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(ValueError, match=r"manifest.json is damaged or foreign"):
        HierarchicalHashIndex.load(tmp_path)
    encoder.save(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"manifest.json to be of a HierarchicalHashIndex, got 'Hierarch"):
        HierarchicalHashIndex.load(tmp_path / "encoder")
    with pytest.raises(ValueError, match="Expected mmap_mode to be None or 'r', got 'w'"):
        HierarchicalHashIndex.load(tmp_path / "encoder", mmap_mode="w")


def test_save_touches_nothing_that_it_did_not_write(plain, tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("text")
    page = tmp_path / "page"
    page.mkdir()
    (page / "manifest.json").write_text("[1]")
    for path, message in (
        (file, "it is a file"),
        (foreign, "holds thesis.tex"),
        (page, "holds manifest.json"),
    ):
        with pytest.raises(ValueError, match=message):
            plain.save(path)
    assert [f.name for f in files_of(tmp_path)] == ["file", "thesis.tex", "manifest.json"]


def test_what_is_not_fitted_is_not_saved(tmp_path):
    for estimator in (HierarchicalHashEncoder(), HierarchicalHashIndex()):
        with pytest.raises(NotFittedError):
            estimator.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
