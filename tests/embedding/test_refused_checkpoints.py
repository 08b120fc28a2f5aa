"""Checkpoints that are none of this fit, damaged or foreign: refused by name before anything is trained."""

import numpy as np
import pytest
import safetensors.torch
import torch

from hqsearch import HierarchicalHashEncoder
from hqsearch.embedding import checkpoints
from hqsearch.embedding.stage import Stage


def make(**parameters):
    return HierarchicalHashEncoder(
        **{"metric_epochs": 1, "hash_epochs": 1, "branching_factor": 8, "random_state": 0} | parameters
    )


def test_drawn_seeds_of_a_random_state_tell_fits_apart(blobs, tmp_path):
    make(checkpoint_dir=tmp_path, random_state=np.random.RandomState(3)).fit(*blobs)
    make(checkpoint_dir=tmp_path, random_state=np.random.RandomState(3)).fit(*blobs)
    with pytest.raises(ValueError, match="random_state"):
        make(checkpoint_dir=tmp_path, random_state=np.random.RandomState(4)).fit(*blobs)


def test_without_a_seed_checkpoints_are_refused(blobs, tmp_path):
    with pytest.raises(ValueError, match="Expected random_state to be an int or a RandomState"):
        make(checkpoint_dir=tmp_path / "never", random_state=None).fit(*blobs)
    assert not (tmp_path / "never").exists()


def spoil_truncated(content):
    return content[:-1]


def spoil_cut_in_its_header(content):
    return content[:50]


def spoil_empty(content):
    return b""


def spoil_last_byte(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def spoil_recorded_loss(content):
    start = content.index(b"loss", content.index(b"history")) + 8
    digit = next(i for i in range(start, start + 20) if content[i : i + 1].isdigit())
    return content[:digit] + bytes([content[digit] ^ 1]) + content[digit + 1 :]


def spoil_foreign_weights(content):
    return safetensors.torch.save({"weight": torch.zeros(3)})


def spoil_newer(content):
    version = checkpoints.FORMAT_VERSION
    today, newer = (f'"format_version":"{number}"'.encode() for number in (version, version + 1))
    return content.replace(today, newer)


@pytest.mark.parametrize("stage", ["metric", "hash"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncated, "is truncated, damaged or foreign"),
        (spoil_cut_in_its_header, "is truncated, damaged or foreign"),
        (spoil_empty, "is truncated, damaged or foreign"),
        (spoil_last_byte, "is damaged: its checksum differs"),
        (spoil_recorded_loss, "is damaged: its checksum differs"),
        (spoil_foreign_weights, "is foreign: it is not a checkpoint"),
        (spoil_newer, f"has format version {checkpoints.FORMAT_VERSION + 1}, but"),
    ],
)
def test_a_spoiled_file_is_refused_by_name_before_anything_is_trained(
    blobs, tmp_path, monkeypatch, stage, spoil, message
):
    encoder = make(checkpoint_dir=tmp_path).fit(*blobs)
    path = tmp_path / f"{stage}.safetensors"
    spoiled = spoil(path.read_bytes())
    assert spoiled != path.read_bytes()
    path.write_bytes(spoiled)
    monkeypatch.setattr(Stage, "_run_epoch", None)
    with pytest.raises(ValueError, match=rf"{stage}\.safetensors {message}"):
        encoder.fit(*blobs)


def test_a_sound_state_that_does_not_fit_the_stage_is_refused_by_name(blobs, tmp_path, monkeypatch):
    state = Stage._finished_state

    def lacking(stage):
        full = state(stage)
        del full.tensors["network/head.bias"]
        return full

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_finished_state", lacking)
        make(checkpoint_dir=tmp_path).fit(*blobs)
    with pytest.raises(ValueError, match=r"metric\.safetensors is foreign: .*head\.bias"):
        make(checkpoint_dir=tmp_path).fit(*blobs)


def test_a_file_where_the_folder_should_be_is_refused(blobs, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="Expected checkpoint_dir to be a folder or not to exist"):
        make(checkpoint_dir=tmp_path / "file").fit(*blobs)
    with pytest.raises(ValueError, match="'checkpoint_dir' parameter"):
        make(checkpoint_dir=3).fit(*blobs)
