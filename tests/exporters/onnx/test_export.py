"""The whole export: what it writes, what it refuses and with which exit code, and what the command line says."""

from __future__ import annotations

import dataclasses
import json

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from quantized_families import quantized_family, write_vit_artifact
from small_artifacts import details_of

from exporters.graph.formats import CLASSES_FILE, MODEL_FILE, OnnxFormat
from exporters.graph.layers import read_layers
from exporters.graph.lint import lint_model
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from fp8pipe.artifact import ArtifactWriter, open_artifact
from fp8pipe.artifact.finding import LintFindingsError
from fp8pipe.cli import main
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import ActivationQuantizer


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_vit_artifact(tmp_path_factory.mktemp("vit") / "model", quantized_family("timm-vit"), images=6)


@pytest.fixture(scope="module")
def export(artifact, tmp_path_factory):
    return export_onnx(artifact.root, tmp_path_factory.mktemp("export") / "onnx", OnnxExportOptions())


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_an_export_holds_all_that_a_service_needs(export, artifact):
    assert {entry.path for entry in export.manifest.files} == {
        MODEL_FILE, CLASSES_FILE, "preprocessing.json", "README.md",
    }  # fmt: skip
    manifest = open_artifact(export.root, kind="onnx-export").manifest
    assert all(gate.passed for gate in manifest.gates)
    assert {"weight codes differing", "integer layer error", "integer layers run in float"} <= {
        gate.name for gate in manifest.gates
    }
    assert [parent.digest for parent in manifest.parents] == [artifact.digest]
    assert manifest.runtime["opset"] == 21
    assert manifest.runtime["onnxruntime"] == manifest.versions["onnxruntime"]
    assert manifest.runtime["least_onnxruntime"] == "1.18"
    assert "Needs ONNX Runtime 1.18 or newer, for opset 21, IR 10." in (export.root / "README.md").read_text()
    assert manifest.warnings == []  # compared on the artifact's own images
    assert json.loads((export.root / CLASSES_FILE).read_text()) == ["ant", "bee", "cat", "dog", "elk"]
    assert (export.root / "preprocessing.json").read_bytes() == (artifact.root / "preprocessing.json").read_bytes()


def test_a_second_export_is_the_same_file(export, artifact, tmp_path):
    again = export_onnx(artifact.root, tmp_path / "again", OnnxExportOptions())
    assert (again.root / MODEL_FILE).read_bytes() == (export.root / MODEL_FILE).read_bytes()


def test_fp8_is_exported_and_its_price_is_said(tmp_path):
    source = write_vit_artifact(tmp_path / "a", quantized_family("timm-deit", kind=Kind.E4M3))
    exported = export_onnx(source.root, tmp_path / "b", OnnxExportOptions())
    assert exported.manifest.number_format.name == "e4m3"
    assert any("FP8" in warning for warning in exported.manifest.warnings)
    assert any("random pixels" in warning for warning in exported.manifest.warnings)


def test_int4_weights_alone_take_half_the_bytes(artifact, export, tmp_path):
    exported = export_onnx(artifact.root, tmp_path / "b", OnnxExportOptions(format=OnnxFormat.INT4_WEIGHT_ONLY))
    model = ir.load(exported.root / MODEL_FILE)
    layers = read_layers(model)
    assert {layer.operands[1].weight.dtype for layer in layers if layer.operands[1].weight} == {"INT4"}
    assert not any(node.op_type == "QuantizeLinear" for node in model.graph)
    assert any("activations of this export are float" in warning for warning in exported.manifest.warnings)
    assert (exported.root / MODEL_FILE).stat().st_size < (export.root / MODEL_FILE).stat().st_size


def test_what_cannot_be_used_is_refused(artifact, export, tmp_path):
    with pytest.raises(BadArtifactError, match="wrong kind"):
        export_onnx(export.root, tmp_path / "x", OnnxExportOptions())
    with pytest.raises(ConfigurationError, match="source itself"):
        export_onnx(artifact.root, artifact.root, OnnxExportOptions(force=True))
    with pytest.raises(ConfigurationError, match="exists already"):
        export_onnx(artifact.root, export.root, OnnxExportOptions())
    with ArtifactWriter(tmp_path / "empty", kind="vit", stage="quantize-vit") as writer:
        writer.commit(details=details_of("vit"), seed=0)
    with pytest.raises(BadArtifactError):
        export_onnx(tmp_path / "empty", tmp_path / "x", OnnxExportOptions())
    assert not (tmp_path / "x").exists()


