"""Repositories for Triton, read with Triton's own schema."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from quantized_families import quantized_family, write_vit_artifact

from exporters.graph.runtime import has_vnni, open_session, run
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from exporters.triton import repository as triton_repository
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


def _write(export: Path, output: Path, *options: str) -> Any:
    return CliRunner().invoke(main, ["serve-repository", str(export), "--output", str(output), "--json", *options])


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
    assert [group.kind for group in config.instance_group] == [2]  # KIND_CPU
    found = {key: value.string_value for key, value in config.parameters.items()}
    graph = hashlib.sha256((tmp_path / "tiny" / "1" / "model.onnx").read_bytes()).hexdigest()
    assert found == {"fp8pipe_artifact": open_artifact(vision).manifest.digest, "fp8pipe_graph": f"sha256:{graph}"}
    if (vision / "classes.json").is_file():
        labels = (tmp_path / "tiny" / "labels.txt").read_text(encoding="utf-8").splitlines()
        assert len(labels) == config.output[0].dims[0]
        assert config.output[0].label_filename == "labels.txt"
    assert _write(vision, tmp_path).exit_code == 10


@pytest.mark.parametrize(
    ("bits", "options"),
    [(8, OnnxExportOptions()), (4, OnnxExportOptions()), (4, OnnxExportOptions(format="int4-weight-only")),
     (4, OnnxExportOptions(format="qdq-exact"))],
    ids=["w8a8", "w4a4", "int4-weight-only", "exact"],
)  # fmt: skip
def test_triton_s_own_settings_give_the_export_s_bits(bits: int, options: OnnxExportOptions, tmp_path: Path) -> None:
    """A session without any setting, which is what Triton's backend makes, on images that were not compared before."""
    import onnxruntime

    artifact = write_vit_artifact(tmp_path / "vit", quantized_family("timm-vit", bits=bits), images=4)
    export = export_onnx(artifact.root, tmp_path / "tiny", options).root
    done = _write(export, tmp_path / "out")
    assert done.exit_code == 0, done.output
    proved = open_session(export / "model.onnx")
    shape = (5, *proved.get_inputs()[0].shape[1:])
    pixels = 2 * np.random.default_rng(7).standard_normal(shape, dtype=np.float32)
    expected = run(proved, {"pixels": pixels})["logits"]
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    for_triton = onnxruntime.InferenceSession(str(tmp_path / "out" / "tiny" / "1" / "model.onnx"), quiet)
    assert np.array_equal(run(for_triton, {"pixels": pixels})["logits"], expected)


def test_the_graph_as_exported_would_not_do_and_is_noticed(
    vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under Triton's settings its classifier runs in float, and on processors without VNNI its sums saturate."""
    monkeypatch.setattr(triton_repository, "_optimize", lambda source, target, entries: shutil.copyfile(source, target))
    done = _write(vision, tmp_path / "out")
    assert done.exit_code == 14, done.output
    assert not (tmp_path / "out" / "tiny").exists()


def test_a_graph_for_vnni_keeps_signed_weights_and_is_proved_where_there_is_vnni(vision: Path, tmp_path: Path) -> None:
    done = _write(vision, tmp_path, "--device", "cpu-vnni")
    if not has_vnni():
        assert done.exit_code == 11
        assert "VNNI" in done.output
        return
    assert done.exit_code == 0, done.output
    assert _weight_types(tmp_path / "tiny" / "1" / "model.onnx") == {"INT8"}
    _write(vision, tmp_path / "any")
    assert _weight_types(tmp_path / "any" / "tiny" / "1" / "model.onnx") == {"UINT8"}


def _weight_types(graph: Path) -> set[str]:
    import onnx_ir as ir

    weights = (node.inputs[1] for node in ir.load(graph).graph if node.op_type == "MatMulIntegerToFloat")
    return {value.const_value.dtype.name for value in weights if value is not None and value.const_value is not None}


def test_a_gpu_gets_the_graph_as_it_is(vision: Path, tmp_path: Path) -> None:
    assert _write(vision, tmp_path, "--device", "gpu").exit_code == 0
    assert (tmp_path / "tiny" / "1" / "model.onnx").read_bytes() == (vision / "model.onnx").read_bytes()
    config = _parse(tmp_path / "tiny" / "config.pbtxt")
    assert [group.kind for group in config.instance_group] == [1]  # KIND_GPU


def test_options_of_the_other_kind_are_refused(vision: Path, tmp_path: Path) -> None:
    done = _write(vision, tmp_path / "out", "--max-model-len", "64")
    assert done.exit_code == 10
    assert "--max-model-len" in done.output


def test_a_language_export(tmp_path: Path) -> None:
    from tiny_checkpoints import make_model, write_plain

    from exporters.vllm.export import export_vllm
    from exporters.vllm.options import VllmExportOptions

    export_vllm(write_plain(tmp_path / "plain", make_model()), tmp_path / "tiny", VllmExportOptions())
    done = _write(tmp_path / "tiny", tmp_path / "repository")
    assert done.exit_code == 0, done.output
    root = tmp_path / "repository" / "tiny"
    config = _parse(root / "config.pbtxt")
    assert (config.backend, config.model_transaction_policy.decoupled) == ("vllm", True)
    model = json.loads((root / "1" / "model.json").read_text(encoding="utf-8"))["model"]
    assert (tmp_path / "repository" / model / "config.json").is_file()
    assert _write(tmp_path / "tiny", tmp_path / "again", "--device", "cpu").exit_code == 10


def test_a_changed_export_is_refused(vision: Path, tmp_path: Path) -> None:
    shutil.copytree(vision, tmp_path / "tiny")
    with (tmp_path / "tiny" / "model.onnx").open("r+b") as stream:
        stream.seek(100)
        byte = stream.read(1)
        stream.seek(100)
        stream.write(bytes([byte[0] ^ 1]))
    assert _write(tmp_path / "tiny", tmp_path / "out").exit_code == 12
    assert not (tmp_path / "out").exists()
