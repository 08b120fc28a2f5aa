"""The UCI letters, on made-up rows in the exact bytes of both published files.

No file of R's is checked in: `rda_bytes` writes R's serialisation (version 2, big-endian) by hand, the
same bytes for the same rows as the file of Debian's r-cran-mlbench.
"""

import bz2
import gzip
import lzma
import re
import struct
import sys
from string import ascii_uppercase

import numpy as np
import pytest

from hqsearch.datasets import load_letters
from hqsearch.datasets.letters import DEBIAN_FILE

NAMES = (
    *("x.box", "y.box", "width", "high", "onpix", "x.bar", "y.bar", "x2bar"),
    *("y2bar", "xybar", "x2ybr", "xy2br", "x.ege", "xegvy", "y.ege", "yegvx"),
)


def uci_bytes(target, values):
    letters = np.array(list(ascii_uppercase))[target]
    rows = zip(letters.tolist(), values.tolist(), strict=True)
    return "".join(",".join([letter, *map(str, row)]) + "\n" for letter, row in rows).encode()


def rda_bytes(target, values, names=NAMES, variable="LetterRecognition"):
    def integers(*numbers):
        return struct.pack(f">{len(numbers)}i", *numbers)

    def text(string):
        return integers(9, len(string)) + string.encode()

    def strings(*items):
        return integers(16, len(items)) + b"".join(map(text, items))

    def named(name):
        # An entry of a pairlist, with its name as a symbol.
        return integers(0x402, 1) + text(name)

    end = integers(254)
    factor = integers(0x30D, len(target)) + (target + 1).astype(">i4").tobytes()
    factor += named("levels") + strings(*ascii_uppercase) + named("class") + strings("factor") + end
    columns = [integers(14, len(target)) + column.astype(">f8").tobytes() for column in values.T]
    frame = integers(0x313, 1 + len(columns)) + factor + b"".join(columns)
    frame += named("names") + strings("lettr", *names)
    # Row names 1 to n are kept as NA and -n; "class" is the third symbol, referred to by its number.
    frame += named("row.names") + integers(13, 2, -(2**31), -len(target))
    frame += integers(0x402, 3 << 8 | 255) + strings("data.frame") + end
    return b"RDX2\nX\n" + integers(2, 0x20A01, 0x20300) + named(variable) + frame + end


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return rng.integers(0, 26, 20000), rng.integers(0, 16, (20000, 16))


@pytest.fixture(scope="module")
def published(rows):
    return {
        "letter-recognition.data": uci_bytes(*rows),
        "LetterRecognition.rda": lzma.compress(rda_bytes(*rows), preset=0),
    }


def assert_holds(bunch, rows):
    target, values = rows
    assert (bunch.data.dtype, bunch.target.dtype) == (np.uint8, np.int64)
    np.testing.assert_array_equal(bunch.data, values)
    np.testing.assert_array_equal(bunch.target, target)
    assert (bunch.data_train.shape, bunch.data_test.shape) == ((16000, 16), (4000, 16))
    np.testing.assert_array_equal(np.concatenate([bunch.data_train, bunch.data_test]), values)
    np.testing.assert_array_equal(np.concatenate([bunch.target_train, bunch.target_test]), target)
    assert all(np.shares_memory(part, bunch.data) for part in (bunch.data_train, bunch.data_test))
    assert "".join(bunch.target_names) == ascii_uppercase
    assert "Frey" in bunch.DESCR


@pytest.mark.parametrize("name", ["letter-recognition.data", "LetterRecognition.rda"])
def test_either_file_is_read_by_its_own_path_or_from_its_folder(published, rows, tmp_path, name):
    (tmp_path / name).write_bytes(published[name])
    for path in (tmp_path / name, str(tmp_path)):
        assert_holds(load_letters(path), rows)
    X_train, X_test, y_train, y_test = load_letters(tmp_path, return_split=True)
    np.testing.assert_array_equal(np.concatenate([X_train, X_test]), rows[1])
    np.testing.assert_array_equal(np.concatenate([y_train, y_test]), rows[0])


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
def test_an_rda_file_is_read_however_r_compressed_it(rows, tmp_path, compress):
    (tmp_path / "LetterRecognition.rda").write_bytes(compress(rda_bytes(*rows)))
    assert_holds(load_letters(tmp_path), rows)


