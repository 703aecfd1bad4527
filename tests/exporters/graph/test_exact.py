"""The exact export: torch and ONNX Runtime give the same bits, codes and answers, without being fed each other's."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
import torch
from breadth import only_long
from click.testing import CliRunner
from quantized_families import quantized_family, write_vit_artifact
from vit_families import NAMES, family, random_pixels

from exporters.graph.formats import OnnxFormat
from exporters.graph.gates import check_kernels, codes_gate, outputs_gate
from exporters.graph.layers import read_layers
from exporters.graph.passes.exact import COEFFICIENTS, expand_gelus
from exporters.graph.produce import quantize_graph
from exporters.graph.reopen import reopen_gates
from exporters.graph.runtime import open_session, run
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from fp8pipe.cli import main
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import LintRefusedError
from fp8pipe.models.vision.exact import ExactVit
from fp8pipe.numerics.kinds import Kind
from validation.onnx.validate import validate_onnx

# Every kind of product, mask, activation function and pooling; their siblings run in a long run.
FIRST = {"timm-vit", "timm-eva02-split", "hf-swin-wide", "hf-clip", "timm-siglip"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FIRST else only_long) for n in NAMES])
def test_every_family_has_the_same_bits_in_torch_and_in_onnx_runtime(name, tmp_path):
    quantized, pixels = quantized_family(name), random_pixels(family(name), 6)
    path = tmp_path / "model.onnx"
    ir.save(quantize_graph(quantized, OnnxFormat.QDQ_EXACT, name).model, path)
    model = ir.load(path)
    layers = read_layers(model)
    assert [g for g in reopen_gates(model, layers, quantized, OnnxFormat.QDQ_EXACT) if not g.passed] == []
    gate = codes_gate(model, layers, quantized, pixels)
    assert gate.passed, gate
    assert f"in {len(quantized.activations)} sites" in gate.detail
    found = run(open_session(path), {"pixels": pixels.numpy()})["logits"]
    np.testing.assert_array_equal(found.view(np.int32), ExactVit(quantized)(pixels).numpy().view(np.int32))
    kernels = check_kernels(path, layers)
    assert (kernels.integer, kernels.float_layers) == (len(layers), [])  # the patch embedding too


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_vit_artifact(tmp_path_factory.mktemp("vit") / "model", quantized_family("timm-vit"), images=4)


def test_the_command_exports_and_validates(artifact, tmp_path):
    target = ["--target", "onnx", "--format", "qdq-exact", "--output", str(tmp_path / "onnx")]
    ended = CliRunner().invoke(main, ["export", str(artifact.root), *target])
    assert ended.exit_code == 0, ended.output
    assert "outputs differing end to end" in ended.stdout
    for against in (artifact.root, None):
        record = validate_onnx(tmp_path / "onnx", against=against)
        assert (record.verdict, record.reference) == ("ACCEPT", "artifact")  # where the manifest says it is
        assert record.classes.largest_difference == 0
        assert "outputs differing end to end" in {gate.name for gate in record.gates}


def test_one_changed_code_is_seen(artifact, tmp_path):
    """A gate that cannot fail proves nothing."""
    quantized, pixels = quantized_family("timm-vit"), random_pixels(family("timm-vit"), 4)
    export = export_onnx(artifact.root, tmp_path / "onnx", build_config(OnnxExportOptions, {"format": "qdq-exact"}))
    model = ir.load(export.root / "model.onnx")
    value = model.graph.initializers["blocks.0.attn.qkv.weight"]
    codes = value.const_value.numpy().copy()
    codes[0, 0] += 1 if codes[0, 0] < 7 else -1
    value.const_value = ir.tensor(codes, name=value.name)
    assert not codes_gate(model, read_layers(model), quantized, pixels).passed
    session = open_session(ir.to_proto(model).SerializeToString())
    found = torch.from_numpy(run(session, {"pixels": pixels.numpy()})["logits"])
    assert not outputs_gate(ExactVit(quantized)(pixels), found).passed


def test_fp8_is_refused_with_the_reason(tmp_path):
    made = write_vit_artifact(tmp_path / "fp8", quantized_family("timm-vit", bits=8, kind=Kind.E4M3), images=1)
    with pytest.raises(LintRefusedError, match="no-exact-sum"):
        export_onnx(made.root, tmp_path / "onnx", build_config(OnnxExportOptions, {"format": "qdq-exact"}))
    assert not (tmp_path / "onnx").exists()


def test_gelu_in_float64_is_that_of_the_c_library():
    """It is rounded to fp32, which tells 6e-8 apart: off by 1e-12, one in some 100,000 numbers rounds elsewhere."""
    x = np.concatenate([np.linspace(-40, 40, 20001), [-3e38, 3e38, 0.0, -0.0, 1e-45]])
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.DOUBLE), shape=ir.Shape([len(x)]))
    node = ir.node("Gelu", [value], name="gelu")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.DOUBLE)
    graph = ir.Graph([value], [node.outputs[0]], nodes=[node], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    assert expand_gelus(model).changed == ("gelu",)
    found = run(open_session(ir.to_proto(model).SerializeToString()), {"x": x})["y"]
    expected = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x])
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert len(COEFFICIENTS) == 23
