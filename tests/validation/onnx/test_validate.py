"""Validation in ONNX Runtime: accepted as exported, rejected when the graph was changed, engine chosen by kind."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
from artifact_tree import rehash
from click.testing import CliRunner
from PIL import Image
from quantized_families import quantized_family, write_vit_artifact

from exporters.graph.formats import MODEL_FILE, OnnxFormat
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from fp8pipe.artifact import ArtifactWriter, open_artifact
from fp8pipe.artifact.record import ExportRejectedError, record_path
from fp8pipe.cli import main
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from validation.onnx.validate import validate_onnx


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_vit_artifact(tmp_path_factory.mktemp("vit") / "model", quantized_family("timm-vit"), images=4)


@pytest.fixture(scope="module")
def exported(artifact, tmp_path_factory):
    return export_onnx(artifact.root, tmp_path_factory.mktemp("export") / "onnx", OnnxExportOptions()).root


@pytest.fixture
def export(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "onnx")


def _rewrite(export, change):
    """Change the graph and checksum the export again, as someone with the tools could."""
    old = open_artifact(export)
    target = export.with_name("changed")
    with ArtifactWriter(target, kind=old.kind, stage="export") as writer:
        for entry in old.manifest.files:
            shutil.copy(export / entry.path, writer.root / entry.path)
        model = ir.load(writer.root / MODEL_FILE)
        change(model)
        ir.save(model, writer.root / MODEL_FILE)
        writer.commit(config={}, seed=None, parents=old.manifest.parents, details=old.manifest.details)
    return target


def _double(name):
    def change(model):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(2), name=name)

    return change


@pytest.mark.parametrize("place", ["given", "noted", "beside", "gone"])
def test_an_export_is_accepted_against_its_artifact_alone(export, artifact, place):
    if place in ("beside", "gone"):
        manifest = json.loads((export / "manifest.json").read_text())
        rehash(export, lambda data: data.update(parents=[{**manifest["parents"][0], "path": "/nowhere"}]))
    if place == "beside":
        shutil.copytree(artifact.root, export.parent / "renamed")
    record = validate_onnx(export, against=artifact.root if place == "given" else None)
    assert record.verdict == ("CONSISTENT" if place == "gone" else "ACCEPT")
    assert record.reference == ("export" if place == "gone" else "artifact")
    assert record.kernels.integer == 13
    assert {layer.layer for layer in record.layers} == set(record.kernels.operators)
    assert json.loads(record_path(export).read_text())["manifest_digest"] == open_artifact(export).digest


def _pictures(folder, count):
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / name / f"{index}.png")
    return folder


def test_pictures_are_compared_beside_the_probe_images(export, artifact, tmp_path):
    pictures = _pictures(tmp_path / "pictures", 40)
    record = validate_onnx(export, against=artifact.root, images=pictures)
    assert (record.classes.images, record.pictures.images) == (4, 80)
    names = [gate.name for gate in record.gates]
    on_both = [name for name in names if f"{name}, pictures" in names]
    assert {"top-1 agreement", "difference of outputs", "activation codes differing"} < set(on_both)
    gate = next(gate for gate in record.gates if gate.name == "top-1 agreement, pictures")
    assert gate.value == record.pictures.agreeing / 80
    assert gate.passed
    assert gate.threshold >= 0.9


def test_pictures_that_are_none_are_refused(export, artifact, tmp_path):
    command = ["validate", str(export), "--images", str(tmp_path / "nowhere")]
    manifest = json.loads((export / "manifest.json").read_text())
    rehash(export, lambda data: data.update(parents=[{**manifest["parents"][0], "path": "/nowhere"}]))
    alone = CliRunner().invoke(main, command)
    assert alone.exit_code == 10
    assert "--against" in alone.output
    result = CliRunner().invoke(main, [*command, "--against", str(artifact.root)])
    assert result.exit_code == 10
    assert "not an image folder" in result.output


def test_int4_weights_alone_are_accepted(artifact, tmp_path):
    options = OnnxExportOptions(format=OnnxFormat.INT4_WEIGHT_ONLY)
    root = export_onnx(artifact.root, tmp_path / "int4", options).root
    assert validate_onnx(root).verdict == "ACCEPT"


def test_a_changed_scale_is_rejected_against_the_artifact(export, artifact):
    changed = _rewrite(export, _double("blocks.0.mlp.fc1.weight_scale"))
    with pytest.raises(ExportRejectedError) as caught:
        validate_onnx(changed, against=artifact.root)
    assert caught.value.exit_code == 14
    assert "weight scales differing" in caught.value.why
    assert json.loads(record_path(changed).read_text())["verdict"] == "REJECT"


def test_a_layer_that_runs_in_float_is_rejected(export):
    """A pair with a second reader: right, and no longer on integers."""

    def change(model):
        product = next(node for node in model.graph if node.name == "blocks.0.mlp.fc1/MatMul")
        extra = ir.node("Identity", [product.inputs[0]], name="extra")
        extra.outputs[0].name, extra.outputs[0].type = "extra", ir.TensorType(ir.DataType.FLOAT)
        model.graph.append(extra)
        model.graph.outputs.append(extra.outputs[0])

    with pytest.raises(ExportRejectedError, match="does not compute") as caught:
        validate_onnx(_rewrite(export, change))
    assert "integer layers run in float" in caught.value.why


def test_damage_is_no_verdict(export, artifact, tmp_path):
    record_path(export).write_text("{}")
    other = write_vit_artifact(tmp_path / "other", quantized_family("timm-deit"))
    with pytest.raises(ConfigurationError, match="was not made from"):
        validate_onnx(export, against=other.root)
    with pytest.raises(BadArtifactError, match="wrong kind"):
        validate_onnx(artifact.root)
    data = (export / MODEL_FILE).read_bytes()
    (export / MODEL_FILE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadArtifactError, match="sha256"):
        validate_onnx(export)


def test_the_command_line_takes_the_engine_from_the_kind(export):
    result = CliRunner().invoke(main, ["validate", str(export), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["engine"] == "onnxruntime"
    named = CliRunner().invoke(main, ["validate", str(export), "--engine", "onnxruntime", "--quiet"])
    assert (named.exit_code, named.stdout.strip()) == (0, "ACCEPT")
    wrong = CliRunner().invoke(main, ["validate", str(export), "--engine", "vllm"])
    assert wrong.exit_code == 10
