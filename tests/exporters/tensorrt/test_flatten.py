"""Linears of four axes, flattened: the float graph computes the same, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized_families import quantized_family
from vit_families import family, random_pixels

from exporters.graph.passes.products import split_gemms
from exporters.graph.produce import float_model
from exporters.graph.runtime import open_session, run
from exporters.graph.trace import ProductKind, trace_float
from exporters.tensorrt.graph import flatten_products, typed_graph
from exporters.tensorrt.target import TrtFormat
from fp8pipe.numerics.kinds import Kind


def outputs(model: ir.Model, name: str) -> np.ndarray:
    session = open_session(ir.to_proto(model).SerializeToString(), optimize=False)
    return run(session, {"pixels": random_pixels(family(name), 3).numpy()})["logits"]


@pytest.mark.parametrize("name", ["timm-swin", "timm-swin-wide"])
def test_the_flattened_graph_computes_the_same(name):
    """With a batch of three, where two were traced."""
    quantized = quantized_family(name)
    traced = trace_float(float_model(quantized), quantized.structure)
    split_gemms(traced)
    expected = outputs(traced.model, name)
    wide = {p.name for p in traced.products if p.kind is ProductKind.LINEAR and len(p.node.inputs[0].shape) > 3}
    assert wide
    change = flatten_products(traced, quantized.structure.linear_names)
    assert set(change.changed) == wide
    linears = [product.node for product in traced.products if product.kind is ProductKind.LINEAR]
    assert max(len(node.inputs[0].shape) for node in linears) == 3
    # Sums over the same axis; a runtime may order them otherwise for another shape.
    np.testing.assert_allclose(outputs(traced.model, name), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_models_of_three_axes_are_left_alone():
    quantized = quantized_family("timm-vit")
    traced = trace_float(float_model(quantized), quantized.structure)
    split_gemms(traced)
    count = len(traced.model.graph)
    assert flatten_products(traced, quantized.structure.linear_names).changed == ()
    assert len(traced.model.graph) == count


def test_every_dynamic_quantizer_reads_at_most_three_axes():
    model = typed_graph(quantized_family("timm-swin", kind=Kind.NVFP4), TrtFormat.NVFP4, "test").model
    values = [node.inputs[0] for node in model.graph if node.op_type == "TRT_FP4DynamicQuantize"]
    assert values
    assert all(len(value.shape) <= 3 for value in values)
