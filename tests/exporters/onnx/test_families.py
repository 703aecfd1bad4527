"""Every family: all its products found, its numbers in the file, its layers on integers, its results those of torch."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from breadth import only_long
from quantized_families import quantized_family
from vit_families import NAMES, family, random_pixels

from exporters.graph.formats import OnnxFormat
from exporters.graph.gates import check_kernels
from exporters.graph.layers import read_layers
from exporters.graph.parity import compare_layers, inputs_of, outputs_of
from exporters.graph.produce import quantize_graph
from exporters.graph.reopen import reopen_gates
from exporters.graph.runtime import open_session, run
from exporters.graph.trace import ProductKind

# Tracing takes seconds a model. These have every kind of product, mask, window, pooling and sharing; the others are
# their siblings, and run with the slow tests; the widest of them in a long run.
FIRST = {
    "timm-vit", "timm-beit", "timm-eva02-split", "timm-siglip", "timm-swin", "hf-vit", "hf-dinov2-other-size",
    "hf-deit-distilled", "hf-swin-wide",
}  # fmt: skip


def _marks(name):
    if name in FIRST:
        return ()
    return only_long if "swin" in name else pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param(n, marks=_marks(n)) for n in NAMES])
def test_the_exported_graph_computes_what_the_quantized_model_computes(name, tmp_path):
    quantized = quantized_family(name)
    path = tmp_path / "model.onnx"
    ir.save(quantize_graph(quantized, OnnxFormat.QDQ, name).model, path)
    model = ir.load(path)
    layers = read_layers(model)
    structure = quantized.structure
    assert {x.name for x in layers if x.kind in (ProductKind.LINEAR, ProductKind.PATCH)} == set(structure.linear_names)
    for kind in (ProductKind.QK, ProductKind.AV):
        assert [x.name for x in layers if x.kind is kind] == list(structure.attention_names)
    assert not any(node.op_type == "Gemm" for node in model.graph)
    assert [gate for gate in reopen_gates(model, layers, quantized, OnnxFormat.QDQ) if not gate.passed] == []
    _check_layers(quantized, model, layers, random_pixels(family(name), 3))
    kernels = check_kernels(path, layers)
    assert kernels.float_layers == []
    assert kernels.integer == len(layers) - 1  # all but the patch embedding, a convolution
    _check_batches(quantized, path, name)


def _check_layers(quantized, model, layers, pixels):
    taps = quantized.taps(pixels)
    report = compare_layers(model, layers, inputs_of(quantized, layers, taps), outputs_of(layers, taps))
    assert all(layer.codes for layer in report)
    assert sum(layer.differing_codes for layer in report) == 0
    for layer in report:
        assert layer.error <= layer.tolerance, layer
        assert layer.torch_error <= 1e-5, layer


def _check_batches(quantized, path, name):
    """One image and five, in a graph that was traced with two."""
    session = open_session(path)
    for count in (1, 5):
        pixels = random_pixels(family(name), count, seed=count)
        with torch.no_grad():
            expected = quantized(pixels)
        found = torch.from_numpy(run(session, {"pixels": pixels.numpy()})["logits"])
        assert found.shape == expected.shape
        # Equal up to rounding, unless that moves a code across a border (two levels of 4 bits are far apart).
        assert (found - expected).norm() <= 0.2 * expected.norm()
