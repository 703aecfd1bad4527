"""Attacks on a finished export for TensorRT, every hash right again: its graph's operators, and its engine."""

from __future__ import annotations

import json
import shutil

import onnx_ir as ir
import pytest
import torch
from artifact_tree import rehash
from operator_attacks import ATTACKS, attack

from exporters.tensorrt.builder import build_rtx
from exporters.tensorrt.half import dequantize_graph
from exporters.tensorrt.recipe import EngineRecipe, pack_engine
from fp8pipe.artifact.record import ExportRejectedError
from validation.tensorrt.validate import validate_tensorrt

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are proofs without a GPU")
ENGINE = "engines/rtx-8.9.engine"


def rejected(export):
    with pytest.raises(ExportRejectedError) as caught:
        validate_tensorrt(export)
    return {gate.name: gate for gate in caught.value.record.gates if not gate.passed}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_operator_between_products_is_another(name, export):
    edit, named = ATTACKS[name]
    shutil.rmtree(export / "engines")
    (export / "layers.json").unlink()
    rehash(export, lambda data: data["details"].update(engines={}))
    gates = rejected(attack(export, edit))
    assert set(gates) == {"operators between products, evaluated in float64", "statements that do not hold"}
    assert named in gates["operators between products, evaluated in float64"].detail


def test_a_number_of_the_graph_is_another(export):
    shutil.rmtree(export / "engines")
    (export / "layers.json").unlink()
    rehash(export, lambda data: data["details"].update(engines={}))

    def louder(model):
        name = next(name for name in model.graph.initializers if name.endswith("norm1.weight"))
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy() * 2, name=name)

    gates = rejected(attack(export, louder))
    assert "the first: blocks.0.norm1.weight" in gates["float tensors differing"].detail


def test_an_engine_of_another_precision_under_the_same_name_is_rejected(export, tmp_path):
    """A plain engine of the same graph: right hashes, right recipe, and a manifest that says FP8."""
    recipe = EngineRecipe.model_validate(json.loads((export / "layers.json").read_text())["8.9"]["recipe"])
    model = ir.load(export / "model.onnx")
    dequantize_graph(model)
    ir.save(model, tmp_path / "plain.onnx")
    (export / f"{ENGINE}.xz").unlink()
    build_rtx(tmp_path / "plain.onnx", export / ENGINE, ["8.9"], recipe.profiles)
    pack_engine(export / ENGINE)
    gates = rejected(rehash(export))
    assert set(gates) == {"products not in fp8 for 8.9", "products listed otherwise than in the engine for 8.9"}
    assert "fp16" in gates["products not in fp8 for 8.9"].detail


def test_without_its_artifact_it_is_consistent_and_says_so(export):
    parent = json.loads((export / "manifest.json").read_text())["parents"][0]
    record = validate_tensorrt(export)
    assert (record.verdict, record.reference) == ("PROVED-WITHOUT-RUNNING", "artifact")
    assert record.engines[0].read
    rehash(export, lambda data: data.update(parents=[{**parent, "path": "/nowhere"}]))
    record = validate_tensorrt(export)
    assert (record.verdict, record.reference) == ("CONSISTENT", "export")
    assert "it was not found" in record.not_proved[0]
