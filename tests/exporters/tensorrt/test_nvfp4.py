"""NVFP4 to TensorRT: the file against the artifact, layers in the reference evaluator, and the real builder."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from quantized_families import quantized_family, storable_graph, write_vit_artifact
from vit_families import family, random_pixels

from exporters.graph.formats import OnnxFormat
from exporters.graph.layers import read_layers
from exporters.graph.reopen import reopen_gates
from exporters.tensorrt.export import export_tensorrt
from exporters.tensorrt.graph import in_format, typed_graph
from exporters.tensorrt.half import compare_halved, halve, stored_arrays
from exporters.tensorrt.listing import PrecisionReport, ProductPrecision, artifact_precisions
from exporters.tensorrt.parity import _operator, block_gates, block_parity, dynamic_quantize
from exporters.tensorrt.target import TrtExportOptions, TrtFormat
from fp8pipe.artifact.gate import Comparison
from fp8pipe.cli import main
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError, LintRefusedError
from fp8pipe.models.vision.quantized import of_type
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BlockCodes, BlockQuantizer
from validation.tensorrt.validate import validate_tensorrt

NAME = "timm-vit"
FP4, FP8 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn


def options(**changes: object) -> TrtExportOptions:
    return build_config(TrtExportOptions, {"batch": [1, 2, 4]} | changes)


def graph(name: str = NAME, format: TrtFormat = TrtFormat.NVFP4) -> ir.Model:
    return typed_graph(in_format(quantized_family(name, kind=Kind.NVFP4), format), format, "test").model


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    place = tmp_path_factory.mktemp("artifact") / "model"
    return write_vit_artifact(place, quantized_family(NAME, kind=Kind.NVFP4), images=4)


@pytest.fixture(scope="module")
def export(artifact, tmp_path_factory):
    pytest.importorskip("tensorrt_rtx")
    return export_tensorrt(artifact.root, tmp_path_factory.mktemp("export") / "trt", options())


def test_every_product_is_built_in_the_precision_of_the_artifact(export):
    manifest = export.manifest
    assert all(gate.passed for gate in manifest.gates)
    # Eight linears in blocks; both ends, and two products of each of two attentions, in FP8.
    assert manifest.details.engines["12.0"].precisions == {"fp4": 8, "fp8": 6}
    layers = json.loads((export.root / "layers.json").read_text())["12.0"]["layers"]
    four_bit = [layer for layer in layers if layer["kind"] == "gemm" and layer["inputs"][0]["dtype"] == "FP4E2M1"]
    for layer in four_bit:
        constants = {port["dtype"] for port in layer["constants"]}
        assert {"FP4E2M1", "FP8"} <= constants, layer["name"]
        assert layer["inputs"][1]["dtype"] == "FP8"
    assert len(four_bit) == 8
    assert manifest.config["compute_capabilities"] == ["12.0"]
    assert manifest.number_format.name == "nvfp4"
    assert manifest.runtime["opset"] == 23


def test_the_file_holds_the_codes_and_scales_of_the_artifact(export):
    """Read with onnx alone, unpacked by hand."""
    quantized = quantized_family(NAME, kind=Kind.NVFP4)
    stored = {tensor.name: tensor for tensor in onnx.load(export.root / "model.onnx").graph.initializer}
    weights = of_type(quantized.weights, BlockCodes)
    assert len(weights) == 8
    for name, weight in weights.items():
        codes, blocks = stored[f"{name}.weight"], stored[f"{name}.weight_block_scale"]
        assert codes.data_type == onnx.TensorProto.FLOAT4E2M1
        assert blocks.data_type == onnx.TensorProto.FLOAT8E4M3FN
        packed = np.frombuffer(codes.raw_data, np.uint8)
        nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(codes.dims)
        assert np.array_equal(nibbles.T, weight.codes.numpy())
        scales = np.frombuffer(blocks.raw_data, np.uint8).reshape(blocks.dims)
        assert np.array_equal(scales.T, weight.scales.block.view(torch.uint8).numpy())
        tensor = stored[f"{name}.weight_tensor_scale"]
        assert float(onnx.numpy_helper.to_array(tensor)) == weight.scales.tensor


def test_an_altered_code_or_scale_is_found():
    quantized = quantized_family(NAME, kind=Kind.NVFP4)
    model = graph()
    layers = read_layers(model)
    assert all(gate.passed for gate in reopen_gates(model, layers, quantized, OnnxFormat.QDQ))
    name, weight = next(iter(of_type(quantized.weights, BlockCodes).items()))
    codes, block = weight.codes.clone(), weight.scales.block.view(torch.uint8).clone()
    codes[0, 0] ^= 1
    block[0, 0] += 1
    scales = dataclasses.replace(weight.scales, block=block.view(torch.float8_e4m3fn))
    doubled = dataclasses.replace(weight.scales, tensor=2 * weight.scales.tensor)
    for other, gate in (
        (BlockCodes(codes, weight.scales), "weight codes differing"),
        (BlockCodes(weight.codes, scales), "weight scales differing"),
        (BlockCodes(weight.codes, doubled), "weight scales differing"),
    ):
        quantized.weights[name] = other
        found = {g.name: g.value for g in reopen_gates(model, layers, quantized, OnnxFormat.QDQ)}
        assert found[gate] == 1
    quantized.weights[name] = weight
    site = next(iter(of_type(quantized.activations, BlockQuantizer)))
    quantized.activations[site] = BlockQuantizer(2.0 * quantized.activations[site].tensor_scale)
    gates = {g.name: g.value for g in reopen_gates(model, layers, quantized, OnnxFormat.QDQ)}
    assert gates["activation quantizers differing"] > 0


def test_the_operator_is_what_its_documentation_says():
    """One block after the other in plain Python."""
    x = (np.random.default_rng(0).standard_normal((2, 3, 48)) * 10).astype(np.float32)
    x[0, 0, :16] = 0
    scale = np.float32(2.0**-9)  # some blocks are beyond 448
    codes, blocks = dynamic_quantize(x, scale)
    assert codes.dtype == FP4
    assert blocks.dtype == FP8
    for index in np.ndindex(2, 3, 3):
        block = x[index[0], index[1], 16 * index[2] : 16 * index[2] + 16]
        wanted = FP8(min(float(np.abs(block).max()) / 6 / float(scale), 448.0))
        assert float(blocks[index]) == float(wanted)
        for offset, value in enumerate(block):
            step = float(wanted) * float(scale)
            expected = FP4(np.float32(min(max(value / step, -6), 6))) if step else FP4(0)
            assert float(codes[index[0], index[1], 16 * index[2] + offset]) == float(expected)
    assert float(blocks.astype(np.float32).max()) == 448


@pytest.mark.parametrize("format", [TrtFormat.NVFP4, TrtFormat.NVFP4_WEIGHT_ONLY])
@pytest.mark.parametrize("name", [NAME, "timm-swin", "hf-clip-backbone"])
def test_layers_in_the_reference_evaluator_are_those_of_torch(name, format):
    quantized = in_format(quantized_family(name, kind=Kind.NVFP4), format)
    model = typed_graph(quantized, format, "test").model
    report = block_parity(model, read_layers(model), quantized, random_pixels(family(name), 2))
    assert len(report) == len(of_type(quantized.weights, BlockCodes))
    assert all(gate.passed for gate in block_gates(report))
    assert sum(layer.codes for layer in report) == 0 if format.weight_only else all(layer.codes for layer in report)
    # Four-bit products add up almost exactly; sums of float activations round like any other.
    assert max(layer.error for layer in report) < 1e-6


def test_readers_of_one_value_share_its_quantizer():
    model = graph("hf-vit")  # queries, keys and values are three linears
    dynamic = [node for node in model.graph if node.op_type == "TRT_FP4DynamicQuantize"]
    assert len({node.inputs[0] for node in dynamic}) == len(dynamic)
    readers = [len(node.outputs[0].uses()) for node in dynamic]
    assert set(readers) == {1}
    products = [node for node in model.graph if node.op_type == "MatMul" and read_kind(node) == "FLOAT4E2M1"]
    assert len(products) > len(dynamic)


def read_kind(node: ir.Node) -> str:
    producer = node.inputs[0].producer()
    return producer.inputs[0].dtype.name if producer is not None and producer.op_type == "DequantizeLinear" else ""


@pytest.mark.parametrize("format", [TrtFormat.NVFP4, TrtFormat.NVFP4_WEIGHT_ONLY])
def test_half_precision_changes_no_code_and_no_scale(format, tmp_path):
    model = graph(format=format)
    before = stored_arrays(model)
    bytes_before = {name: array.tobytes() for name, array in before.items() if array.dtype.itemsize == 1}
    assert {array.dtype.name for array in before.values()} >= {"float4_e2m1fn", "float8_e4m3fn"}
    # The evaluator's arithmetic in float32, of the same nodes.
    pixels = {"pixels": random_pixels(family(NAME), 2).numpy()}
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[_operator()])
    (expected,) = evaluator.run(None, pixels)
    halve(model)
    ir.save(model, tmp_path / "half.onnx")
    assert all(gate.passed for gate in compare_halved(before, ir.load(tmp_path / "half.onnx")))
    after = stored_arrays(ir.load(tmp_path / "half.onnx"))
    for name, raw in bytes_before.items():
        assert after[name].tobytes() == raw
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and node.outputs[0].uses():
            scale = node.inputs[1]
            assert scale.dtype == node.outputs[0].dtype  # what a strongly typed network demands
    (found,) = ReferenceEvaluator(onnx.load(tmp_path / "half.onnx"), new_ops=[_operator()]).run(None, pixels)
    assert found.dtype == np.float32
    # Half precision moves single codes of a low-bit net; without them (weights alone) little is left of the difference.
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > (0.9999 if format.weight_only else 0.8)


def test_the_evaluated_graph_is_the_artifact_s_function():
    quantized = in_format(quantized_family(NAME, kind=Kind.NVFP4), TrtFormat.NVFP4_WEIGHT_ONLY)
    pixels = random_pixels(family(NAME), 2)
    proto = ir.to_proto(graph(format=TrtFormat.NVFP4_WEIGHT_ONLY))
    (found,) = ReferenceEvaluator(proto).run(None, {"pixels": pixels.numpy()})
    with torch.no_grad():
        expected = quantized(pixels).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_weights_alone_are_compiled(artifact, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    export = export_tensorrt(artifact.root, tmp_path / "export", options(format="nvfp4-weight-only"))
    assert all(gate.passed for gate in export.manifest.gates)
    nodes = {node.op_type for node in ir.load(export.root / "model.onnx").graph}
    assert not nodes & {"QuantizeLinear", "TRT_FP4DynamicQuantize"}
    assert export.manifest.details.engines["12.0"].engine_bytes > 0


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4-weight-only"])
def test_other_gpus_are_refused_before_the_builder(artifact, tmp_path, format, monkeypatch):
    from exporters.tensorrt import export as export_module

    monkeypatch.setattr(export_module, "build_rtx", None)
    monkeypatch.setattr(export_module, "typed_graph", None)
    with pytest.raises(ConfigurationError, match=r"(?s)8\.9.*12\.0"):
        export_tensorrt(
            artifact.root, tmp_path / "export", options(format=format, compute_capabilities=["12.0", "8.9"])
        )
    assert not (tmp_path / "export").exists()


def test_the_graph_alone_is_for_any_gpu(artifact, tmp_path):
    config = options(builder="none", compute_capabilities=["8.9"], base="fp32")
    export = export_tensorrt(artifact.root, tmp_path / "export", config)
    assert export.manifest.details.engines == {}


@pytest.mark.parametrize("format", ["fp8", "int8", "int4-weight-only"])
def test_codes_are_never_rounded_a_second_time(artifact, tmp_path, format):
    with pytest.raises(LintRefusedError, match="would round them again"):
        export_tensorrt(artifact.root, tmp_path / "export", options(format=format))


def test_other_artifacts_have_no_nvfp4(tmp_path):
    place = write_vit_artifact(tmp_path / "model", quantized_family(NAME, bits=8, kind=Kind.E4M3), images=4)
    with pytest.raises(LintRefusedError, match="wnvfp4anvfp4"):
        export_tensorrt(place.root, tmp_path / "export", options(format="nvfp4"))


def test_other_formats_keep_their_opset():
    for kind in (Kind.INT, Kind.E4M3):
        model = storable_graph(NAME, kind)
        assert dict(model.opset_imports) == {"": 21}


def test_a_product_in_another_precision_than_its_own_is_found():
    wanted = artifact_precisions(read_layers(graph()))
    assert sorted(set(wanted.values())) == ["fp4", "fp8"]

    def report(**changes: str) -> PrecisionReport:
        built = wanted | changes
        products = [
            ProductPrecision(node=n, layer=n, operands=(p, p), output="fp16", fused_attention=False)
            for n, p in built.items()
        ]
        return PrecisionReport(products=tuple(products), other_layers={})

    assert report().not_in(wanted) == ()
    assert report(**{"blocks.0.mlp.fc1/MatMul": "fp8"}).not_in(wanted) == ("blocks.0.mlp.fc1/MatMul",)
    assert report(**{"head/MatMul": "fp4"}).not_in(wanted) == ("head/MatMul",)


def test_a_linear_that_the_builder_multiplies_otherwise_fails(artifact, tmp_path, monkeypatch):
    """With anything between its rounding and itself, the builder dequantizes and multiplies halves, without a word."""
    pytest.importorskip("tensorrt_rtx")
    from exporters.tensorrt import export as export_module

    def spoil(model):
        change = halve(model)
        for node in list(model.graph):
            if node.op_type == "MatMul" and node.name == "blocks.0.mlp.fc1/MatMul":
                value = node.inputs[0]
                between = ir.node("Relu", [value], name="between")
                between.outputs[0].name, between.outputs[0].type = "between", value.type
                between.outputs[0].shape = value.shape
                model.graph.insert_before(node, between)
                node.replace_input_with(0, between.outputs[0])
        return change

    monkeypatch.setattr(export_module, "halve", spoil)
    monkeypatch.setattr(export_module, "check_file", lambda *args, **named: ())  # the linter would see it first
    with pytest.raises(GateFailedError, match=r"products not in nvfp4 for 12\.0: 1 .*blocks\.0\.mlp\.fc1"):
        export_tensorrt(artifact.root, tmp_path / "export", options())


def test_validation_runs_the_graph_in_the_reference_evaluator(export, tmp_path):
    """ONNX Runtime has no four-bit floats."""
    place = shutil.copytree(export.root, tmp_path / "export")
    record = validate_tensorrt(place)
    assert record.verdict == "PROVED-WITHOUT-RUNNING"
    assert "ONNX's reference evaluator reads and runs the graph" in record.proved
    assert all(gate.passed for gate in record.gates)
    assert {gate.value for gate in record.gates if gate.comparison is Comparison.EQUAL} == {0}


def test_a_graph_in_another_form_is_not_read():
    model = graph()
    dynamic = next(node for node in model.graph if node.op_type == "TRT_FP4DynamicQuantize")
    dynamic.attributes["block_size"] = ir.AttrInt64("block_size", 32)
    with pytest.raises(BadArtifactError, match="blocks of 16"):
        read_layers(model)


def test_the_command_line_names_what_it_would_build(artifact, tmp_path):
    base = ["export", str(artifact.root), "--output", str(tmp_path / "out")]
    plan = CliRunner().invoke(main, [*base, "--target", "trt", "--dry-run"])
    assert plan.exit_code == 0, plan.output
    assert re.search(r"engines +12\.0\b", plan.output)
    old = CliRunner().invoke(main, [*base, "--target", "trt", "--compute-capability", "8.9"])
    assert old.exit_code == 10
    assert "--compute-capability 12.0" in old.output
    onnx_runtime = CliRunner().invoke(main, [*base, "--target", "onnx"])
    assert onnx_runtime.exit_code == 13
    assert "no-fp4" in onnx_runtime.output
