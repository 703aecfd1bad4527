"""Passes: weights become their codes and one DequantizeLinear, activations are rounded where the products read them.

Codes are stored as the engine multiplies them: transposed to (in, out) for MatMul, so that nothing stands between
DequantizeLinear and the product. Narrow integer codes lie in INT8: with INT4 beside INT8 activations no engine here
multiplies integers. INT4 is for weights beside float activations.

An activation's grid narrower than INT8, or one that is not symmetric, is a Clip to its own range followed by INT8 with
zero point 0: the same codes, in a form that engines without zero points take. No Clip stands where it could change
nothing: at an end where INT8 saturates, and below zero after a softmax. Engines fuse attention only without it.

Readers of one value with one quantizer share one pair, or have one each: ONNX Runtime multiplies integers only where
the pair has a single reader, and merges equal pairs before it looks. So separate pairs differ in their `axis`,
which means nothing beside one scale per tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporters.graph.passes.editing import Change, add_initializer, as_array, insert, quantize_value, take_weight
from exporters.graph.trace import FloatGraph, Product, ProductKind
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BlockCodes
from fp8pipe.numerics.quantizers import INT8_MAX, INT8_MIN, ActivationQuantizer, WeightCodes

_INT4_BITS: Final = 4


def fits_int4(weight: WeightCodes | BlockCodes) -> bool:
    """Whether INT4 holds the codes."""
    return weight.kind is Kind.INT and weight.bits <= _INT4_BITS


def quantize_weights(
    traced: FloatGraph,
    weights: Mapping[str, WeightCodes],
    *,
    int4: bool = False,
    block: int | None = None,
    zero_points: bool = False,
) -> Change:
    """Replace the stored operand of every layer of `weights`; the float tensor is removed.

    Args:
        traced: without Gemm (see `split_gemms`); changed in place.
        weights: codes by layer.
        int4: store codes of at most 4 bits as INT4; wider ones stay INT8.
        block: with `int4`, repeat every scale for each so many inputs, for engines that take INT4 in blocks alone; a
            layer whose inputs are no multiple of it, and a convolution, is stored in INT8.
        zero_points: store the zero points of INT8 codes, 0 for every channel, instead of leaving them out. ONNX Runtime
            turns INT8 weights into UINT8 for CPUs whose INT8 products saturate, and makes a wrong shape up otherwise.
    """
    graph = traced.model.graph
    changed = []
    for product in traced.products:
        if product.kind in (ProductKind.LINEAR, ProductKind.PATCH) and product.name in weights:
            _replace(graph, product, weights[product.name], int4, block, zero_points)
            changed.append(product.name)
    return Change("quantize_weights", tuple(changed))


def _replace(
    graph: ir.Graph, product: Product, weight: WeightCodes, int4: bool, block: int | None, zero_points: bool
) -> None:
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
    # The scales are fp32 in a float64 graph, too.
    dtype = ir.DataType.FLOAT if old.dtype == ir.DataType.DOUBLE else None
    names = f"{name}/DequantizeLinear", f"{name}/dequantized"
    value = insert(graph, product.node, "DequantizeLinear", operands, *names, old, dtype=dtype, attributes=form)
    product.node.replace_input_with(1, value)


_DEFAULT_AXIS = 1


def operand_sites(product: Product, structure: VitStructure) -> dict[int, str]:
    """The activation site of each operand of a product, by its position."""
    if product.kind is ProductKind.QK:
        return {0: f"{product.name}.q", 1: f"{product.name}.k"}
    if product.kind is ProductKind.AV:
        return {0: f"{product.name}.probs", 1: f"{product.name}.v"}
    group = next(site.input_group for site in structure.linears if site.name == product.name)
    return {0: f"{group}.input"}


def quantize_activations(
    traced: FloatGraph, structure: VitStructure, activations: Mapping[str, ActivationQuantizer], *, share: bool
) -> Change:
    """Insert `[Clip,] QuantizeLinear, DequantizeLinear` before every operand whose site has a quantizer.

    `share`: one pair for all readers of one value with one quantizer; otherwise one each, named after it. The
    change names the pairs, in the graph's order.
    """
    pairs: dict[tuple[ir.Value, ActivationQuantizer], ir.Value] = {}
    readers: Counter[ir.Value] = Counter()
    changed = []
    for product in traced.in_graph_order():
        for position, site in operand_sites(product, structure).items():
            quantizer, value = activations.get(site), product.node.inputs[position]
            if quantizer is None or value is None:
                continue
            found = pairs.get((value, quantizer)) if share else None
            if found is None:
                first = not readers[value]
                name = site if first or product.kind is not ProductKind.LINEAR else f"{product.name}.input"
                axis = _axis(readers[value], value)
                found = _insert(traced.model.graph, product.node, value, quantizer, name, axis)
                pairs[value, quantizer] = found
                readers[value] += 1
                changed.append(name)
            product.node.replace_input_with(position, found)
    return Change("quantize_activations", tuple(changed))


def _axis(readers: int, value: ir.Value) -> int:
    """An axis that no earlier pair of this value has; the default for the first."""
    rank = len(value.shape) if value.shape is not None else 1
    axes = [_DEFAULT_AXIS, *(axis for axis in range(-rank, rank) if axis != _DEFAULT_AXIS)]
    return axes[readers % len(axes)]


def _insert(
    graph: ir.Graph, before: ir.Node, value: ir.Value, quantizer: ActivationQuantizer, site: str, axis: int
) -> ir.Value:
    """The dequantized form of `value`."""
    integer = quantizer.kind is Kind.INT
    return quantize_value(
        graph, before, value, site, quantizer.scale, np.dtype(np.int8 if integer else ml_dtypes.float8_e4m3fn),
        bounds=_bounds(quantizer, value) if integer else (None, None),
        axis=None if axis == _DEFAULT_AXIS else axis, to=ir.DataType.FLOAT,
    )  # fmt: skip


def _bounds(quantizer: ActivationQuantizer, value: ir.Value) -> tuple[np.float32 | None, np.float32 | None]:
    """Clip's bounds: the values of the smallest and largest code; none where INT8 itself saturates there."""
    scale, producer = np.float32(quantizer.scale), value.producer()
    never_negative = producer is not None and producer.op_type == "Softmax"
    low = None if quantizer.low == INT8_MIN or never_negative else np.float32(quantizer.low) * scale
    return low, None if quantizer.high == INT8_MAX else np.float32(quantizer.high) * scale
