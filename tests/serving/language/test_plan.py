"""`fp8pipe serve --dry-run` of a language export: its own settings alone, and the refusals of the real start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_artifacts import details_of

from exporters.vllm.environment import find_vllm_python, inspect_environment
from fp8pipe.artifact import ArtifactWriter
from fp8pipe.artifact.manifest import NumberFormat
from fp8pipe.cli import main
from fp8pipe.core.errors import MissingCapabilityError


def test_a_plan_has_no_settings_of_the_other_kind(export: Path) -> None:
    result = CliRunner().invoke(
        main, ["serve", str(export), "--dry-run", "--json", "--unvalidated", "--max-model-len", "128"]
    )
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["server"] == "language"
    assert plan["vllm"]["max_model_len"] == 128
    assert "port" in plan["config"]
    assert plan["plan"]["peak_memory_bytes"] > 1 << 30  # vLLM and its cache
    assert plan["plan"]["writes"] == []
    assert not {"max_batch", "streams", "queue", "max_pixels"} & set(plan["config"])


def test_a_plan_reads_the_keys(export: Path, tmp_path: Path) -> None:
    plan = ["serve", str(export), "--dry-run", "--unvalidated", "--api-key-file", str(tmp_path / "keys")]
    assert CliRunner().invoke(main, plan).exit_code == 10
    (tmp_path / "keys").write_text("sha256:no digest\n", encoding="utf-8")
    assert CliRunner().invoke(main, plan).exit_code == 10
    (tmp_path / "keys").write_text(f"sha256:{'0' * 64} alice\n", encoding="utf-8")
    assert CliRunner().invoke(main, plan).exit_code == 0


@pytest.mark.vllm
def test_a_plan_refuses_nvfp4_where_the_plugin_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        environment = inspect_environment(find_vllm_python())
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    if not environment.on_cpu:
        pytest.skip("vLLM's build for GPUs has kernels of its own")
    with ArtifactWriter(tmp_path / "four", kind="vllm-export", stage="test") as writer:
        (writer.root / "config.json").write_text("{}", encoding="utf-8")
        number = NumberFormat(name="nvfp4", granularity="per-block")
        export = writer.commit(number_format=number, details=details_of("vllm-export")).root
    monkeypatch.setenv("VLLM_PLUGINS", "")
    result = CliRunner().invoke(main, ["serve", str(export), "--dry-run", "--unvalidated"])
    assert result.exit_code == 11, result.output
    assert "its plugin is switched off (VLLM_PLUGINS)" in result.output


def test_engines_of_language_models_are_refused_in_a_plan_too(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "engines", kind="trt-language-export", stage="test") as writer:
        (writer.root / "model.onnx").write_bytes(b"")
        export = writer.commit(details=details_of("trt-language-export")).root
    result = CliRunner().invoke(main, ["serve", str(export), "--dry-run"])
    assert result.exit_code == 10
    assert "--target vllm" in result.output