def test_lines_may_end_as_on_windows_and_the_last_one_without_an_end(published, rows, tmp_path):
    content = published["letter-recognition.data"].replace(b"\n", b"\r\n").removesuffix(b"\r\n")
    (tmp_path / "letter-recognition.data").write_bytes(content)
    assert_holds(load_letters(tmp_path), rows)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: b"", "truncated or foreign"),
        (lambda c: c[: len(c) // 2], "truncated or foreign"),
        (lambda c: c[:-4], "truncated or foreign"),
        (lambda c: c[: c.rindex(b"\n", 0, -1) + 1], r"expected 20000 rows .* \(19999, 16\)"),
        (lambda c: c + c, r"expected 20000 rows of 16 features, .* \(40000, 16\)"),
        (lambda c: c.replace(b"\n", b",1\n"), r"expected 20000 rows of 16 features, .* \(20000, 17\)"),
        (lambda c: b"a" + c[1:], "foreign: expected A to Z, got a"),
        (lambda c: b"A" + c, "foreign: expected A to Z, got A"),
        (lambda c: re.sub(rb",\d+", b",16", c, count=1), "foreign: expected 0 to 15, got 16"),
        (lambda c: re.sub(rb",\d+", b",-1", c, count=1), "foreign: expected 0 to 15, got -1"),
        (lambda c: re.sub(rb",\d+", b",1.5", c, count=1), "truncated or foreign"),
        (lambda c: b"\xff" + c, "truncated or foreign"),
        (lzma.compress, "truncated or foreign"),
    ],
)
def test_a_spoiled_text_file_is_named(published, tmp_path, spoil, message):
    path = tmp_path / "letter-recognition.data"
    path.write_bytes(spoil(published[path.name]))
    with pytest.raises(ValueError, match=rf"letter-recognition\.data is .*{message}"):
        load_letters(path)


def test_a_spoiled_rda_file_is_named(published, rows, tmp_path):
    target, values = rows
    path = tmp_path / "LetterRecognition.rda"
    content, plain = published[path.name], rda_bytes(target, values)
    missing = values.astype(np.float64)
    missing[7, 3] = np.nan
    for spoiled in (
        b"",
        b"text",
        content[:-1],
        content[:3000],
        content[:3000] + bytes(4) + content[3004:],
        plain[:-5],
        plain[:90_000],
        b"RDX2\nA\n" + plain[7:],
        rda_bytes(target, values, variable="Glass"),
        rda_bytes(target[:9], values[:9]),
        rda_bytes(target, values[:, 1:], NAMES[1:]),
        rda_bytes(target, values + 1),
        rda_bytes(target, values + 0.5),
        rda_bytes(target, missing),
        rda_bytes(target + 1, values),
    ):
        path.write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"LetterRecognition\.rda is (truncated or )?foreign"):
            load_letters(path)


def test_a_missing_file_is_named_with_its_source_and_its_place(tmp_path):
    for path, name in (
        (tmp_path, "letter-recognition.data"),
        (tmp_path / "letter-recognition.data", "letter-recognition.data"),
        (tmp_path / "LetterRecognition.rda", "LetterRecognition.rda"),
    ):
        message = rf"{tmp_path}/{name} is missing.*r-cran-mlbench.*put it into {tmp_path}, or name"
        with pytest.raises(FileNotFoundError, match=message):
            load_letters(path)


def test_without_rdata_the_extra_is_named_and_the_text_file_still_read(
    published, rows, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "rdata", None)
    for name, content in published.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ImportError, match=r"LetterRecognition\.rda needs rdata: install hqsearch\[letters\]"):
        load_letters(tmp_path / "LetterRecognition.rda")
    assert_holds(load_letters(tmp_path), rows)


@pytest.mark.skipif(not DEBIAN_FILE.is_file(), reason="Debian's package r-cran-mlbench is not installed")
def test_debians_letters_are_uci_rows_in_ucis_order():
    bunch = load_letters()
    assert bunch.data.shape == (20000, 16)
    assert np.bincount(bunch.target)[:3].tolist() == [789, 766, 736]
    assert bunch.target_names[bunch.target[0]] == "T"
    assert bunch.data[0].tolist() == [2, 8, 3, 5, 1, 8, 13, 0, 6, 6, 10, 8, 0, 8, 0, 8]
    assert bunch.target_names[bunch.target[-1]] == "A"
    assert bunch.data[-1].tolist() == [4, 9, 6, 6, 2, 9, 5, 3, 1, 8, 1, 8, 2, 7, 2, 8]
