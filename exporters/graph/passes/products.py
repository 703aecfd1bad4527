"""Passes that turn layers into plain MatMuls, name them, and remove metadata of the exporting machine.

`split_gemms`: engines run a quantized MatMul in integers and add a float bias afterwards; a quantized Gemm must have a
quantized bias, or it does not run in integers at all. So every bias becomes a separate Add.

`unfold_patches`: the stride of a patch embedding's convolution equals its kernel size, so every patch is multiplied
once by the same matrix. Engines have few kernels for such convolutions (for FP8 with a 14 x 14 kernel, none: the
builder silently uses half precision), but all kernels for matrix multiplications. Pixels are rearranged before their
quantizer, which is elementwise: the codes are the same in another order.

`name_products`: comparisons, engine reports and readers of the exported graph find a layer by the name of its node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.graph.passes.editing import Change, add_initializer, drop_unused, hand_over, insert, stored_bias
from exporters.graph.trace import SUFFIXES, FloatGraph, Product, ProductKind, stored_array
from fp8pipe.core.version import __version__


def split_gemms(traced: FloatGraph) -> Change:
    """Replace every Gemm of a layer by MatMul and Add, in place."""
    changed = []
    for product in traced.products:
        if product.node.op_type == "Gemm":
            product.node = _split_gemm(traced.model.graph, product)
            changed.append(product.name)
    return Change("split_gemms", tuple(changed))


def _split_gemm(graph: ir.Graph, product: Product) -> ir.Node:
    # Replace one Gemm by a MatMul and, if it has a bias, an Add; returns the MatMul. A weight that Gemm would transpose
    # is stored transposed instead.
    gemm = product.node
    attributes = gemm.attributes
    unscaled = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
    if not unscaled or attributes.get_int("transA", 0) != 0:
        raise ValueError(f"{gemm.name} does more than multiply and add a bias: alpha, beta or transA is set")
    x, weight = gemm.inputs[0], gemm.inputs[1]
    assert weight is not None
    stored = weight
    if attributes.get_int("transB", 0):
        weight = add_initializer(graph, f"{product.name}.weight_t", np.ascontiguousarray(stored_array(weight).T))
    output = gemm.outputs[0]
    matmul = ir.node("MatMul", [x, weight], name=gemm.name)
    matmul.metadata_props.update(gemm.metadata_props)
    nodes = [matmul]
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        nodes.append(ir.node("Add", [matmul.outputs[0], gemm.inputs[2]]))
    for node in nodes:
        node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
    graph.insert_before(gemm, nodes)
    hand_over(output, nodes[-1].outputs[0])
    graph.remove(gemm, safe=True)
    drop_unused(graph, stored)
    return matmul


def unfold_patches(traced: FloatGraph) -> Change:
    """Replace the convolution of every patch embedding by a MatMul of rearranged pixels where possible, in place.

    One with overlapping patches, padding, dilation or groups stays a convolution.
    """
    changed = []
    for product in traced.products:
        if product.kind is ProductKind.PATCH and _unfoldable(product.node):
            product.kind, product.node = ProductKind.LINEAR, _unfold(traced.model.graph, product)
            changed.append(product.name)
    return Change("unfold_patches", tuple(changed))


def _unfoldable(conv: ir.Node) -> bool:
    # Whether the kernel tiles the image: equal stride, no padding, dilation or groups, and image sides divisible.
    weight = conv.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    kernel = tuple(int(side) for side in weight.shape[2:])  # type: ignore[arg-type]
    attributes = conv.attributes
    image = conv.inputs[0].shape[2:] if conv.inputs[0] is not None and conv.inputs[0].shape is not None else ()
    sides = [side if isinstance(side, int) else 0 for side in image]
    return (
        tuple(attributes.get_ints("strides", (1, 1))) == kernel
        and not any(attributes.get_ints("pads", (0, 0, 0, 0)))
        and set(attributes.get_ints("dilations", (1, 1))) == {1}
        and attributes.get_int("group", 1) == 1
        and len(sides) == len(kernel) == 2
        and all(side and side % step == 0 for side, step in zip(sides, kernel, strict=True))
    )


def _unfold(graph: ir.Graph, product: Product) -> ir.Node:
    """Replace a convolution, and return the new MatMul.

    Pixels are rearranged to (N, patches, channels * height * width) before it; the bias and a transpose back to the
    convolution's layout (N, out, rows, columns) follow it.
    """
    conv = product.node
    pixels, weight = conv.inputs[0], conv.inputs[1]
    assert pixels is not None
    assert pixels.shape is not None
    assert weight is not None
    array = stored_array(weight)
    out, channels, high, wide = array.shape
    rows, columns = int(pixels.shape[2]) // high, int(pixels.shape[3]) // wide  # type: ignore[arg-type]
    name = product.name
    batch, places, inputs = pixels.shape[0], rows * columns, channels * high * wide

    def add(
        op: str, operands: Sequence[ir.Value | None], what: str, sides: Sequence[Any] | None, **form: Any
    ) -> ir.Value:
        """Insert a node `NAME/what` before the convolution, and return its output, of the convolution's type."""
        called = f"{name}/{what}"
        value = insert(graph, conv, op, operands, called, called, conv.outputs[0], attributes=form)
        value.shape = None if sides is None else ir.Shape(sides)
        return value

    def reshape(value: ir.Value, what: str, *sides: int) -> ir.Value:
        """Reshape all axes but the batch."""
        stored = add_initializer(graph, f"{name}/{what}/shape", np.array((0, *sides), np.int64))
        return add("Reshape", [value, stored], what, (batch, *sides))

    split = reshape(pixels, "split", channels, rows, high, columns, wide)
    gathered = batch, rows, columns, channels, high, wide
    patches = reshape(add("Transpose", [split], "gather", gathered, perm=(0, 2, 4, 1, 3, 5)), "patches", places, inputs)
    matrix = add_initializer(graph, f"{name}.weight_t", np.ascontiguousarray(array.reshape(out, -1).T))
    result = add("MatMul", [patches, matrix], "product", None)
    matmul = result.producer()
    assert matmul is not None
    matmul.metadata_props.update(conv.metadata_props)
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        result = add("Add", [result, conv.inputs[2]], "biased", None)
    result.shape = ir.Shape([batch, places, out])
    channels_first = add("Transpose", [result], "channels", (batch, out, places), perm=(0, 2, 1))
    image = reshape(channels_first, "image", out, rows, columns)
    image.shape = conv.outputs[0].shape
    hand_over(conv.outputs[0], image)
    graph.remove(conv, safe=True)
    drop_unused(graph, weight)
    return matmul


