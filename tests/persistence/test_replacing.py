import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import plain_encoder
import pytest
from plain_encoder import PlainEncoder
from saved_estimators import assert_same_index, files_of

from hqsearch import HierarchicalHashIndex

PLAIN_ENCODER = Path(plain_encoder.__file__).read_text()


def test_saving_again_leaves_only_the_new_files(plain, items, tmp_path):
    plain.save(tmp_path)
    before = files_of(tmp_path)
    other = HierarchicalHashIndex(PlainEncoder()).fit(items[:50])
    mapped = HierarchicalHashIndex.load(tmp_path, "r", encoder=PlainEncoder)
    other.save(tmp_path)
    assert not set(before[:-1]) & set(files_of(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    assert_same_index(HierarchicalHashIndex.load(tmp_path, encoder=PlainEncoder), other, items[:9])
    # Whoever mapped the old files keeps them.
    assert_same_index(mapped, plain, items[:9])


def test_a_disk_that_refuses_leaves_the_old_index_and_no_litter(plain, items, tmp_path, monkeypatch):
    plain.save(tmp_path / "saved")
    other = HierarchicalHashIndex(PlainEncoder()).fit(items[:50])
    flush = os.fsync
    for allowed in (0, 3, 9):
        left = iter(range(allowed))

        def full(descriptor, left=left):
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            flush(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            for name in ("saved", "new"):
                with pytest.raises(OSError, match="No space left"):
                    other.save(tmp_path / name)
        assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]
        assert len(list((tmp_path / "saved").iterdir())) == 2
    assert_same_index(HierarchicalHashIndex.load(tmp_path / "saved", encoder=PlainEncoder), plain, items[:9])


def test_readers_and_writers_at_once_see_whole_indexes(items, tmp_path):
    versions = [
        HierarchicalHashIndex(PlainEncoder()).fit(items[: 50 + i], np.full(50 + i, i)) for i in range(3)
    ]
    versions[0].save(tmp_path)
    stop = threading.Event()

    def write():
        # Each writes all versions in turn: nothing says that a lock is given out fairly.
        while not stop.is_set():
            for index in versions:
                index.save(tmp_path)

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write) for _ in range(2)]
        try:
            n_read, seen = 0, set()
            while n_read < 60 or len(seen) < 3:
                loaded = HierarchicalHashIndex.load(tmp_path, encoder=PlainEncoder)
                version = int(loaded.labels_[0])
                assert (loaded.labels_ == version).all()
                assert loaded.n_samples_fit_ == len(loaded.labels_) == loaded.n_positions_ == 50 + version
                seen.add(version)
                n_read += 1
                assert n_read < 5000
        finally:
            stop.set()
        for writer in writers:
            writer.result()
    assert len(list(tmp_path.iterdir())) == 2


KILLER = (
    PLAIN_ENCODER
    + """
import os, random, shutil, signal, sys, time
from hqsearch import HierarchicalHashIndex

path, unborn = Path(sys.argv[1]) / "saved", Path(sys.argv[1]) / "unborn"
items = np.random.default_rng(0).normal(size=(600, 12))
versions = [HierarchicalHashIndex(PlainEncoder()).fit(items[:n], np.full(n, n)) for n in (500, 600)]
answers = {len(v.labels_): v.kneighbors(items[:50])[1] for v in versions}
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

def check(place):
    loaded = HierarchicalHashIndex.load(place, encoder=PlainEncoder)
    n = int(loaded.labels_[0])
    assert (loaded.labels_ == n).all() and len(loaded.labels_) == n
    assert (loaded.kneighbors(items[:50])[1] == answers[n]).all()
    return n

def in_child(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child

def die_at(event_number, index, place):
    left = [event_number]
    def hook(event, arguments):
        if event in EVENTS:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    index.save(place)

def save_for_ever():
    while True:
        for version in versions:
            version.save(path)

versions[0].save(path)
check(path)
seen, litter, unborn_seen, here = [], 0, 0, 500
for number in range(1000):
    # The index that is not there yet, so that a change can be seen.
    new = versions[here == 500]
    child = in_child(lambda: die_at(number, new, path))
    finished = os.waitpid(child, 0)[1] == 0
    here = check(path)
    seen.append(here == len(new.labels_))
    litter += len(list(path.iterdir())) > 2
    if number % 3 and not finished:
        continue
    child = in_child(lambda: die_at(number, new, unborn))
    os.waitpid(child, 0)
    if (unborn / "manifest.json").exists():
        check(unborn)
        unborn_seen += 1
        shutil.rmtree(unborn)
    elif not finished:
        # Killed in the first save: nothing to load, and the next save goes through.
        try:
            check(unborn)
        except ValueError as error:
            assert "manifest.json" in str(error)
        else:
            raise AssertionError("nothing was saved, and it was loaded")
    if finished:
        break
assert finished
rng = random.Random(0)
hit = 0
for _ in range(40):
    child = in_child(save_for_ever)
    time.sleep(rng.uniform(0.002, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    check(path)
    hit += len(list(path.iterdir())) > 2
versions[0].save(path)
assert check(path) == 500 and len(list(path.iterdir())) == 2
print(number, sum(seen), litter, unborn_seen, hit)
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed writer is a forked process")
def test_a_writer_that_is_killed_at_any_moment_leaves_the_old_or_the_new_index(tmp_path):
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    n_places, n_new, n_litter, n_unborn, n_hit = map(int, done.stdout.split())
    # The kills did come in the middle: before and after the change, with files half written.
    assert n_places > 20
    assert 1 < n_new < n_places
    assert n_litter > 10
    assert n_unborn > 1
    assert n_hit > 3


PAGES = (
    PLAIN_ENCODER
    + """
import sys
from hqsearch import HierarchicalHashIndex
index = HierarchicalHashIndex.load(sys.argv[1], "r", encoder=PlainEncoder)
index.kneighbors(np.zeros((1, 64)), n_probes=10**6)
print("searched", flush=True)
sys.stdin.readline()
figures, name = {}, None
for line in open("/proc/self/smaps"):
    field, _, value = line.partition(":")
    if "-" in line.split()[0]:
        name = Path(line.split()[-1]).name
    elif name == "table.segment0.packed.npy" and value.endswith("kB\\n"):
        figures[field] = figures.get(field, 0) + int(value.split()[0])
print(json.dumps(figures))
"""
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_processes_that_map_an_index_share_its_pages(tmp_path):
    X = np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32)
    HierarchicalHashIndex(PlainEncoder()).fit(X).save(tmp_path / "saved")
    script = tmp_path / "pages.py"
    script.write_text(PAGES)
    readers = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "saved")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [reader.stdout.readline() for reader in readers] == ["searched\n"] * 2
    # Both have searched and both still live, so what they hold they hold at once.
    outputs = []
    for reader in readers:
        reader.stdin.write("\n")
        reader.stdin.flush()
        outputs.append(json.loads(reader.stdout.readline()))
    for reader in readers:
        reader.communicate()
    for figures in outputs:
        assert figures["Rss"] > 0.9 * X.nbytes / 1024
        assert figures["Private_Dirty"] == 0
    assert outputs[0]["Shared_Clean"] == outputs[0]["Rss"]


def test_loading_imports_torch_only_for_encoders_that_need_it(plain, tmp_path):
    plain.save(tmp_path / "saved")
    code = PLAIN_ENCODER + (
        "import sys, hqsearch, hqsearch.persistence\n"
        f"hqsearch.HierarchicalHashIndex.load({str(tmp_path / 'saved')!r}, encoder=PlainEncoder)\n"
        "print([m for m in ('torch', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
