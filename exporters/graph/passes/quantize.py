"""Passes that replace weights by codes with a DequantizeLinear, and quantize the activations that layers read.

Codes are stored in the layout in which the engine multiplies them: transposed to (in, out) for MatMul, so that nothing
lies between DequantizeLinear and the MatMul. Integer codes of fewer bits are stored as INT8: no supported engine
multiplies INT4 weights by INT8 activations in integers. INT4 is for weights with float activations.

An activation grid that is narrower than INT8, or asymmetric, is a Clip to its own range followed by INT8 with zero
point 0: the same codes, in a form for engines without zero points. Bounds that would have no effect are left out: where
INT8 saturates anyway, and below zero after a softmax. Engines fuse attention only without a Clip.

Consumers of one value with the same quantizer either share one pair of QuantizeLinear and DequantizeLinear or have one
pair each. ONNX Runtime multiplies integers only if a pair has a single consumer, but it merges equal pairs before it
checks that. So separate pairs are given different values of `axis`, which has no meaning with one scale per tensor.

NVFP4 weights and activations have the form that TensorRT turns into four-bit matrix multiplications. A weight is stored
as E2M1 codes (in, out), E4M3 scales for blocks of 16 inputs, and a tensor scale. One DequantizeLinear converts the
scales to the graph's float type, a second one the codes. An activation is quantized by TRT_FP4DynamicQuantize, which
computes block scales at run time, and is dequantized in the same two steps. The operator is TensorRT's own (domain
`trt`), and FLOAT4E2M1 needs opset 23.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final, TypeVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporters.graph.formats import fits_int4
from exporters.graph.layers import DOMAIN, DYNAMIC_QUANTIZE
from exporters.graph.passes.editing import Change, add_initializer, as_array, insert, quantize_value, take_weight
from exporters.graph.trace import FloatGraph, Product, ProductKind
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BLOCK, BlockCodes, BlockQuantizer
from fp8pipe.numerics.quantizers import INT8_MAX, INT8_MIN, ActivationQuantizer, WeightCodes

FP4_OPSET: Final = 23
_IR_VERSION: Final = 11  # the first IR version with FLOAT4E2M1, for opset 23
_DEFAULT_AXIS: Final = 1
Q = TypeVar("Q", ActivationQuantizer, BlockQuantizer)


def quantize_weights(
    traced: FloatGraph,
    weights: Mapping[str, WeightCodes],
    *,
    int4: bool = False,
    block: int | None = None,
    zero_points: bool = False,
) -> Change:
    """Replace the stored operand of every layer in `weights` by codes; the float tensor is removed. In place.

    The graph must be without Gemm (see `split_gemms`). With `int4`, codes of at most 4 bits are stored as INT4; with
    `block`, every scale is repeated for each block of that many inputs, for engines that accept INT4 only in blocks. A
    layer whose number of inputs is not a multiple of `block`, and a convolution, is then stored as INT8. `zero_points`
    stores the zero points of INT8 codes, 0 for every channel: on CPUs whose INT8 kernels saturate, ONNX Runtime
    converts INT8 weights to UINT8, and gives missing zero points a wrong shape.
    """
    changed = []
    for product in traced.products:
        if product.kind in (ProductKind.LINEAR, ProductKind.PATCH) and product.name in weights:
            _replace(traced.model.graph, product, weights[product.name], int4, block, zero_points)
            changed.append(product.name)
    return Change("quantize_weights", tuple(changed))


def _replace(
    graph: ir.Graph, product: Product, weight: WeightCodes, int4: bool, block: int | None, zero_points: bool
) -> None:
    # Replace one layer's weight by stored codes and scales with a DequantizeLinear (see `quantize_weights`).
    codes, axis = as_array(weight.codes), 0
    if product.kind is ProductKind.LINEAR:
        codes, axis = np.ascontiguousarray(codes.reshape(len(codes), -1).T), 1  # an unfolded patch embedding has 4 axes
    scales, form = as_array(weight.scale.float()), {"axis": axis}
    fits = block is None or (product.kind is ProductKind.LINEAR and len(codes) % block == 0)
    if int4 and fits and fits_int4(weight):
        codes = codes.astype(ml_dtypes.int4)
        if block is not None:
            scales, form = np.repeat(scales[None], len(codes) // block, 0), {"axis": 0, "block_size": block}
    old, name = take_weight(graph, product), f"{product.name}.weight"
    operands = [add_initializer(graph, name, codes), add_initializer(graph, f"{name}_scale", scales)]
    if zero_points and codes.dtype == np.int8:
        operands.append(add_initializer(graph, f"{name}_zero_point", np.zeros(scales.shape, np.int8)))
    # The scales stay fp32 even in a float64 graph.
    dtype = ir.DataType.FLOAT if old.dtype == ir.DataType.DOUBLE else None
    names = f"{name}/DequantizeLinear", f"{name}/dequantized"
    value = insert(graph, product.node, "DequantizeLinear", operands, *names, old, dtype=dtype, attributes=form)
    product.node.replace_input_with(1, value)


def operand_sites(product: Product, structure: VitStructure) -> dict[int, str]:
    """The activation site of each operand of a layer, by its position."""
    if product.kind is ProductKind.QK:
        return {0: f"{product.name}.q", 1: f"{product.name}.k"}
    if product.kind is ProductKind.AV:
        return {0: f"{product.name}.probs", 1: f"{product.name}.v"}
    group = next(site.input_group for site in structure.linears if site.name == product.name)
    return {0: f"{group}.input"}


def _quantized_operands(
    traced: FloatGraph, structure: VitStructure, activations: Mapping[str, Q]
) -> Iterator[tuple[Product, int, str, ir.Value, Q]]:
    """Layer, operand position, site, value and quantizer of each operand to be quantized, in the graph's order."""
    for product in traced.in_graph_order():
        for position, site in operand_sites(product, structure).items():
            quantizer, value = activations.get(site), product.node.inputs[position]
            if quantizer is not None and value is not None:
                yield product, position, site, value, quantizer


