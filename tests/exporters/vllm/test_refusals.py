"""What an export for vLLM refuses, and what it leaves untouched when it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exporters.vllm.export import export_vllm, plan_export
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.reopen import reopen
from fp8pipe.artifact import open_artifact
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError, OutOfMemoryError
from fp8pipe.models.checkpoint.tensors import shard_names


def options(export_format: str, **changes: object) -> VllmExportOptions:
    return VllmExportOptions(format=export_format, **changes)  # type: ignore[arg-type]


def test_planning_reads_headers_only(llama: Path, falqon: Callable[..., Path]) -> None:
    plan = plan_export(falqon(llama), options("fp8"))
    assert plan.payload_bytes == sum(unit.size_bytes for unit in plan.units)
    assert shard_names(len(plan.shards)) == ("model.safetensors",)
    assert sum(layer.converted for layer in plan.layers) == 14


def test_existing_output_and_force(llama: Path, falqon: Callable[..., Path], tmp_path: Path) -> None:
    source = falqon(llama)
    first = export_vllm(source, tmp_path / "export", options("fp8"))
    with pytest.raises(ConfigurationError, match="exists"):
        export_vllm(source, tmp_path / "export", options("bf16"))
    assert open_artifact(first.root).digest == first.digest
    replaced = export_vllm(source, tmp_path / "export", options("bf16", force=True))
    assert open_artifact(replaced.root).manifest.details.format == "bf16"
    with pytest.raises(ConfigurationError, match="source itself"):
        export_vllm(source, source, options("fp8", force=True))


def test_an_existing_output_is_refused_before_the_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(ConfigurationError, match="exists already"):
        export_vllm(tmp_path / "absent", tmp_path / "export", options("fp8"))


def test_unusable_sources(llama: Path, falqon: Callable[..., Path], tmp_path: Path) -> None:
    source = falqon(llama)
    export = export_vllm(source, tmp_path / "export", options("fp8"))
    with pytest.raises(BadArtifactError):
        export_vllm(export.root, tmp_path / "again", options("fp8"))
    (export.root / "manifest.json").unlink()  # a checkpoint like any other
    written = (export.root / "config.json").read_text(encoding="utf-8")
    (export.root / "config.json").write_text(written.replace("compressed-tensors", "gptq"), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="quantized already"):
        export_vllm(export.root, tmp_path / "again", options("fp8"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigurationError, match="neither an artifact nor"):
        export_vllm(empty, tmp_path / "again", options("fp8"))
    with pytest.raises(ConfigurationError, match=r"0\.32\.0"):
        export_vllm(source, tmp_path / "again", options("fp8", vllm_version="0.1.0"))
    weights = source / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(BadArtifactError, match=r"model\.safetensors"):
        export_vllm(source, tmp_path / "again", options("fp8"))
    assert not (tmp_path / "again").exists()


def test_a_model_too_large_for_the_disk_is_refused_before_it_is_read(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8pipe.core.machine.free_bytes", lambda path: 1000)
    monkeypatch.setattr("exporters.vllm.lint.read_rows", None)  # nothing can be read
    need = plan_export(llama, options("fp8"), verify=False).payload_bytes
    with pytest.raises(OutOfMemoryError, match="is full") as caught:
        export_vllm(llama, tmp_path / "export", options("fp8"))
    assert caught.value.why == f"needed {need} bytes, 1000 bytes are free"
    assert not list(tmp_path.iterdir())


def test_a_damaged_write_fails_its_gate(
    llama: Path, falqon: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One flipped bit between writing and reopening, as a bad disk would."""

    def damaged(plan: object, root: Path, *rest: object) -> object:
        file = root / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return reopen(plan, root, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("exporters.vllm.export.reopen", damaged)
    with pytest.raises(GateFailedError, match="differs from its source") as caught:
        export_vllm(falqon(llama), tmp_path / "export", options("fp8"))
    assert "weights-bit-exact" in caught.value.why
    assert not (tmp_path / "export").exists()