def name_products(traced: FloatGraph) -> Change:
    """Name matrix multiplications and their bias after their layers: `NAME/MatMul`, `NAME/Add`, `NAME/qk`, ..."""
    for product in traced.products:
        product.node.name = product.name + SUFFIXES[product.kind]
        output = product.node.outputs[0]
        if product.kind is ProductKind.LINEAR:
            add = stored_bias(product.node)
            if add is not None:
                add.name = f"{product.name}/Add"
                _name(output, f"{product.name}/product")
                output = add.outputs[0]
        suffix = "/logits" if product.kind is ProductKind.QK else "/output"
        _name(output, product.name + suffix)
    return Change("name_products", tuple(product.name for product in traced.products))


def strip_metadata(model: ir.Model) -> Change:
    """Remove the exporter's metadata (it contains paths of this machine), unused nodes and unused tensors, in place."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    stripped = []
    for node in model.graph:
        if node.metadata_props or node.doc_string:
            stripped.append(node.name or "")
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for holder in (model, model.graph):
        holder.metadata_props.clear()
        holder.doc_string = None
    RemoveUnusedNodesPass()(model)
    for name in list(model.graph.initializers):
        if name.startswith("model."):
            model.graph.initializers[name].name = name.removeprefix("model.")
    model.producer_name, model.producer_version = "fp8pipe", __version__
    model.graph.name = "vision_transformer"
    return Change("strip_metadata", tuple(stripped))


def _name(value: ir.Value, name: str) -> None:
    """Rename a value, unless it is an output of the whole graph."""
    if not value.is_graph_output():
        value.name = name