def test_the_linter_names_every_finding_before_anything_is_written(tmp_path):
    quantized = quantized_family("timm-vit")
    first, second = list(quantized.weights)[1:3]
    wide = quantized.weights[first].codes.clone()
    wide[0, 0] = 100
    quantized.weights[first] = dataclasses.replace(quantized.weights[first], codes=wide)
    quantized.activations[f"{second}.input"] = ActivationQuantizer(0.5, kind=Kind.E4M3)
    quantized.model.get_parameter("norm.bias").data[0] = float("inf")
    source = write_vit_artifact(tmp_path / "a", quantized)
    with pytest.raises(LintFindingsError) as caught:
        export_onnx(source.root, tmp_path / "b", OnnxExportOptions())
    assert {finding.rule for finding in caught.value.findings} == {"code-range", "mixed-kinds", "not-finite"}
    assert caught.value.exit_code == 13
    assert list(tmp_path.iterdir()) == [source.root]


def test_eight_bits_do_not_fit_int4():
    findings = lint_model(quantized_family("timm-vit", bits=8), OnnxFormat.INT4_WEIGHT_ONLY)
    assert {finding.rule for finding in findings} == {"int4-width"}


def test_a_graph_that_differs_from_its_artifact_is_not_committed(artifact, tmp_path, monkeypatch):
    import exporters.onnx.export as module

    def spoiled(*arguments):
        graph = original(*arguments)
        value = graph.model.graph.initializers["blocks.0.mlp.fc1.weight"]
        array = value.const_value.numpy().copy()
        array[0, 0] += 1 if array[0, 0] < 7 else -1
        value.const_value = ir.tensor(array, name=value.name)
        return graph

    original = module.quantize_graph
    monkeypatch.setattr(module, "quantize_graph", spoiled)
    with pytest.raises(GateFailedError, match="differs from its artifact") as caught:
        export_onnx(artifact.root, tmp_path / "b", OnnxExportOptions())
    assert "weight codes differing: 1 (equal 0)" in caught.value.why
    assert not (tmp_path / "b").exists()


def test_the_command_line_exports_and_plans(artifact, tmp_path):
    planned = invoke("export", artifact.root, "--target", "onnx", "--output", tmp_path / "o", "--dry-run", "--json")
    assert planned.exit_code == 0
    assert json.loads(planned.stdout)["layer_counts"] == {"quantized": 10, "float": 0}
    assert not (tmp_path / "o").exists()
    written = invoke("export", artifact.root, "--target", "onnx", "--output", tmp_path / "o", "--json")
    assert written.exit_code == 0
    document = json.loads(written.stdout)
    assert document["kind"] == "onnx-export"
    assert document["format"] == "qdq"
    assert all(gate["passed"] for gate in document["gates"])


@pytest.mark.parametrize("option", [("--format", "fp8"), ("--max-shard-size", "5GB"), ("--vllm-version", "0.32.0")])
def test_options_of_another_target_are_refused(artifact, tmp_path, option):
    result = invoke("export", artifact.root, "--target", "onnx", "--output", tmp_path / "o", *option)
    assert result.exit_code == 10
    assert not (tmp_path / "o").exists()


def test_the_exported_classes_are_torchs(export, artifact):
    """On the calibration images, read by hand."""
    from safetensors.torch import load_file

    from exporters.graph.runtime import open_session, run
    from fp8pipe.models.vision.quantized import load_quantized

    quantized = load_quantized(artifact.root)
    pixels = quantized.preprocessing.normalize(
        load_file(artifact.root / "calibration" / "images.safetensors")["images"]
    )
    with torch.no_grad():
        expected = quantized(pixels)
    found = torch.from_numpy(run(open_session(export.root / MODEL_FILE), {"pixels": pixels.numpy()})["logits"])
    margins = expected.topk(2).values
    clear = (margins[:, 0] - margins[:, 1]) > 0.1 * margins[:, 0].abs()
    assert torch.equal(expected.argmax(1)[clear], found.argmax(1)[clear])
