"""Artifacts on disks that are full or become so: refused with both numbers, or ended without loss."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_artifacts import write
from tiny_disk import tiny_disk_at

from fp8pipe.artifact import (
    ArtifactWriter,
    disk_guard,
    open_artifact,
    translate_disk_full,
)
from fp8pipe.core.errors import OutOfMemoryError
from fp8pipe.core.machine import free_bytes


def test_disk_guard_refuses_before_writing_with_both_numbers(tmp_path):
    free = free_bytes(tmp_path / "not" / "there" / "yet")
    assert free > 0
    with pytest.raises(OutOfMemoryError, match=rf"needed {10**18} bytes, \d+ bytes are free"):
        disk_guard(tmp_path / "x", 10**18)
    with disk_guard(tmp_path / "x", 1):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_becomes_exit_15(tmp_path):
    with (
        pytest.raises(OutOfMemoryError, match=r"needed 7 bytes, \d+ bytes are free"),
        translate_disk_full(tmp_path, 7),
        Path("/dev/full").open("w") as stream,
    ):
        print("x" * 7, file=stream, flush=True)


def test_other_errors_pass_untranslated(tmp_path):
    with pytest.raises(FileNotFoundError), translate_disk_full(tmp_path):
        (tmp_path / "none").read_bytes()


@pytest.fixture
def tiny_disk(tmp_path):
    with tiny_disk_at(tmp_path / "disk", "256k") as mount:
        yield mount


def test_a_full_disk_while_writing_leaves_the_old_artifact(tiny_disk):
    first = write(tiny_disk / "a")
    with (
        pytest.raises(OutOfMemoryError) as caught,
        ArtifactWriter(tiny_disk / "a", kind="falqon", stage="finetune", force=True) as writer,
    ):
        (writer.root / "w.bin").write_bytes(bytes(1_000_000))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert open_artifact(tiny_disk / "a").digest == first.digest


def test_a_full_disk_reported_by_safetensors_is_translated(tiny_disk):
    with (
        pytest.raises(OutOfMemoryError, match="is full"),
        ArtifactWriter(tiny_disk / "a", kind="falqon", stage="finetune") as writer,
    ):
        save_file({"w": torch.zeros(1_000_000)}, writer.root / "w.safetensors")
