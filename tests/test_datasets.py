"""Loaders, on tiny files of the exact published formats."""

import gzip
import io
import pickle
import pickletools
import struct
import tarfile

import numpy as np
import pytest

from hqsearch.datasets import (
    fetch_cifar100,
    fetch_imagenet32,
    load_digits,
    load_fashion_mnist,
    load_glyph100,
)
from hqsearch.datasets.fashion_mnist import DEBIAN_FOLDER
from hqsearch.datasets.restricted_pickle import read_pickled_dict


def python2_pickle(items):
    """A dict as Python 2 pickled it with protocol 2: byte strings, and numpy under its old names."""

    def string(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def write(value):
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        if isinstance(value, bytes):
            return string(value)
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        code = value.dtype.str[1:].encode()
        order = value.dtype.str[:1].encode()
        dtype = b"cnumpy\ndtype\n" + string(code) + b"K\x00K\x01\x87R"
        dtype += b"(K\x03" + string(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
        is_fortran = value.flags.f_contiguous and not value.flags.c_contiguous
        shape = b"(" + b"".join(map(write, value.shape)) + b"t"
        raw = value.tobytes(order="A")
        return empty + b"(K\x01" + shape + dtype + (b"\x88" if is_fortran else b"\x89") + string(raw) + b"tb"

    return b"\x80\x02}(" + b"".join(string(key) + write(value) for key, value in items.items()) + b"u."


def read(content, tmp_path):
    return read_pickled_dict(io.BytesIO(content), tmp_path / "some_file")


def images(n, n_pixels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, n_pixels), dtype=np.uint8)


def cifar_files(labels_train=(0, 99, 7), labels_test=(3, 4)):
    def part(labels, seed):
        return {
            b"filenames": [b"a.png"] * len(labels),
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": list(labels),
            b"coarse_labels": [1] * len(labels),
            b"data": images(len(labels), 3072, seed),
        }

    meta = {b"fine_label_names": [f"fine {i}".encode() for i in range(100)], b"coarse_label_names": [b"c"]}
    parts = {"train": part(labels_train, 0), "test": part(labels_test, 1), "meta": meta}
    return {name: python2_pickle(content) for name, content in parts.items()}


def write_cifar(home, files):
    (home / "cifar-100-python").mkdir()
    for name, content in files.items():
        (home / "cifar-100-python" / name).write_bytes(content)


def archive_cifar(home, files):
    with tarfile.open(home / "cifar-100-python.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_imagenet(home, protocol=2):
    for i in range(1, 11):
        content = {
            "data": images(2, 3072, i),
            "labels": [i, 1001 - i],
            "mean": images(1, 3072).mean(0),
        }
        (home / f"train_data_batch_{i}").write_bytes(pickle.dumps(content, protocol))
    content = {"data": images(3, 3072, 11), "labels": [1, 1000, 500]}
    (home / "val_data").write_bytes(pickle.dumps(content, protocol))


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def fashion_files(n_train=4, n_test=2):
    files = {}
    for prefix, n in (("train", n_train), ("t10k", n_test)):
        files[f"{prefix}-images-idx3-ubyte"] = idx(images(n, 784, n).reshape(n, 28, 28))
        files[f"{prefix}-labels-idx1-ubyte"] = idx(np.arange(n, dtype=np.uint8))
    return files


def glyph_arrays(n=6):
    return {
        "X": images(n, 1024).reshape(n, 32, 32),
        "y": np.arange(n, dtype=np.int16) % 3,
        "family": np.arange(n, dtype=np.int16) + 10,
        "is_test": np.arange(n) % 2 == 0,
        "classes": np.array(["a", "b", "ß"]),
    }


def check_form(bunch, shape, n_train, n_classes):
    n = len(bunch.target)
    assert bunch.data.shape == (n, *shape)
    assert bunch.data.dtype == np.uint8
    assert bunch.target.shape == (n,)
    assert bunch.target.dtype == np.int64
    np.testing.assert_array_equal(bunch.data_train, bunch.data[:n_train])
    np.testing.assert_array_equal(bunch.data_test, bunch.data[n_train:])
    np.testing.assert_array_equal(bunch.target_train, bunch.target[:n_train])
    np.testing.assert_array_equal(bunch.target_test, bunch.target[n_train:])
    assert bunch.data_train.base is bunch.data
    assert bunch.target_names.shape == (n_classes,)
    assert bunch.target_names.dtype.kind == "U"
    assert bunch.DESCR


@pytest.mark.parametrize("place", [write_cifar, archive_cifar])
def test_cifar100_is_read_from_its_folder_or_its_archive(tmp_path, place):
    place(tmp_path, cifar_files())
    bunch = fetch_cifar100(tmp_path)
    check_form(bunch, (3, 32, 32), 3, 100)
    np.testing.assert_array_equal(bunch.target, [0, 99, 7, 3, 4])
    np.testing.assert_array_equal(bunch.data_train.reshape(3, -1), images(3, 3072, 0))
    np.testing.assert_array_equal(bunch.data_test.reshape(2, -1), images(2, 3072, 1))
    assert bunch.target_names[99] == "fine 99"


def test_a_split_is_returned_in_the_order_of_train_test_split(tmp_path):
    write_cifar(tmp_path, cifar_files())
    bunch = fetch_cifar100(str(tmp_path))
    split = fetch_cifar100(tmp_path, return_split=True)
    wanted = bunch.data_train, bunch.data_test, bunch.target_train, bunch.target_test
    for part, whole in zip(split, wanted, strict=True):
        np.testing.assert_array_equal(part, whole)


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_missing_cifar_file_is_named_with_its_source_and_place(tmp_path, name):
    write_cifar(tmp_path, {key: value for key, value in cifar_files().items() if key != name})
    with pytest.raises(FileNotFoundError) as caught:
        fetch_cifar100(tmp_path)
    for part in (f"cifar-100-python/{name} is missing", "CIFAR-100 python version", f"into {tmp_path}"):
        assert part in str(caught.value)


@pytest.mark.parametrize("place", [write_cifar, archive_cifar])
def test_a_truncated_cifar_file_is_refused_by_name(tmp_path, place):
    files = cifar_files()
    place(tmp_path, files | {"test": files["test"][:-40]})
    with pytest.raises(ValueError, match=r"cifar-100-python/test is truncated or foreign"):
        fetch_cifar100(tmp_path)


def test_a_truncated_archive_or_one_without_a_file_is_refused_by_name(tmp_path):
    files = cifar_files()
    archive_cifar(tmp_path, files)
    archive = tmp_path / "cifar-100-python.tar.gz"
    content = archive.read_bytes()
    for broken in (content[: len(content) // 2], b"nothing of the kind"):
        archive.write_bytes(broken)
        with pytest.raises(ValueError, match=r"tar\.gz is truncated or foreign"):
            fetch_cifar100(tmp_path)
    archive_cifar(tmp_path, {"meta": files["meta"], "train": files["train"]})
    with pytest.raises(ValueError, match=r"tar\.gz is truncated or foreign, reading cifar-100-python/test"):
        fetch_cifar100(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"data": images(3, 3071)}, "test is foreign: expected uint8 images of 3072 values"),
        ({b"data": np.zeros((3, 3072))}, "test is foreign: expected uint8 images"),
        ({b"fine_labels": [1, 2]}, "test is foreign: expected 3 integer labels"),
        ({b"fine_labels": [1, 2, 100]}, "test is foreign: expected labels 0 to 99, got 1 to 100"),
        ({b"fine_labels": [b"x", b"y", b"z"]}, "test is foreign: expected 3 integer labels"),
    ],
)
def test_content_of_another_data_set_is_refused_by_name(tmp_path, change, message):
    part = {b"data": images(3, 3072), b"fine_labels": [1, 2, 3]} | change
    write_cifar(tmp_path, cifar_files() | {"test": python2_pickle(part)})
    with pytest.raises(ValueError, match=message):
        fetch_cifar100(tmp_path)


def test_cifar10_is_refused_as_cifar100(tmp_path):
    files = cifar_files()
    write_cifar(tmp_path, files | {"meta": python2_pickle({b"label_names": [b"airplane"]})})
    with pytest.raises(ValueError, match="meta is foreign: expected fine_label_names"):
        fetch_cifar100(tmp_path)
    ten = python2_pickle({b"data": images(2, 3072), b"labels": [1, 2]})
    (tmp_path / "cifar-100-python" / "meta").write_bytes(files["meta"])
    (tmp_path / "cifar-100-python" / "train").write_bytes(ten)
    with pytest.raises(ValueError, match="train is foreign: expected 2 integer labels"):
        fetch_cifar100(tmp_path)


def test_the_pickle_that_these_tests_write_is_what_python_2_wrote():
    content = python2_pickle({b"data": images(2, 3), b"labels": [1]})
    assert {op.proto for op, *_ in pickletools.genops(content)} <= {0, 1, 2}
    back = pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(back[b"data"], images(2, 3))
    assert back[b"labels"] == [1]


@pytest.mark.parametrize("dtype", ["u1", "<i4", ">f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_number_type_and_order_are_read_from_any_protocol(tmp_path, dtype, order):
    array = np.asarray(np.arange(6).reshape(2, 3).astype(dtype), order=order)
    texts = [python2_pickle({b"a": array})] if dtype != "?" else []
    texts += [pickle.dumps({"a": array, "n": np.float32(0.5), "b": b"\xff"}, protocol) for protocol in (2, 4)]
    for text in texts:
        back = read(text, tmp_path)
        np.testing.assert_array_equal(back["a"], array)
        assert back["a"].dtype == array.dtype
    assert back["n"] == np.float32(0.5)
    assert back["b"] == b"\xff"


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


RAN = []


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [RAN.append, eval, exec, print, getattr, np.load, np.frombuffer, bytes])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, protocol, function):
    argument = "__import__('os').environ.update(HQSEARCH_RAN='yes')"
    text = pickle.dumps({"data": Malicious(function, argument)}, protocol)
    with pytest.raises(ValueError, match=r"some_file is truncated or foreign: it asks for .*, which is no"):
        read(text, tmp_path)
    assert RAN == []


@pytest.mark.parametrize(
    "text",
    [
        # Sets attributes of what a pickle may call, and would change it for all pickles to come.
        *(
            b"\x80\x02c" + name + b"\n" + state + b"b0}."
            for name in (b"numpy\nndarray", b"numpy.core.multiarray\n_reconstruct", b"_codecs\nencode")
            for state in (b"N}X\x01\x00\x00\x00aK\x01s\x86", b"}X\x01\x00\x00\x00aK\x01s")
        ),
        # Asks for a class of a module that is allowed, and for a part of an allowed name.
        b"\x80\x02cnumpy\nmemmap\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93.",
        # An array of objects, a dtype of fields, an array larger than its bytes.
        pickle.dumps({"a": np.array([{}, 1], dtype=object)}, 2),
        pickle.dumps({"a": np.zeros(2, dtype=[("x", "u1")])}, 2),
        pickle.dumps({"a": np.zeros(2, dtype="S3")}, 2),
        pickle.dumps({"a": np.zeros(16, dtype="u1")}, 2).replace(b"K\x10\x85", b"K\x7f\x85"),
        pickle.dumps({"a": np.zeros(3)}, 5),
        b"",
        b"\x80\x02",
        b"\x93NUMPY",
        b"PK\x03\x04",
    ],
)
def test_other_pickles_and_other_bytes_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="some_file is truncated or foreign"):
        read(text, tmp_path)
    good = read(pickle.dumps({"a": np.arange(3)}, 2), tmp_path)
    np.testing.assert_array_equal(good["a"], np.arange(3))


