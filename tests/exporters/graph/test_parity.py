"""What the comparisons catch: one wrong bias, one wrong code, one wrong scale, a float kernel, a wrong class."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_edits import drop, replace, store
from graph_edits import stored as store_new
from quantized_families import quantized_family
from vit_families import family, random_pixels

from exporters.graph.formats import OnnxFormat
from exporters.graph.gates import check_kernels, float_gate, parity_gates
from exporters.graph.layers import read_layers
from exporters.graph.parity import LayerParity, compare_layers, inputs_of, outputs_of
from exporters.graph.produce import quantize_graph
from exporters.graph.reopen import reopen_gates

NAME = "hf-vit"
# LINEAR and ATTENTION stand for the first of the model.
_BREAKS = {
    "code": ("LINEAR.weight", "weight codes differing"),
    "scale": ("LINEAR.weight_scale", "weight scales differing"),
    "quantizer": ("ATTENTION.q/scale", "activation quantizers differing"),
    "bound": ("ATTENTION.q/high", "activation quantizers differing"),
    "bias": ("LINEAR.bias", "float tensors differing"),
}


@pytest.fixture(scope="module")
def quantized():
    return quantized_family(NAME)


@pytest.fixture(scope="module")
def path(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    ir.save(quantize_graph(quantized, OnnxFormat.QDQ, NAME).model, path)
    return path


def _break(model: ir.Model, name: str) -> None:
    """One number of a stored tensor moves by the least it can."""
    value = model.graph.initializers[name]
    array = value.const_value.numpy().copy()
    flat = array.reshape(-1)
    flat[0] = flat[0] + 1 if array.dtype == np.int8 else np.nextafter(flat[0], np.float32(np.inf))
    value.const_value = ir.tensor(array, name=name)


@pytest.mark.parametrize("what", _BREAKS)
def test_the_smallest_change_of_a_stored_number_is_found(what, path, quantized):
    model = ir.load(path)
    name, gate = _BREAKS[what]
    linear = next(site.name for site in quantized.structure.linears if site.kind == "linear")
    _break(model, name.replace("LINEAR", linear).replace("ATTENTION", quantized.structure.attention_names[0]))
    failed = {g.name for g in reopen_gates(model, read_layers(model), quantized, OnnxFormat.QDQ) if not g.passed}
    assert failed == {gate}


def test_a_wrong_bias_fails_its_layer_and_no_other(path, quantized):
    model = ir.load(path)
    layers = read_layers(model)
    taps = quantized.taps(random_pixels(family(NAME), 2))
    inputs, outputs = inputs_of(quantized, layers, taps), outputs_of(layers, taps)
    wrong = next(layer for layer in layers if layer.bias is not None and layer.integer)
    shifted = {**outputs, wrong.label: outputs[wrong.label] + 1e-3}
    report = compare_layers(model, layers, inputs, shifted)
    assert [x.layer for x in report if x.torch_error > 1e-5] == [wrong.label]
    assert [gate.name for gate in parity_gates(report) if not gate.passed] == ["torch layer error"]


def test_nan_is_the_worst_error():
    layer = {"codes": 1, "differing_codes": 0, "integer": True, "torch_error": None}
    report = [LayerParity(layer="a", error=float("nan"), **layer), LayerParity(layer="b", error=1e-9, **layer)]
    assert [gate.name for gate in parity_gates(report) if not gate.passed] == ["integer layer error"]


def test_pairs_with_several_readers_are_found_to_run_in_float(quantized, tmp_path, monkeypatch):
    """Why every reader has a pair of its own: shared ones leave q, k and v in float, right and slow."""
    import exporters.graph.produce as produce

    original = produce.quantize_activations
    monkeypatch.setattr(produce, "quantize_activations", lambda *a, share: original(*a, share=True))
    path = tmp_path / "shared.onnx"
    ir.save(quantize_graph(quantized, OnnxFormat.QDQ, NAME).model, path)
    report = check_kernels(path, read_layers(ir.load(path)))
    sharing = [s.name for s in quantized.structure.linears if s.input_group != s.name]
    assert set(sharing) <= set(report.float_layers)


def _float_graph(quantized, change):
    model = ir.from_proto(onnx.load_model_from_string(quantize_graph(quantized, OnnxFormat.QDQ, NAME).float_bytes))
    change(model)
    return ir.to_proto(model).SerializeToString()


def test_the_float_graph_is_compared_before_it_is_quantized(quantized):
    pixels = random_pixels(family(NAME), 3)
    assert float_gate(_float_graph(quantized, lambda model: None), quantized, pixels).passed

    def relu(model):
        node = next(node for node in model.graph if node.op_type == "Gelu")
        node.op_type = "Relu"
        node.attributes.clear()

    assert not float_gate(_float_graph(quantized, relu), quantized, pixels).passed


def _copy(model, quantized):
    name, weight = next((n, w) for n, w in quantized.weights.items() if w.codes.dim() == 2)
    store_new(model, "copy", weight.dequantize().numpy().T.copy())
    return "float copies of quantized weights", name


def _norm(model, quantized):
    name = next(name for name in model.graph.initializers if "norm" in name)
    store(name, lambda array: array + np.float32(1e-7))(model)
    return "float tensors differing", name


def _bias(model, quantized):
    """A bias under another name, of another number."""
    add = next(node for node in model.graph if str(node.name).endswith("/Add"))
    index = next(i for i, value in enumerate(add.inputs) if value.const_value is not None)
    replace(add.name, index, add.inputs[index].const_value.numpy() + np.float32(1e-3))(model)
    return "float tensors differing", str(add.name).removesuffix("/Add") + ".bias"


def _no_bias(model, quantized):
    add = next(node for node in model.graph if str(node.name).endswith("/Add"))
    drop(add.name)(model)
    return "float tensors differing", str(add.name).removesuffix("/Add") + ".bias"


@pytest.mark.parametrize("change", [_copy, _norm, _bias, _no_bias])
def test_floats_biases_and_copies_are_found(change, path, quantized):
    model = ir.load(path)
    gate, _ = change(model, quantized)
    failed = {g.name for g in reopen_gates(model, read_layers(model), quantized, OnnxFormat.QDQ) if not g.passed}
    assert failed == {gate}


def test_sums_of_eight_bit_products_do_not_saturate():
    """CPUs without VNNI add pairs of them in 16 bits, and were off by 0.39 of the largest output here."""
    quantized, pixels = quantized_family("timm-vit", bits=8), 3 * random_pixels(family("timm-vit"), 4)
    model = quantize_graph(quantized, OnnxFormat.QDQ, "test").model
    layers, taps = read_layers(model), quantized.taps(pixels)
    for layer in compare_layers(model, layers, inputs_of(quantized, layers, taps)):
        assert layer.error <= layer.tolerance, layer
