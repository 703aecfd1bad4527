"""What is exported does not depend on how it was taken apart: in small blocks by threads, or whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.vllm.export import export_vllm, plan_export
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.reopen import reopen
from fp8pipe.artifact.finding import LintFindingsError
from fp8pipe.models.checkpoint import rows
from fp8pipe.models.checkpoint.tensors import weight_entries


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes blocks of some rows, for two threads."""
    before = torch.get_num_threads()

    def make() -> None:
        monkeypatch.setattr(rows, "_BLOCK_VALUES", 200)  # three rows of 64
        torch.set_num_threads(2)

    yield make
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("family", "made", "form"),
    [
        ("llama", "plain", "fp8"),
        ("llama", "plain", "bf16"),
        ("llama", "per-channel", "fp8"),
        ("llama", "per-tensor", "bf16"),
        ("gpt2", "per-channel", "fp8"),
        ("gpt2", "plain", "fp8"),
    ],
)
def test_blocks_change_no_byte(
    family: str,
    made: str,
    form: str,
    falqon: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    small_blocks: Callable[[], None],
) -> None:
    base = request.getfixturevalue(family)
    source = base if made == "plain" else falqon(base, granularity=made)
    options = VllmExportOptions(format=form, max_shard_bytes=40_000)  # type: ignore[arg-type]
    whole = export_vllm(source, tmp_path / "whole", options)
    small_blocks()
    parts = export_vllm(source, tmp_path / "parts", options)
    assert parts.content == whole.content
    assert [(file.path, file.sha256) for file in parts.manifest.files if not file.volatile] == [
        (file.path, file.sha256) for file in whole.manifest.files if not file.volatile
    ]
    found, expected = ({gate.name: gate.value for gate in one.manifest.gates} for one in (parts, whole))
    assert found == pytest.approx(expected, rel=1e-12)  # sums of squares in float64, added in another order


def test_a_bad_value_in_the_last_block_is_found(
    make_model: Callable[..., Path], tmp_path: Path, small_blocks: Callable[[], None]
) -> None:
    source = make_model("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    small_blocks()
    with pytest.raises(LintFindingsError) as caught:
        export_vllm(source, tmp_path / "export", VllmExportOptions())
    assert [(f.rule, f.where) for f in caught.value.findings] == [("not-finite", "model.layers.1.mlp.down_proj.weight")]
    assert "1 NaN or infinite" in caught.value.findings[0].why
    assert not list(tmp_path.glob("export*"))


def test_a_bit_that_differs_in_the_last_block_is_found(
    llama: Path, tmp_path: Path, small_blocks: Callable[[], None]
) -> None:
    export = export_vllm(llama, tmp_path / "export", VllmExportOptions())
    entries = weight_entries(export.root)
    damaged = ["model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"]
    content = bytearray(entries[damaged[0]].file.read_bytes())
    for entry in map(entries.get, damaged):
        assert entry is not None
        content[entry.start + entry.size_bytes - 1] ^= 1
    entries[damaged[0]].file.write_bytes(content)
    small_blocks()
    gates = {gate.name: gate for gate in reopen(plan_export(llama, VllmExportOptions(), verify=False), export.root)}
    found = [gates[name] for name in ("weights-bit-exact", "copied-tensors-identical")]
    assert [(gate.value, gate.detail.rpartition(": ")[2]) for gate in found] == [(1, damaged[0]), (1, damaged[1])]
