"""Sums in a file: the sums of memory, bit for bit, on any layout; and a full disk is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8pipe.core.errors import OutOfMemoryError
from pipeline.falqon.sums import Sums


def test_sums_are_those_of_memory_bit_for_bit():
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(37, 5, generator=random).bfloat16() for _ in range(6)]
    parts[2], parts[5] = parts[2].t().contiguous().t(), parts[5].double()  # as it lies in memory is its own affair
    with Sums(torch.device("cpu")) as sums:
        for index, part in enumerate(parts):
            sums.add(f"layer {index % 2}", part)
        for index in range(2):
            expected = parts[index].float() + parts[index + 2].float() + parts[index + 4].float()
            assert torch.equal(sums.at(f"layer {index}"), expected)
        assert "layer 0" in sums
        assert "layer 2" not in sums


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_with_what_to_do(monkeypatch):
    full = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115 - closed with the sums
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: full)
    with (
        Sums(torch.device("cpu")) as sums,
        pytest.raises(OutOfMemoryError, match=r"(?s)is full.*No space left.*TMPDIR"),
    ):
        sums.add("layer", torch.ones(3))
