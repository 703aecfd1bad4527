"""Blocks of rows: all of a tensor, each value once, whatever its shape; and work on them by several threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint import rows
from fp8pipe.models.checkpoint.rows import each, read_rows, row_blocks, same_values
from fp8pipe.models.checkpoint.tensors import header_entries
from fp8pipe.numerics.grids import same_bits

TENSORS = {
    "matrix": torch.randn(37, 11).to(torch.bfloat16),
    "codes": torch.randn(9, 16).to(torch.float8_e4m3fn),
    "cube": torch.arange(2 * 3 * 5).reshape(2, 3, 5),
    "vector": torch.randn(501),
    "scalar": torch.tensor(2.5),
    "mask": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("values", [1, 40, 1 << 18])
def test_blocks_hold_all_of_a_tensor(values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_VALUES", values)
    save_file(TENSORS, tmp_path / "model.safetensors")
    for name, entry in header_entries(tmp_path / "model.safetensors").items():
        blocks = row_blocks(entry)
        parts = [read_rows(entry, block) for block in blocks]
        assert all(len(block) == 1 or part.numel() <= values for block, part in zip(blocks, parts, strict=True))
        whole = torch.cat(parts) if entry.shape else parts[0]
        assert same_bits(whole, TENSORS[name]), name


def test_tensors_are_compared_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_BLOCK_VALUES", 22)
    other = TENSORS["matrix"].clone()
    other[-1, -1] = -other[-1, -1]
    pairs = {
        "one": TENSORS["matrix"],
        "same": TENSORS["matrix"].clone(),
        "other": other,
        "transposed": other.t().contiguous(),
        "wider": TENSORS["matrix"].double(),
        "wider, other": TENSORS["matrix"].double() + 1e-9,
    }
    save_file(pairs, tmp_path / "model.safetensors")
    found = header_entries(tmp_path / "model.safetensors")
    same = {name: same_values(found["one"], entry) for name, entry in found.items()}
    assert {name for name, answer in same.items() if answer} == {"one", "same", "wider"}


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(8)}, file)
    entry = header_entries(file)["a"]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ConfigurationError, match="cut short while it was read") as caught:
        read_rows(entry, range(8))
    assert "32 bytes of a were asked for, 28 were there" in caught.value.why


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_threads_are_put_back(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    inside = set()

    def work(item: int) -> int:
        inside.add(torch.get_num_threads())
        if item == 70:
            raise ValueError("an item that cannot be worked on")
        return item * item

    try:
        assert list(each(work, range(60))) == [item * item for item in range(60)]
        with pytest.raises(ValueError, match="cannot be worked on"):
            list(each(work, range(60, 80)))
        assert torch.get_num_threads() == threads
        assert inside == {1}  # an operation is not divided among further threads
    finally:
        torch.set_num_threads(before)
