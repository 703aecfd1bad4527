"""The passes one by one: against numpy, against ONNX's own reference evaluator, and against their promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from quantized_families import quantized_family
from vit_families import family, random_pixels

from exporters.graph.formats import OnnxFormat
from exporters.graph.layers import read_layers
from exporters.graph.passes.products import name_products, split_gemms
from exporters.graph.passes.quantize import _insert, quantize_activations, quantize_weights
from exporters.graph.produce import float_model, quantize_graph
from exporters.graph.runtime import open_session, run
from exporters.graph.trace import FloatGraph, trace_float
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import ActivationQuantizer


@pytest.fixture(scope="module")
def quantized():
    return quantized_family("hf-vit")  # q, k and v read one tensor: sharing matters


@pytest.fixture(scope="module")
def float_bytes(quantized):
    traced = trace_float(float_model(quantized), quantized.structure)
    names = [(product.kind, product.name, product.node.name) for product in traced.products]
    return ir.to_proto(traced.model).SerializeToString(), names


@pytest.fixture
def traced(float_bytes):
    """A fresh copy: passes change it."""
    import onnx

    from exporters.graph.trace import Product

    data, names = float_bytes
    model = ir.from_proto(onnx.ModelProto.FromString(data))
    nodes = {node.name: node for node in model.graph}
    return FloatGraph(model, tuple(Product(kind, name, nodes[node]) for kind, name, node in names))


def _one_quantizer(quantizer: ActivationQuantizer) -> bytes:
    """A graph of nothing but one quantizer."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n"]))
    identity = ir.node("Identity", [x])
    graph = ir.Graph([x], [], nodes=[identity], opset_imports={"": 21}, name="g")
    graph.outputs.append(_insert(graph, identity, x, quantizer, "site", None))
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()


RANGES = [(-128, 127), (-8, 7), (-3, 12), (0, 15), (0, 127), (-128, 5), (-1, 0), (-100, 127)]


@pytest.mark.parametrize("bounds", RANGES)
def test_clip_and_int8_give_the_codes_of_every_grid(bounds):
    import onnx

    random = np.random.default_rng(0)
    for scale in (0.1, 0.25, 3.7e-5, 1e-30, 812.5):
        quantizer = ActivationQuantizer(float(np.float32(scale)), *bounds)
        # Values everywhere, exact ties, borders, and far outside.
        codes = np.concatenate([random.uniform(-300, 300, 4000), np.arange(-140, 140) / 2, [1e9, -1e9, 0.0, -0.0]])
        x = (codes.astype(np.float32) * np.float32(scale)).astype(np.float32)
        expected = np.clip(np.rint(x / np.float32(scale)), *bounds).astype(np.float32) * np.float32(scale)
        assert np.array_equal(quantizer.fake(torch.from_numpy(x)).numpy(), expected)
        data = _one_quantizer(quantizer)
        (oracle,) = ReferenceEvaluator(onnx.ModelProto.FromString(data)).run(None, {"x": x})
        assert np.array_equal(oracle, expected)
        assert np.array_equal(run(open_session(data), {"x": x})["site/dequantized"], expected)


def test_fp8_gives_the_codes_of_the_grid():
    quantizer = ActivationQuantizer(float(np.float32(0.013)), kind=Kind.E4M3)
    x = np.random.default_rng(0).normal(0, 3, 20000).astype(np.float32)
    found = run(open_session(_one_quantizer(quantizer)), {"x": x})["site/dequantized"]
    assert np.array_equal(found, quantizer.fake(torch.from_numpy(x)).numpy())


def test_clip_stands_only_where_int8_does_not_saturate_by_itself(traced, quantized):
    sites = dict(quantized.activations)
    first, second = list(sites)[1:3]
    sites[first] = ActivationQuantizer(0.5)
    sites[second] = ActivationQuantizer(0.5, 0, 127)
    probabilities = [site for site in sites if site.endswith(".probs")]
    sites[probabilities[0]] = ActivationQuantizer(1 / 128, 0, 127)
    quantize_activations(traced, quantized.structure, sites, share=True)
    clips = {node.name.removesuffix("/Clip"): node for node in traced.model.graph if node.op_type == "Clip"}
    assert first not in clips
    assert len(clips[second].inputs) == 2  # no upper bound: INT8 ends at 127
    assert clips[probabilities[1]].inputs[1] is None  # no lower bound: a softmax is not negative
    assert set(clips) == set(sites) - {first, probabilities[0]}