def quantize_activations(
    traced: FloatGraph, structure: VitStructure, activations: Mapping[str, ActivationQuantizer], *, share: bool
) -> Change:
    """Insert `[Clip,] QuantizeLinear, DequantizeLinear` before every operand whose site has a quantizer, in place.

    With `share`, all consumers of one value with the same quantizer read one pair, named after the site; otherwise each
    has its own pair, named after the consumer from the second one on. The result lists the names of the pairs, in the
    graph's order.
    """
    pairs: dict[tuple[ir.Value, ActivationQuantizer], ir.Value] = {}
    readers: Counter[ir.Value] = Counter()
    changed = []
    for product, position, site, value, quantizer in _quantized_operands(traced, structure, activations):
        found = pairs.get((value, quantizer)) if share else None
        if found is None:
            first = not readers[value]
            name = site if first or product.kind is not ProductKind.LINEAR else f"{product.name}.input"
            found = _insert(traced.model.graph, product.node, value, quantizer, name, _axis(readers[value], value))
            pairs[value, quantizer] = found
            readers[value] += 1
            changed.append(name)
        product.node.replace_input_with(position, found)
    return Change("quantize_activations", tuple(changed))


def _axis(readers: int, value: ir.Value) -> int | None:
    """An axis that differs from those of the `readers` pairs of this value so far; None (the default) for the first."""
    rank = len(value.shape) if value.shape is not None else 1
    axes = [None, *(axis for axis in range(-rank, rank) if axis != _DEFAULT_AXIS)]
    return axes[readers % len(axes)]


def _insert(
    graph: ir.Graph, before: ir.Node, value: ir.Value, quantizer: ActivationQuantizer, site: str, axis: int | None
) -> ir.Value:
    """Insert `[Clip,] QuantizeLinear, DequantizeLinear` before a node, and return the dequantized value."""
    integer = quantizer.kind is Kind.INT
    return quantize_value(
        graph, before, value, site, quantizer.scale, np.dtype(np.int8 if integer else ml_dtypes.float8_e4m3fn),
        bounds=_bounds(quantizer, value) if integer else (None, None), axis=axis, to=ir.DataType.FLOAT,
    )  # fmt: skip


def _bounds(quantizer: ActivationQuantizer, value: ir.Value) -> tuple[np.float32 | None, np.float32 | None]:
    """The Clip bounds, the values of the smallest and largest code; None where a bound would have no effect."""
    scale, producer = np.float32(quantizer.scale), value.producer()
    never_negative = producer is not None and producer.op_type == "Softmax"
    low = None if quantizer.low == INT8_MIN or never_negative else np.float32(quantizer.low) * scale
    return low, None if quantizer.high == INT8_MAX else np.float32(quantizer.high) * scale


def raise_opset(model: ir.Model, *, activations: bool) -> Change:
    """Declare the opset and IR version that NVFP4 needs, in place. The operators in use mean the same in that opset.

    `activations`: whether TensorRT's own operator is used.
    """
    model.graph.opset_imports[""] = FP4_OPSET
    if activations:
        model.graph.opset_imports[DOMAIN] = 1
    model.ir_version = _IR_VERSION
    return Change("raise_opset", (str(FP4_OPSET), *((DOMAIN,) if activations else ())))


def quantize_block_weights(traced: FloatGraph, weights: Mapping[str, BlockCodes]) -> Change:
    """Replace the weight of every linear in `weights` by NVFP4 codes, in place; the graph must be without Gemm."""
    changed = []
    for product in traced.products:
        if product.kind is ProductKind.LINEAR and product.name in weights:
            _replace_blocks(traced.model.graph, product, weights[product.name])
            changed.append(product.name)
    return Change("quantize_block_weights", tuple(changed))


def _replace_blocks(graph: ir.Graph, product: Product, weight: BlockCodes) -> None:
    # Replace one linear's weight by stored NVFP4 codes, (in, out), and scales with both DequantizeLinear.
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
    """Quantize the inputs of linears whose site has a quantizer, in place; consumers of one value share the result."""
    found: dict[tuple[ir.Value, BlockQuantizer], ir.Value] = {}
    changed = []
    for product, position, site, value, quantizer in _quantized_operands(traced, structure, activations):
        if (value, quantizer) not in found:
            found[value, quantizer] = _round(traced.model.graph, product.node, value, quantizer, site)
            changed.append(site)
        product.node.replace_input_with(position, found[value, quantizer])
    return Change("quantize_block_activations", tuple(changed))


def _round(graph: ir.Graph, before: ir.Node, value: ir.Value, quantizer: BlockQuantizer, site: str) -> ir.Value:
    # Insert a TRT_FP4DynamicQuantize and both DequantizeLinear; returns the dequantized value.
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
    """Dequantize codes to float32: first the block scales by the tensor scale, then the codes."""
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
