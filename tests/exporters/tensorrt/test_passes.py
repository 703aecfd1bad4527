"""Passes for TensorRT's graphs, against the graph without them: same codes, same numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from quantized_families import quantized_family, storable_graph
from vit_families import family, random_pixels

from exporters.graph.formats import OnnxFormat
from exporters.graph.passes.products import unfold_patches
from exporters.graph.produce import float_model, quantize_graph
from exporters.graph.runtime import open_session, run
from exporters.graph.trace import trace_float
from exporters.tensorrt.lint import lint_typed
from fp8pipe.numerics.kinds import Kind


def outputs(model: ir.Model, name: str) -> np.ndarray:
    session = open_session(ir.to_proto(model).SerializeToString(), optimize=False)
    return run(session, {"pixels": random_pixels(family(name), 3).numpy()})["logits"]


@pytest.mark.parametrize("name", ["timm-vit", "timm-swin", "hf-vit", "hf-clip"])
def test_an_unfolded_patch_embedding_computes_the_same(name):
    quantized = quantized_family(name)
    traced = trace_float(float_model(quantized), quantized.structure)
    expected = outputs(traced.model, name)
    change = unfold_patches(traced)
    assert len(change.changed) == 1
    assert not [node for node in traced.model.graph if node.op_type == "Conv"]
    # The same products, added in another order.
    np.testing.assert_allclose(outputs(traced.model, name), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", [Kind.INT, Kind.E4M3])
def test_queries_are_clipped_to_the_values_of_their_codes(kind):
    model = storable_graph("timm-vit", kind)
    queries = [n for n in model.graph if n.op_type == "QuantizeLinear" and n.name.endswith(".q/QuantizeLinear")]
    assert queries
    for node in queries:
        clip = node.inputs[0].producer()
        assert clip.op_type == "Clip"
        if kind is Kind.E4M3:
            scale = node.inputs[1].const_value.numpy()
            assert clip.inputs[1].const_value.numpy() == -448 * scale
            assert clip.inputs[2].const_value.numpy() == 448 * scale


@pytest.mark.parametrize("kind", [Kind.INT, Kind.E4M3])
def test_the_whole_graph_is_the_function_of_the_other_export(kind):
    """ONNX Runtime's graph has a quantizer a reader and a convolution; the codes of every layer are the same."""
    quantized = quantized_family("timm-vit", bits=8 if kind is Kind.E4M3 else 4, kind=kind)
    other = quantize_graph(quantized, OnnxFormat.QDQ, "test").model
    typed = storable_graph("timm-vit", kind)
    stored = {n: v.const_value.numpy() for n, v in typed.graph.initializers.items()}
    for name, weight in quantized.weights.items():
        codes = weight.codes.reshape(len(weight.codes), -1).T.contiguous().view(torch.uint8).numpy()
        assert np.array_equal(stored[f"{name}.weight"].view(np.uint8), codes)
    sites = {n.name for n in other.graph if n.op_type == "QuantizeLinear"}
    assert {n.name for n in typed.graph if n.op_type == "QuantizeLinear"} <= sites


def test_keys_and_values_of_one_product_keep_its_codes():
    """A pooling attention makes queries of another tensor: two quantizers would move into the product of the others."""
    model = storable_graph("timm-siglip", Kind.E4M3)
    clipped = [
        n.name for n in model.graph if n.op_type == "QuantizeLinear" and n.inputs[0].producer().op_type == "Clip"
    ]
    assert "attn_pool.k/QuantizeLinear" in clipped
    assert "attn_pool.v/QuantizeLinear" not in clipped
    assert lint_typed(model).errors() == ()