def test_a_pickle_of_something_else_than_a_dict_is_refused(tmp_path):
    with pytest.raises(ValueError, match="some_file is truncated or foreign: expected a dict, got list"):
        read(pickle.dumps([1, 2], 2), tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_imagenet32_joins_its_batches_and_counts_labels_from_zero(tmp_path, protocol):
    write_imagenet(tmp_path, protocol)
    bunch = fetch_imagenet32(tmp_path)
    check_form(bunch, (3, 32, 32), 20, 1000)
    np.testing.assert_array_equal(bunch.target_train[:4], [0, 999, 1, 998])
    np.testing.assert_array_equal(bunch.target_test, [0, 999, 499])
    np.testing.assert_array_equal(bunch.data[18:20].reshape(2, -1), images(2, 3072, 10))
    assert bunch.target_names[0] == "1"


@pytest.mark.parametrize("name", ["train_data_batch_10", "val_data"])
def test_a_missing_or_broken_imagenet_file_is_named(tmp_path, name):
    write_imagenet(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"{name} is truncated or foreign"):
        fetch_imagenet32(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps({"data": images(1, 3072), "labels": [0]}, 2))
    with pytest.raises(ValueError, match=f"{name} is foreign: expected labels 1 to 1000, got 0 to 0"):
        fetch_imagenet32(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing.*Downsampled ImageNet.*into {tmp_path}"):
        fetch_imagenet32(tmp_path)


@pytest.mark.parametrize("fetch", [fetch_cifar100, fetch_imagenet32])
def test_without_a_folder_it_is_the_one_of_scikit_learn(fetch, tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match=f"is missing.*into {tmp_path / 'data'}"):
        fetch()


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_read_packed_or_not(tmp_path, packed):
    for name, content in fashion_files().items():
        if packed:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / name).write_bytes(content)
    bunch = load_fashion_mnist(tmp_path)
    check_form(bunch, (1, 28, 28), 4, 10)
    np.testing.assert_array_equal(bunch.target, [0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(bunch.data_train.reshape(4, -1), images(4, 784, 4))
    assert bunch.target_names[9] == "Ankle boot"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", lambda c: c[:-1], "truncated or foreign: expected 3136 values"),
        ("train-images-idx3-ubyte", lambda c: c + b"0", "truncated or foreign: expected 3136 values"),
        ("t10k-images-idx3-ubyte", lambda c: c[:9], "foreign: expected an idx file"),
        ("t10k-labels-idx1-ubyte", lambda c: b"\x00\x00\x0d" + c[3:], "foreign: expected an idx file"),
        ("t10k-labels-idx1-ubyte", lambda c: idx(np.array([1, 10], np.uint8)), "expected labels 0 to 9"),
        ("t10k-labels-idx1-ubyte", lambda c: idx(np.array([1], np.uint8)), "expected 2 integer labels"),
        ("t10k-images-idx3-ubyte", lambda c: idx(images(2, 1024).reshape(2, 32, 32)), "images of 784 values"),
    ],
)
def test_a_truncated_or_foreign_idx_file_is_named(tmp_path, name, content, message):
    for other, right in fashion_files().items():
        (tmp_path / other).write_bytes(content(right) if other == name else right)
    with pytest.raises(ValueError, match=rf"{name[:4]}.*ubyte is .*{message}"):
        load_fashion_mnist(tmp_path)


def test_a_truncated_or_missing_gzip_file_is_named(tmp_path):
    for name, content in fashion_files().items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    for broken in (labels.read_bytes()[:-9], b"plain", b"\x1f\x8b\x08\x00" + b"\xff" * 30):
        labels.write_bytes(broken)
        with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz is truncated or foreign"):
            load_fashion_mnist(tmp_path)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte\.gz is missing.*dataset-fashion"):
        load_fashion_mnist(tmp_path)


@pytest.mark.skipif(
    not DEBIAN_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_debians_fashion_mnist_has_the_official_split():
    bunch = load_fashion_mnist()
    check_form(bunch, (1, 28, 28), 60000, 10)
    np.testing.assert_array_equal(np.bincount(bunch.target_test), [1000] * 10)
    assert bunch.target_train[0] == 9


def test_glyph100_is_split_by_its_flag_and_keeps_its_order(tmp_path):
    arrays = glyph_arrays()
    np.savez_compressed(tmp_path / "glyphs.npz", **arrays)
    bunch = load_glyph100(tmp_path / "glyphs.npz")
    check_form(bunch, (1, 32, 32), 3, 3)
    order = [1, 3, 5, 0, 2, 4]
    np.testing.assert_array_equal(bunch.data[:, 0], arrays["X"][order])
    np.testing.assert_array_equal(bunch.target, arrays["y"][order])
    np.testing.assert_array_equal(bunch.family, arrays["family"][order])
    assert list(bunch.target_names) == ["a", "b", "ß"]


@pytest.mark.parametrize(
    "change",
    [
        {"y": np.arange(6, dtype=np.int16)},
        {"X": images(6, 100)},
        {"is_test": np.zeros(6)},
        {"family": np.zeros(5, dtype=np.int16)},
        {"classes": np.arange(3)},
        {"classes": np.array([Malicious(RAN.append, 1), "b"], dtype=object)},
    ],
)
def test_a_foreign_npz_file_is_refused_and_runs_nothing(tmp_path, change):
    np.savez(tmp_path / "glyphs.npz", **(glyph_arrays() | change))
    with pytest.raises(ValueError, match=r"glyphs\.npz is (truncated or )?foreign"):
        load_glyph100(tmp_path / "glyphs.npz")
    assert RAN == []


def test_a_truncated_npz_file_and_one_that_is_none_are_refused_by_name(tmp_path):
    path = tmp_path / "glyphs.npz"
    arrays = glyph_arrays()
    np.savez(path, **{name: arrays[name] for name in ("X", "y")})
    contents = [path.read_bytes(), path.read_bytes()[:-30], b"text", b"", pickle.dumps(1)]
    array = io.BytesIO()
    np.save(array, np.arange(3))
    for content in (*contents, array.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"glyphs\.npz is truncated or foreign"):
            load_glyph100(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"glyphs.npz is missing.*glyph100.*into {tmp_path}"):
        load_glyph100(path)


def test_digits_come_in_the_same_form_with_every_class_in_both_parts():
    bunch = load_digits()
    check_form(bunch, (1, 8, 8), 1297, 10)
    assert bunch.data.max() == 16
    assert np.bincount(bunch.target_test).min() >= 40
    assert load_digits(return_split=True)[1].shape == (500, 1, 8, 8)
