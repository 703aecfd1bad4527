"""Helpers for passes: their result type, and graph edits that several of them make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.graph.trace import Product


@dataclass(frozen=True, slots=True)
class Change:
    """The result of one pass: what it changed, for counts, reports and checks."""

    name: str  # name of the pass
    changed: tuple[str, ...]  # names of the layers, sites or nodes that it rewrote, in order


def add_initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """Add a stored tensor from a numpy array (of an ml_dtypes type for FP8, FP4 or INT4), unless it exists already.

    Raises:
        ValueError: another tensor has that name.
    """
    tensor = ir.tensor(array, name=name)
    existing = graph.initializers.get(name)
    if existing is not None:
        stored = existing.const_value
        alike = stored is not None and (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
        if stored is None or not alike or stored.tobytes() != tensor.tobytes():
            raise ValueError(f"the graph has another tensor named {name}")
        return existing
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tuple(array.shape)), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def as_array(codes: Tensor) -> Any:
    """Copy codes to a contiguous numpy array: E4M3 becomes float8_e4m3fn of ml_dtypes, other dtypes are kept."""
    import ml_dtypes

    if codes.dtype == torch.float8_e4m3fn:
        return codes.detach().cpu().contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return codes.detach().cpu().contiguous().numpy()


def insert(
    graph: ir.Graph, before: ir.Node | None, op: str, inputs: Sequence[ir.Value | None], name: str, output: str,
    like: ir.Value | None, *, dtype: ir.DataType | None = None, attributes: Mapping[str, Any] | None = None,
) -> ir.Value:  # fmt: skip
    """Insert a new node and return its output.

    It is inserted before `before`, or at the end if that is None. The output gets the shape of `like`, and its type
    unless `dtype` is given; no shape if `like` is None.
    """
    node = ir.node(op, inputs, attributes, name=name)
    value = node.outputs[0]
    value.name = output
    if like is not None:
        value.shape, value.type = like.shape, like.type
    if dtype is not None:
        value.type = ir.TensorType(dtype)
    if before is None:
        graph.append(node)
    else:
        graph.insert_before(before, node)
    return value


def cast(graph: ir.Graph, before: ir.Node | None, value: ir.Value, to: ir.DataType, node: str, output: str) -> ir.Value:
    """Cast a value to another type; `node` and `output` name the Cast and its output."""
    return insert(graph, before, "Cast", [value], node, output, value, dtype=to, attributes={"to": int(to)})


def cast_outputs(graph: ir.Graph, suffix: str, dtype: ir.DataType | None = None) -> None:
    """Cast outputs of the graph (only those of `dtype`, if given) to float32.

    The cast output keeps the name NAME; the value that is cast is renamed to NAME/suffix.
    """
    for position, value in enumerate(list(graph.outputs)):
        if dtype is None or value.dtype == dtype:
            name = str(value.name)
            value.name = f"{name}/{suffix}"
            graph.outputs[position] = cast(graph, None, value, ir.DataType.FLOAT, f"{name}/Cast", name)


def quantize_value(
    graph: ir.Graph, before: ir.Node, value: ir.Value, site: str, scale: Any, dtype: Any, *,
    bounds: tuple[Any, Any] = (None, None), axis: int | None = None, to: ir.DataType | None = None,
) -> ir.Value:  # fmt: skip
    """Quantize and dequantize a value: `[Clip,] QuantizeLinear, DequantizeLinear`, named after the site.

    `scale` is a number, `dtype` the numpy type of the codes. `bounds` are the minimum and maximum of a Clip before it,
    each None if there is no such bound; without any there is no Clip. `axis` is set on both nodes, unless None; the
    result has the value's own type if `to` is None.
    """
    stored = add_initializer(graph, f"{site}/scale", np.array(scale, np.float32))
    zero = add_initializer(graph, f"zero_{dtype.name}", np.zeros((), dtype))
    attributes = None if axis is None else {"axis": axis}
    current, (low, high) = value, bounds
    if low is not None or high is not None:
        limits = [None if low is None else add_initializer(graph, f"{site}/low", np.array(low, np.float32))]
        limits += [] if high is None else [add_initializer(graph, f"{site}/high", np.array(high, np.float32))]
        current = insert(graph, before, "Clip", [value, *limits], f"{site}/Clip", f"{site}/clipped", value, dtype=to)
    codes = insert(
        graph, before, "QuantizeLinear", [current, stored, zero], f"{site}/QuantizeLinear", f"{site}/codes", value,
        dtype=ir.DataType.from_numpy(dtype), attributes=attributes,
    )  # fmt: skip
    return insert(
        graph, before, "DequantizeLinear", [codes, stored, zero], f"{site}/DequantizeLinear", f"{site}/dequantized",
        value, dtype=to, attributes=attributes,
    )  # fmt: skip


def hand_over(old: ir.Value, new: ir.Value) -> None:
    """Let `new` take over the consumers and the name of `old`."""
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, name


def drop_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Remove a stored tensor if nothing reads it, so that no float copy of a weight stays in the file."""
    if not value.uses() and not value.is_graph_output() and value.name is not None:
        graph.initializers.pop(value.name, None)


def take_weight(graph: ir.Graph, product: Product) -> ir.Value:
    """Detach a layer's float weight and return it; it leaves the graph, so that the codes can have its name."""
    old = product.node.inputs[1]
    assert old is not None
    product.node.replace_input_with(1, None)
    drop_unused(graph, old)
    return old


def stored_bias(product: ir.Node) -> ir.Node | None:
    """The Add of a stored bias vector that is the only consumer of a matrix multiplication; None if there is none."""
    uses = product.outputs[0].uses()
    if len(uses) != 1:
        return None
    ((add, index),) = uses
    other = add.inputs[1 - index] if add.op_type == "Add" else None
    stored = other is not None and other.const_value is not None and len(other.const_value.shape) == 1
    return add if stored else None
