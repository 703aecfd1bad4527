"""Every gate of a graph can fail: each is shown what it exists for, and says so."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from quantized_families import quantized_family
from vit_families import family, random_pixels

from exporters.graph import parity
from exporters.graph.formats import OnnxFormat
from exporters.graph.gates import (
    KernelReport,
    float_gate,
    kernel_gate,
    layer_codes_gate,
    outputs_gate,
    parity_gates,
)
from exporters.graph.layers import read_layers
from exporters.graph.parity import FLOAT_TOLERANCE, INTEGER_TOLERANCE, LayerParity, layer_error
from exporters.graph.produce import quantize_graph
from exporters.graph.reopen import reopen_gates

NAME = "timm-vit"


@pytest.fixture(scope="module")
def quantized():
    return quantized_family(NAME)


@pytest.fixture(scope="module")
def graph(quantized):
    return quantize_graph(quantized, OnnxFormat.QDQ, NAME)


@pytest.fixture
def model(graph):
    return ir.from_proto(ir.to_proto(graph.model))


def failed(model, quantized, format=OnnxFormat.QDQ, layers=None):
    gates = reopen_gates(model, read_layers(model) if layers is None else layers, quantized, format)
    return {gate.name: gate.value for gate in gates if not gate.passed}


def store(model, name, array):
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)


def add(model, name, array):
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.register_initializer(value)


def floats(model):
    return {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items() if v.dtype.name == "FLOAT"}


def test_what_is_right_passes(model, quantized):
    assert failed(model, quantized) == {}
    assert len(reopen_gates(model, read_layers(model), quantized, OnnxFormat.QDQ)) == 5


def test_a_float_tensor_that_is_not_the_models_is_counted(model, quantized):
    stored = floats(model)
    names = [n for n in ("pos_embed", "blocks.0.norm1.weight", "norm.bias") if n in stored]
    assert names
    for number, name in enumerate(names, 1):
        stored[name].reshape(-1)[-1] = np.nextafter(stored[name].reshape(-1)[-1], np.float32(9))
        store(model, name, stored[name])
        assert failed(model, quantized) == {"float tensors differing": number}


def test_a_bias_is_found_whatever_it_is_called(model, quantized):
    name = "blocks.0.attn.proj.bias"
    value = model.graph.initializers[name]
    array = value.const_value.numpy().copy()
    array[3] = np.nextafter(array[3], np.float32(9))
    model.graph.initializers.pop(name)
    value.name, value.const_value = "renamed", ir.tensor(array, name="renamed")
    model.graph.register_initializer(value)
    assert failed(model, quantized) == {"float tensors differing": 1}


@pytest.mark.parametrize("transposed", [False, True])
def test_a_float_copy_of_a_quantized_weight_is_found(model, quantized, transposed):
    weight = quantized.weights["blocks.0.mlp.fc1"].dequantize().numpy()
    add(model, "copy", weight.T if transposed else weight)
    assert failed(model, quantized) == {"float copies of quantized weights": 1}


def test_what_only_resembles_a_weight_is_no_copy(model, quantized):
    weight = quantized.weights["blocks.0.mlp.fc1"].dequantize().numpy()
    add(model, "other", weight + np.float32(1))
    add(model, "flat", weight.reshape(-1))
    assert failed(model, quantized) == {}


@pytest.mark.parametrize("what", ["codes", "scale"])
def test_each_differing_code_and_scale_is_counted(model, quantized, what):
    name = "blocks.0.mlp.fc1.weight" + ("" if what == "codes" else "_scale")
    array = model.graph.initializers[name].const_value.numpy().copy()
    flat = array.reshape(-1)
    for place in (0, 5, 9):
        flat[place] = flat[place] + (1 if flat[place] < 7 else -1) if what == "codes" else flat[place] * 2
    store(model, name, array)
    assert failed(model, quantized) == {f"weight {'codes' if what == 'codes' else 'scales'} differing": 3}


def test_a_layer_that_is_not_there_counts_whole(model, quantized):
    name = "blocks.0.mlp.fc1"
    layers = [layer for layer in read_layers(model) if layer.label != name]
    weight = quantized.weights[name]
    assert failed(model, quantized, layers=layers) == {
        "weight codes differing": weight.codes.numel(), "weight scales differing": weight.scale.numel(),
        "activation quantizers differing": 1,
    }  # fmt: skip


def test_quantizers_where_none_should_be_are_counted(model, quantized):
    found = failed(model, quantized, OnnxFormat.INT4_WEIGHT_ONLY)
    assert found == {"activation quantizers differing": len(quantized.structure.linears) + 4 * 2}


def test_the_float_graph_is_held_against_the_float_model(graph, quantized):
    pixels = random_pixels(family(NAME), 4)
    gate = float_gate(graph.float_bytes, quantized, pixels)
    assert gate.passed
    assert gate.value > 0
    assert "batch of 3" in gate.detail
    changed = ir.from_proto(__import__("onnx").ModelProto.FromString(graph.float_bytes))
    name = next(n for n in floats(changed) if n.endswith("norm.weight"))
    store(changed, name, floats(changed)[name] * np.float32(1.01))
    gate = float_gate(ir.to_proto(changed).SerializeToString(), quantized, pixels)
    assert not gate.passed
    assert 1e-3 < gate.value < 1


def layer(**changes):
    plain = {"layer": "a", "codes": 9, "differing_codes": 0, "integer": True, "error": 0.0, "torch_error": None}
    return LayerParity(**{**plain, **changes})


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ([layer(error=INTEGER_TOLERANCE, torch_error=FLOAT_TOLERANCE)], []),
        ([layer(), layer(error=math.nextafter(INTEGER_TOLERANCE, 1))], ["integer layer error"]),
        ([layer(integer=False, error=FLOAT_TOLERANCE)], []),
        ([layer(integer=False, error=math.nextafter(FLOAT_TOLERANCE, 1)), layer()], ["float layer error"]),
        ([layer(torch_error=2 * FLOAT_TOLERANCE), layer(layer="b", torch_error=0.0)], ["torch layer error"]),
        ([layer(), layer(layer="b", differing_codes=1)], ["activation codes differing"]),
        ([layer(error=math.nan)], ["integer layer error"]),
        ([layer(torch_error=math.nan), layer(layer="b", torch_error=1.0)], ["torch layer error"]),
    ],
)
def test_layers_pass_up_to_their_tolerance(report, expected):
    assert [gate.name for gate in parity_gates(report) if not gate.passed] == expected
    assert [x.tolerance for x in report] == [INTEGER_TOLERANCE if x.integer else FLOAT_TOLERANCE for x in report]


def test_the_tolerances_are_the_stated_ones():
    assert (INTEGER_TOLERANCE, FLOAT_TOLERANCE) == (1e-6, 1e-5)


def test_the_worst_layer_is_named_and_kinds_that_are_absent_have_no_gate():
    gates = parity_gates([layer(error=1e-7), layer(layer="b", error=3e-7), layer(layer="c", error=2e-7)])
    assert [gate.name for gate in gates] == ["activation codes differing", "integer layer error"]
    assert gates[1].value == 3e-7
    assert gates[1].detail.endswith("3 layers, the worst: b")
    counted = layer_codes_gate("codes", [layer(differing_codes=2), layer(differing_codes=3)])
    assert (counted.value, counted.detail[:17]) == (5, "of 18 in 2 layers")


def test_a_layers_error_is_relative_to_its_largest_output():
    expected = torch.tensor([[0.0, -4.0], [1.0, 2.0]], dtype=torch.float64)
    assert layer_error(expected.float(), expected) == 0
    assert layer_error(expected.float().flatten() + torch.tensor([0, 0, 0, 1.0]), expected) == 0.25
    assert layer_error(expected.float() - torch.tensor([[0, 2.0], [0, 0]]), expected) == 0.5
    assert math.isnan(layer_error(expected.float()[0], expected))
    assert layer_error(torch.zeros(2), torch.zeros(2)) == 0
    assert layer_error(torch.full((2,), 1e-3), torch.zeros(2)) > 1


def test_an_engine_and_torch_are_each_held_to_the_exact_result(monkeypatch):
    exact = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    monkeypatch.setattr(parity, "_exact", lambda layer, inputs: exact)
    site = SimpleNamespace(label="a", integer=True, output=SimpleNamespace(name="a/out"))
    engine, ours = {"a/out": (3 * exact).float().numpy()}, {"a": 2 * exact.float()}
    (found,) = parity.judge_layers([site], {}, engine, ours, lambda layer: (9, 1))
    assert (found.error, found.torch_error, found.codes, found.differing_codes) == (2.0, 1.0, 9, 1)


def test_one_layer_in_float_is_enough_to_fail():
    assert kernel_gate(KernelReport(operators={}, integer=3, float_layers=[])).passed
    gate = kernel_gate(KernelReport(operators={}, integer=3, float_layers=["a", "b"]))
    assert (gate.passed, gate.value) == (False, 2)
    assert "the first that does not: a" in gate.detail


def test_outputs_are_compared_bit_for_bit():
    expected = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    assert outputs_gate(expected, expected.clone()).passed
    assert outputs_gate(expected, torch.tensor([[-0.0, 1.0], [2.0, 3.0]])).value == 1
    assert outputs_gate(expected, torch.nextafter(expected, torch.tensor(9.0))).value == 4
    nan = torch.tensor([[0.0, 1.0], [2.0, float("nan")]])
    assert outputs_gate(nan, nan.clone()).value == 1  # NaN is equal to nothing
    assert outputs_gate(expected, expected[:1]).value == 4
    assert outputs_gate(expected, expected.double()).value == 4