def test_wider_codes_stay_int8_beside_int4(traced, quantized):
    first, *others = quantized.weights
    weights = dict(quantized.weights)
    weights[first] = replace(weights[first], bits=8)
    quantize_weights(traced, weights, int4=True)
    types = {name: traced.model.graph.initializers[f"{name}.weight"].dtype for name in weights}
    assert types == {first: ir.DataType.INT8} | dict.fromkeys(others, ir.DataType.INT4)


def test_readers_of_one_tensor_share_a_pair_or_have_one_each(traced, quantized):
    change = quantize_activations(traced, quantized.structure, quantized.activations, share=True)
    assert sorted(change.changed) == sorted(quantized.activations)
    assert sum(node.op_type == "QuantizeLinear" for node in traced.model.graph) == len(quantized.activations)


def test_separate_pairs_have_one_reader_each(traced, quantized):
    change = quantize_activations(traced, quantized.structure, quantized.activations, share=False)
    shared = len(quantized.structure.linears) - len({site.input_group for site in quantized.structure.linears})
    assert shared == 4
    assert len(change.changed) == len(set(change.changed)) == len(quantized.activations) + shared
    pairs = [node for node in traced.model.graph if node.op_type == "DequantizeLinear"]
    assert all(len(node.outputs[0].uses()) == 1 for node in pairs)


def test_gemm_is_split_without_changing_the_result(traced):
    assert any(node.op_type == "Gemm" for node in traced.model.graph)
    pixels = {"pixels": random_pixels(family("hf-vit"), 3).numpy()}
    before = run(open_session(ir.to_proto(traced.model).SerializeToString()), pixels)["logits"]
    change = split_gemms(traced)
    assert change.changed
    assert not any(node.op_type == "Gemm" for node in traced.model.graph)
    after = run(open_session(ir.to_proto(traced.model).SerializeToString()), pixels)["logits"]
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()  # fp32 in another order


def test_weights_are_codes_and_no_float_copy_remains(traced, quantized):
    split_gemms(traced)
    change = quantize_weights(traced, quantized.weights)
    assert set(change.changed) == set(quantized.weights)
    name_products(traced)
    for layer in read_layers(traced.model):
        if layer.name in quantized.weights:
            stored, wanted = layer.operands[1].weight, quantized.weights[layer.name]
            assert stored.dtype == "INT8"
            assert torch.equal(stored.codes, wanted.codes)
            assert torch.equal(stored.scale, wanted.scale)
            # Straight from DequantizeLinear into the product.
            assert layer.node.inputs[1].producer().op_type == "DequantizeLinear"
    sizes = {weight.codes.numel() for weight in quantized.weights.values()}
    floats = [v for v in traced.model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    assert [v.name for v in floats if v.const_value.size in sizes and v.const_value.numpy().ndim == 2] == []


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.INT, "INT8"), (Kind.E4M3, "FLOAT8E4M3FN")])
def test_the_reference_evaluator_agrees_with_torch(kind, dtype, tmp_path):
    """ONNX's own evaluator, plain numpy: no engine's optimizations."""
    import onnx

    quantized = quantized_family("timm-vit", kind=kind)
    model = quantize_graph(quantized, OnnxFormat.QDQ, "x").model
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert {opset.domain for opset in proto.opset_import} == {""}
    assert {layer.operands[1].weight.dtype for layer in read_layers(model) if layer.operands[1].weight} == {dtype}
    pixels = random_pixels(family("timm-vit"), 2)
    (found,) = ReferenceEvaluator(proto).run(None, {"pixels": pixels.numpy()})
    with torch.no_grad():
        expected = quantized(pixels).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_file_holds_nothing_of_the_machine_that_wrote_it(quantized):
    proto = ir.to_proto(quantize_graph(quantized, OnnxFormat.QDQ, "x").model)
    data = proto.SerializeToString()
    assert b"site-packages" not in data
    assert b".py" not in data
    assert data == ir.to_proto(quantize_graph(quantized, OnnxFormat.QDQ, "x").model).SerializeToString()
