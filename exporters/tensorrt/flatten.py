"""Pass: linears of four axes become ones of three, for TensorRT's dynamic quantizer, which takes no more.

Models that keep patches as an image (Swin of timm) multiply `(N, rows, columns, C)`. The axes between the first and the
last are laid together before the product and apart again behind its bias: the same numbers, in the same order. Windows
are cut from images, so the first axis may be dynamic; the others are constants.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from exporters.graph.passes import Change
from exporters.graph.passes.tensors import add_initializer
from exporters.graph.trace import PlainGraph, Product, ProductKind

__all__ = ["flatten_products"]

_MOST_AXES = 3


def flatten_products(plain: PlainGraph, names: Collection[str]) -> Change:
    """Reshape around the linears of `names` that have more than three axes; in place.

    Args:
        plain: without Gemm (see `split_gemms`), before anything is quantized.
        names: linears whose inputs will be quantized in blocks.

    Returns:
        The names of the linears that were changed.
    """
    flat: dict[ir.Value, ir.Value] = {}
    changed = []
    for product in plain.products:
        if product.kind is ProductKind.LINEAR and product.name in names and _axes(product.node.inputs[0]) > _MOST_AXES:
            _flatten(plain.model.graph, product, flat)
            changed.append(product.name)
    return Change("flatten_products", tuple(changed))


def _axes(value: ir.Value | None) -> int:
    return 0 if value is None or value.shape is None else len(value.shape)


def _flatten(graph: ir.Graph, product: Product, flat: dict[ir.Value, ir.Value]) -> None:
    node, value = product.node, product.node.inputs[0]
    assert value is not None
    assert value.shape is not None
    first, *middle, width = value.shape
    sides = [side for side in middle if isinstance(side, int)]
    if len(sides) != len(middle) or not isinstance(width, int):
        raise ValueError(f"{product.name} has dynamic sides besides its first: {value.shape}")
    tokens = math.prod(sides)
    if value not in flat:  # readers of one value go on sharing one quantizer
        reshape = _reshape(graph, value, f"{product.name}/tokens", (0, tokens, width), ir.Shape([first, tokens, width]))
        graph.insert_before(node, reshape)
        flat[value] = reshape.outputs[0]
    node.replace_input_with(0, flat[value])
    last = _bias(node) or node
    result, weight = last.outputs[0], node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    out = int(weight.shape[-1])  # type: ignore[arg-type]
    shape, readers = result.shape, list(result.uses())
    node.outputs[0].shape = result.shape = ir.Shape([first, tokens, out])
    image = _reshape(graph, result, f"{product.name}/image", (0, *sides, out), shape)
    graph.insert_after(last, image)
    for reader, index in readers:
        reader.replace_input_with(index, image.outputs[0])


def _bias(node: ir.Node) -> ir.Node | None:
    """The Add of a stored vector behind a product, if it is all that reads it."""
    uses = node.outputs[0].uses()
    if len(uses) != 1:
        return None
    ((add, index),) = uses
    other = add.inputs[1 - index] if add.op_type == "Add" else None
    stored = other is not None and other.const_value is not None and len(other.const_value.shape) == 1
    return add if stored else None


def _reshape(graph: ir.Graph, value: ir.Value, name: str, sides: tuple[int, ...], shape: ir.Shape | None) -> ir.Node:
    """A node that is in no graph yet; 0 keeps a side."""
    stored = add_initializer(graph, f"{name}/shape", np.array(sides, np.int64))
    node = ir.node("Reshape", [value, stored], name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, value.type, shape
    return node
