"""Rows of a weight in FP8, read on their own, are those of the whole weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8pipe.models.checkpoint.quantized.entries import DequantizedEntry
from fp8pipe.models.checkpoint.rows import read_rows
from fp8pipe.models.checkpoint.tensors import header_entries

# Sides that are no multiples of a block, so that the last ones are partial.
SCALES = {"tensor": ((), None), "row": ((37, 1), None), "block": ((5, 3), (8, 8)), "modelopt": ((5, 1, 3, 1), (8, 8))}


@pytest.mark.parametrize("kind", SCALES)
def test_rows_are_those_of_the_whole_weight(kind: str, tmp_path: Path) -> None:
    shape, block = SCALES[kind]
    generator = torch.Generator().manual_seed(5)
    codes = torch.randn(37, 21, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=generator) + 0.5
    save_file({"other": torch.ones(7), "w": codes, "w_scale": scale}, tmp_path / "model.safetensors")
    found = header_entries(tmp_path / "model.safetensors")
    entry = DequantizedEntry("w", "BF16", (37, 21), found["w"].file, found["w"].start, found["w_scale"], block)
    whole = entry.read()
    for rows in (range(37), range(1), range(5, 13), range(8, 16), range(31, 37), range(36, 37)):
        part = read_rows(entry, rows)
        assert torch.equal(part.view(torch.int16), whole[rows.start : rows.stop].view(torch.int16)), rows
