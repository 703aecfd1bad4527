"""The quantized layers cut out of an exported graph, as one model that runs each of them on an input of its own.

The nodes and tensors are the file's own; only what lies between the layers is gone. So a difference in one layer
cannot hide in, or be blamed on, another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from exporters.graph.layers import ExportedLayer

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["cut_codes", "cut_layers", "input_name"]

_INPUT = "input/"


def input_name(value: ir.Value) -> str:
    """The name of the cut model's input that stands for a value of the graph."""
    return f"{_INPUT}{value.name}"


def cut_layers(model: ir.Model, layers: Sequence[ExportedLayer], *, wide: bool = False) -> bytes:
    """A model whose outputs are the layers' outputs, by their names in the graph.

    `wide` adds the products of matrices up in float64, so that what differs is the graph and not the order of sums.
    """
    return _cut(model, layers, [layer.output for layer in layers], wide=wide)


def cut_codes(model: ir.Model, layers: Sequence[ExportedLayer]) -> bytes | None:
    """A model whose outputs are the codes of all quantized activations, as float; None when there are none."""
    codes = dict.fromkeys(o.codes for layer in layers for o in layer.operands if o.codes is not None)
    return _cut(model, layers, list(codes), as_float=True) if codes else None


def _cut(
    model: ir.Model,
    layers: Sequence[ExportedLayer],
    outputs: Sequence[ir.Value],
    *,
    as_float: bool = False,
    wide: bool = False,
) -> bytes:
    import onnx
    import onnx_ir as ir

    sources = dict.fromkeys(o.source for layer in layers for o in layer.operands if o.source is not None)
    nodes, tensors, used = _between(list(sources), outputs)
    protos = [ir.to_proto(node) for node in nodes]
    inputs = {str(source.name): input_name(source) for source in sources if source in used}
    for proto in protos:
        for index, name in enumerate(proto.input):
            proto.input[index] = inputs.get(name, name)
    if wide:
        products = {str(layer.node.outputs[0].name) for layer in layers if layer.node.op_type == "MatMul"}
        protos = [made for proto in protos for made in (_widened(proto) if proto.output[0] in products else [proto])]
    names = [str(value.name) for value in outputs]
    results = names
    if as_float:  # Python reads no FP8 arrays
        results = [f"{name}/float" for name in names]
        cast = zip(names, results, strict=True)
        protos += [onnx.helper.make_node("Cast", [a], [b], to=onnx.TensorProto.FLOAT) for a, b in cast]
    ranks = {input_name(s): None if s.shape is None else len(s.shape) for s in sources}
    graph = onnx.helper.make_graph(
        protos, "layers",
        [_float(name, ranks[name]) for name in inputs.values()], [_float(name, None) for name in results],
        initializer=[ir.to_proto(tensor.const_value) for tensor in tensors if tensor.const_value is not None],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    made: Any = onnx.helper.make_model(graph, opset_imports=opset, ir_version=model.ir_version)
    return bytes(made.SerializeToString())


def _widened(product: Any) -> list[Any]:
    """A MatMul of float64 operands between casts, under the same names."""
    from onnx import TensorProto, helper

    sides = [f"{product.output[0]}/double/{index}" for index in range(2)]
    pairs = zip(product.input, sides, strict=True)
    casts = [helper.make_node("Cast", [a], [b], to=TensorProto.DOUBLE) for a, b in pairs]
    total = f"{product.output[0]}/double"
    narrow = helper.make_node("Cast", [total], list(product.output), to=TensorProto.FLOAT)
    return [*casts, helper.make_node("MatMul", sides, [total], name=product.name), narrow]


def _float(name: str, rank: int | None) -> Any:
    import onnx

    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None if rank is None else [None] * rank)


def _between(
    sources: Iterable[ir.Value], outputs: Iterable[ir.Value]
) -> tuple[list[ir.Node], list[ir.Value], set[ir.Value]]:
    """Nodes and stored tensors that lead from `sources` to `outputs`, nodes in the graph's order."""
    stop, used = set(sources), set[Any]()
    nodes: dict[int, Any] = {}
    tensors: dict[Any, None] = {}
    # A layer's result may be another one's source: it starts by what made it, not as an input.
    waiting = [value.producer() for value in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in nodes:
            continue
        nodes[id(node)] = node
        for value in node.inputs:
            if value is None:
                continue
            if value.const_value is not None:
                tensors[value] = None
            elif value in stop:
                used.add(value)
            else:
                waiting.append(value.producer())
    kept = list(nodes.values())
    order = {id(node): index for index, node in enumerate(kept[0].graph or [])} if kept else {}
    return sorted(kept, key=lambda node: order[id(node)]), list(tensors), used
