"""Pass: weights become their codes and one DequantizeLinear.

Codes are stored as the engine multiplies them: transposed to (in, out) for MatMul, so that nothing stands between
DequantizeLinear and the product. Narrow integer codes lie in INT8: with INT4 beside INT8 activations no engine here
multiplies integers. INT4 is for weights beside float activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporters.graph.passes.editing import Change, add_initializer, as_array, insert, take_weight
from exporters.graph.trace import FloatGraph, Product, ProductKind
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BlockCodes
from fp8pipe.numerics.quantizers import WeightCodes

__all__ = ["fits_int4", "quantize_weights"]

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
