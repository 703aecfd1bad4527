"""The graph that speed is measured against computes the quantized weights, and rounds no activation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from quantized_families import quantized_family, storable

from exporters.graph.runtime import open_session, run
from exporters.tensorrt.graph import in_format, typed_graph
from exporters.tensorrt.half import dequantize_graph
from exporters.tensorrt.target import TrtFormat
from fp8pipe.numerics.kinds import Kind


@pytest.mark.parametrize(
    ("kind", "bits", "format"),
    [(Kind.E4M3, 8, TrtFormat.FP8), (Kind.INT, 8, TrtFormat.INT8), (Kind.INT, 4, TrtFormat.INT4_WEIGHT_ONLY)],
)
def test_it_is_the_torch_model_with_quantized_weights_alone(tmp_path, kind, bits, format):
    quantized = storable(quantized_family("timm-vit", bits=bits, kind=kind))
    model = typed_graph(in_format(quantized, format), format, "test").model
    dequantizers = sum(node.op_type == "DequantizeLinear" for node in model.graph)
    assert dequantize_graph(model) == dequantizers > 0
    assert not [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Clip")]
    ir.save(model, tmp_path / "plain.onnx")
    pixels = torch.randn(3, 3, *map(int, model.graph.inputs[0].shape[2:]), generator=torch.Generator().manual_seed(0))
    (found,) = run(open_session(tmp_path / "plain.onnx", optimize=False), {"pixels": pixels.numpy()}).values()
    with torch.no_grad():
        expected = in_format(quantized, TrtFormat.INT8_WEIGHT_ONLY)(pixels).numpy()
    # Two orders of float32 sums, a few layers deep.
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
