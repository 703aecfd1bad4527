"""Pass: activations are rounded to their grids where the products read them.

A grid narrower than INT8, or one that is not symmetric, is a Clip to its own range followed by INT8 with zero point
0: the same codes, in a form that engines without zero points take. No Clip stands where it could change nothing:
at an end where INT8 saturates, and below zero after a softmax. Engines fuse attention only without it.

Readers of one value with one quantizer share one pair, or have one each: ONNX Runtime multiplies integers only where
the pair has a single reader, and merges equal pairs before it looks. So separate pairs differ in their `axis`,
which means nothing beside one scale per tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporters.graph.passes.editing import Change, quantize_value
from exporters.graph.trace import FloatGraph, Product, ProductKind
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import INT8_MAX, INT8_MIN, ActivationQuantizer

__all__ = ["operand_sites", "quantize_activations"]

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
