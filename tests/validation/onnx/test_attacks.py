"""Attacks on a finished export, every hash right again: each is rejected and named, whatever the classes say."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx_ir as ir
import pytest
from artifact_tree import rehash
from operator_attacks import ATTACKS, attack
from quantized_families import quantized_family, write_vit_artifact

from exporters.graph import parity
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from fp8pipe.artifact.record import ExportRejectedError
from validation.onnx import validate
from validation.onnx.validate import validate_onnx


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_vit_artifact(tmp_path_factory.mktemp("vit") / "model", quantized_family("timm-vit", bits=8), images=4)


@pytest.fixture(scope="module")
def exported(artifact, tmp_path_factory):
    return export_onnx(artifact.root, tmp_path_factory.mktemp("export") / "onnx", OnnxExportOptions()).root


@pytest.fixture
def export(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "onnx")


@pytest.mark.parametrize("name", ATTACKS)
def test_an_operator_between_products_is_another(name, export, artifact):
    edit, named = ATTACKS[name]
    with pytest.raises(ExportRejectedError) as caught:
        validate_onnx(attack(export, edit), against=artifact.root)
    gates = {gate.name: gate for gate in caught.value.record.gates if not gate.passed}
    evaluated = gates["operators between products, evaluated in float64"]
    assert named in evaluated.detail
    assert str(evaluated) in caught.value.why


def test_every_gate_is_there(export, artifact):
    """A comparison that is left out is a promise that is not kept."""
    record = validate_onnx(export)
    assert (record.verdict, record.reference, record.not_proved) == ("ACCEPT", "artifact", [])
    alone = {
        "activation codes differing", "integer layer error", "float layer error", "integer layers run in float",
        "operators compared nowhere", "operators between products, evaluated in float64",
        "operators between products, in ONNX Runtime", "difference of outputs", "top-1 agreement",
        "statements that do not hold",
    }  # fmt: skip
    assert {gate.name for gate in record.gates} == alone | {
        "weight codes differing", "weight scales differing", "activation quantizers differing",
        "float tensors differing", "float copies of quantized weights", "torch layer error",
    }  # fmt: skip
    elsewhere = shutil.copytree(export, export.parent / "alone" / "onnx")
    data = json.loads((elsewhere / "manifest.json").read_text())
    rehash(elsewhere, lambda changed: changed.update(parents=[{**data["parents"][0], "path": "/nowhere"}]))
    record = validate_onnx(elsewhere)
    assert (record.verdict, record.reference) == ("CONSISTENT", "export")
    assert "it was not found" in record.not_proved[0]
    assert {gate.name for gate in record.gates} == alone


def test_a_graph_whose_values_have_no_shapes_is_compared_all_the_same(export, artifact):
    def bare(model):
        for node in model.graph:
            for value in node.outputs:
                if value not in model.graph.outputs:
                    value.shape = None

    assert validate_onnx(attack(export, bare), against=artifact.root).verdict == "ACCEPT"


def test_an_operator_that_no_comparison_runs_is_counted(export, artifact):
    def dangling(model):
        node = ir.node("Identity", [model.graph.inputs[0]], name="extra")
        node.outputs[0].name, node.outputs[0].type = "extra", ir.TensorType(ir.DataType.FLOAT)
        model.graph.append(node)

    with pytest.raises(ExportRejectedError, match="does not compute") as caught:
        validate_onnx(attack(export, dangling), against=artifact.root)
    assert caught.value.record.reasons == [
        "operators compared nowhere: 1 (equal 0); extra",
        "statements that do not hold: 1 (equal 0); extra: no export has this Identity",
    ]


def test_an_engine_of_other_outputs_is_rejected_by_the_whole_net_alone(export, artifact, monkeypatch):
    real = validate.run
    monkeypatch.setattr(validate, "run", lambda *given: {k: np.roll(v, 1, -1) for k, v in real(*given).items()})
    with pytest.raises(ExportRejectedError) as caught:
        validate_onnx(export, against=artifact.root)
    assert {reason.split(":")[0] for reason in caught.value.record.reasons} == {
        "difference of outputs", "top-1 agreement",
    }  # fmt: skip


def test_an_engine_of_other_products_is_rejected_by_the_layers_alone(export, artifact, monkeypatch):
    real = parity.run
    monkeypatch.setattr(parity, "run", lambda *given: {k: v + 1 for k, v in real(*given).items()})
    with pytest.raises(ExportRejectedError) as caught:
        validate_onnx(export, against=artifact.root)
    assert {reason.split(":")[0] for reason in caught.value.record.reasons} == {
        "activation codes differing", "integer layer error", "float layer error",
    }  # fmt: skip
