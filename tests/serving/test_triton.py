"""Repositories for Triton, read with Triton's own schema."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from quantized_families import quantized_family, write_vit_artifact

from exporters.onnx import OnnxExportOptions, export_onnx
from fp8pipe.artifact import open_artifact
from fp8pipe.cli import main


def _parse(path: Path) -> Any:
    """Triton's message, from the schema that tritonclient carries; its package would want gRPC."""
    from google.protobuf import text_format

    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    source = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    name = "tritonclient_model_config_pb2"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return text_format.Parse(path.read_text(encoding="utf-8"), sys.modules[name].ModelConfig())


def _write(export: Path, output: Path) -> Any:
    return CliRunner().invoke(main, ["serve-repository", str(export), "--output", str(output), "--json"])


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triton")
    artifact = write_vit_artifact(root / "vit", quantized_family("timm-vit", bits=8), images=4)
    return export_onnx(artifact.root, root / "tiny", OnnxExportOptions()).root


def test_a_vision_export(vision: Path, tmp_path: Path) -> None:
    import onnxruntime

    done = _write(vision, tmp_path)
    assert done.exit_code == 0, done.output
    config = _parse(tmp_path / "tiny" / "config.pbtxt")
    session = onnxruntime.InferenceSession(str(tmp_path / "tiny" / "1" / "model.onnx"))
    assert config.backend == "onnxruntime"
    assert [entry.name for entry in config.input] == [entry.name for entry in session.get_inputs()]
    assert list(config.input[0].dims) == session.get_inputs()[0].shape[1:]
    assert list(config.output[0].dims) == session.get_outputs()[0].shape[1:]
    assert {config.input[0].data_type, config.output[0].data_type} == {11}  # TYPE_FP32
    assert config.HasField("dynamic_batching")
    manifest = open_artifact(vision).manifest
    found = {key: value.string_value for key, value in config.parameters.items()}
    assert found == {**manifest.runtime["session_entries"], "fp8pipe_artifact": manifest.digest}
    if (vision / "classes.json").is_file():
        labels = (tmp_path / "tiny" / "labels.txt").read_text(encoding="utf-8").splitlines()
        assert len(labels) == config.output[0].dims[0]
        assert config.output[0].label_filename == "labels.txt"
    assert _write(vision, tmp_path).exit_code == 10


def test_a_language_export(tmp_path: Path) -> None:
    from tiny_checkpoints import make_model, write_plain

    from exporters.vllm import VllmExportOptions, export_vllm

    export_vllm(write_plain(tmp_path / "plain", make_model()), tmp_path / "tiny", VllmExportOptions())
    done = _write(tmp_path / "tiny", tmp_path / "repository")
    assert done.exit_code == 0, done.output
    root = tmp_path / "repository" / "tiny"
    config = _parse(root / "config.pbtxt")
    assert (config.backend, config.model_transaction_policy.decoupled) == ("vllm", True)
    model = json.loads((root / "1" / "model.json").read_text(encoding="utf-8"))["model"]
    assert (tmp_path / "repository" / model / "config.json").is_file()


def test_a_changed_export_is_refused(vision: Path, tmp_path: Path) -> None:
    shutil.copytree(vision, tmp_path / "tiny")
    with (tmp_path / "tiny" / "model.onnx").open("r+b") as stream:
        stream.seek(100)
        byte = stream.read(1)
        stream.seek(100)
        stream.write(bytes([byte[0] ^ 1]))
    assert _write(tmp_path / "tiny", tmp_path / "out").exit_code == 12
    assert not (tmp_path / "out").exists()
