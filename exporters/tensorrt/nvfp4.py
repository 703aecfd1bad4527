"""Passes: NVFP4 weights and activations, in the form from which TensorRT makes four-bit products.

A weight is stored as E2M1 codes (in, out), E4M3 scales of blocks of 16 inputs, and a tensor scale. One DequantizeLinear
turns the scales into the graph's float type, a second one the codes. An activation is rounded by
TRT_FP4DynamicQuantize, which makes block scales while it runs, and is dequantized in the same two steps. The operator
is TensorRT's own (domain `trt`), and FLOAT4E2M1 wants opset 23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporters.graph.layers import DOMAIN, DYNAMIC_QUANTIZE
from exporters.graph.passes.editing import Change, add_initializer, as_array, insert, take_weight
from exporters.graph.passes.quantize import operand_sites
from exporters.graph.trace import FloatGraph, Product, ProductKind
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.nvfp4 import BLOCK, BlockCodes, BlockQuantizer

FP4_OPSET: Final = 23
_IR_VERSION: Final = 11  # the first with FLOAT4E2M1 in opset 23


def raise_opset(model: ir.Model, *, activations: bool) -> Change:
    """Declare what NVFP4 needs; in place. What the graph holds before has the same meaning in opset 21 and 23.

    `activations`: whether TensorRT's own operator is used.
    """
    model.graph.opset_imports[""] = FP4_OPSET
    if activations:
        model.graph.opset_imports[DOMAIN] = 1
    model.ir_version = _IR_VERSION
    return Change("raise_opset", (str(FP4_OPSET), *((DOMAIN,) if activations else ())))


def quantize_block_weights(traced: FloatGraph, weights: Mapping[str, BlockCodes]) -> Change:
    """Replace the stored operand of every linear of `weights`; the float tensor is removed. In place, without Gemm."""
    changed = []
    for product in traced.products:
        if product.kind is ProductKind.LINEAR and product.name in weights:
            _replace(traced.model.graph, product, weights[product.name])
            changed.append(product.name)
    return Change("quantize_block_weights", tuple(changed))


def _replace(graph: ir.Graph, product: Product, weight: BlockCodes) -> None:
    old, name = take_weight(graph, product), f"{product.name}.weight"
    codes = np.ascontiguousarray(weight.codes.numpy().T).view(ml_dtypes.float4_e2m1fn)
    blocks = np.ascontiguousarray(as_array(weight.scales.block).T)
    stored = (
        add_initializer(graph, name, codes),
        add_initializer(graph, f"{name}_block_scale", blocks),
        add_initializer(graph, f"{name}_tensor_scale", np.array(weight.scales.tensor, np.float32)),
    )
    product.node.replace_input_with(1, _dequantize(graph, product.node, stored, name, old, axis=0))


def quantize_block_activations(
    traced: FloatGraph, structure: VitStructure, activations: Mapping[str, BlockQuantizer]
) -> Change:
    """Round the inputs of linears whose site has a quantizer, in place; readers of one value share it."""
    graph = traced.model.graph
    found: dict[tuple[ir.Value, BlockQuantizer], ir.Value] = {}
    changed = []
    for product in traced.in_graph_order():
        for position, site in operand_sites(product, structure).items():
            quantizer, value = activations.get(site), product.node.inputs[position]
            if quantizer is None or value is None:
                continue
            if (value, quantizer) not in found:
                found[value, quantizer] = _round(graph, product.node, value, quantizer, site)
                changed.append(site)
            product.node.replace_input_with(position, found[value, quantizer])
    return Change("quantize_block_activations", tuple(changed))


def _round(graph: ir.Graph, before: ir.Node, value: ir.Value, quantizer: BlockQuantizer, site: str) -> ir.Value:
    scale = add_initializer(graph, f"{site}/tensor_scale", np.array(quantizer.tensor_scale, np.float32))
    attributes = {"axis": -1, "block_size": BLOCK, "scale_type": int(ir.DataType.FLOAT8E4M3FN)}
    dynamic = ir.node(
        DYNAMIC_QUANTIZE, [value, scale], attributes, domain=DOMAIN, num_outputs=2, name=f"{site}/DynamicQuantize"
    )
    codes, blocks = dynamic.outputs
    codes.name, codes.type, codes.shape = f"{site}/codes", ir.TensorType(ir.DataType.FLOAT4E2M1), value.shape
    blocks.name, blocks.type = f"{site}/block_scales", ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    graph.insert_before(before, dynamic)
    return _dequantize(graph, before, (codes, blocks, scale), site, value, axis=-1)


def _dequantize(
    graph: ir.Graph, before: ir.Node, stored: tuple[ir.Value, ir.Value, ir.Value], name: str, like: ir.Value, axis: int
) -> ir.Value:
    """The float32 value of codes, block scales and tensor scale: block scales are dequantized first, then codes."""
    codes, blocks, scale = stored
    scales = f"{name}/scales"
    inner = insert(
        graph, before, "DequantizeLinear", [blocks, scale], f"{scales}/DequantizeLinear", scales, None,
        dtype=ir.DataType.FLOAT,
    )  # fmt: skip
    return insert(
        graph, before, "DequantizeLinear", [codes, inner], f"{name}/DequantizeLinear", f"{name}/dequantized", like,
        dtype=ir.DataType.FLOAT, attributes={"axis": axis, "block_size": BLOCK},
    )  # fmt: skip
