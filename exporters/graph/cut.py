"""The quantized layers cut out of an exported graph, as one model that runs each of them on an input of its own; and
what lies between them, as another.

The nodes and tensors are the file's own. So a difference in one layer, or between two, cannot hide in, or be blamed on,
another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporters.graph.layers import ExportedLayer

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Between", "cut_between", "cut_codes", "cut_layers", "input_name", "nodes_nowhere", "with_floats"]

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


@dataclass(frozen=True, slots=True)
class Between:
    """What lies between the products.

    Attributes:
        proto: an `onnx.ModelProto`; its inputs and outputs have the names of the graph's values.
        inputs: results of products, and the graph's inputs, that it reads.
        pieces: its outputs (what quantizers read, and the graph's outputs), in the graph's order, each with the names
            of the nodes on its way that none before it has.
        stored: by output, the names of stored tensors of more than one number on its whole way.
        passed: of `pieces`, those that are results of products themselves: they are no outputs of the model.
    """

    proto: Any
    inputs: tuple[str, ...]
    pieces: dict[str, list[str]]
    stored: dict[str, frozenset[str]]
    passed: tuple[str, ...]


def cut_between(model: ir.Model, layers: Sequence[ExportedLayer]) -> Between:
    """Everything from the products' results, biases included, to the next quantizers and to the output."""
    import onnx_ir as ir

    stop = {*(layer.output for layer in layers), *model.graph.inputs}
    order = {node: index for index, node in enumerate(model.graph)}
    ends = sorted(
        dict.fromkeys([*_sources(layers), *model.graph.outputs]),
        key=lambda value: order.get(value.producer(), -1),  # type: ignore[arg-type]
    )
    pieces, stored, seen = {}, {}, set[Any]()
    for value in ends:
        nodes, tensors, _ = _between(stop, [] if value in stop else [value])
        stored[str(value.name)] = frozenset(str(t.name) for t in tensors if t.const_value.size > 1)  # type: ignore[union-attr]
        pieces[str(value.name)] = [str(node.name) for node in nodes if node not in seen]
        seen.update(nodes)
    made = [value for value in ends if value not in stop]
    nodes, tensors, used = _between(stop, made)
    inputs = [value for value in (*model.graph.inputs, *(x.output for x in layers)) if value in used]
    proto = _model(model, [ir.to_proto(node) for node in nodes], tensors, _floats(inputs), _floats(made, ranks=False))
    passed = tuple(str(value.name) for value in ends if value in stop)
    return Between(proto, tuple(str(value.name) for value in inputs), pieces, stored, passed)


def nodes_nowhere(model: ir.Model, layers: Sequence[ExportedLayer]) -> list[str]:
    """Nodes that are neither in a cut layer nor between layers: no comparison runs them."""
    ends = [*_sources(layers), *model.graph.outputs]
    inside, _, _ = _between(_sources(layers), [layer.output for layer in layers])
    outside, _, _ = _between([*(layer.output for layer in layers), *model.graph.inputs], ends)
    held = {*inside, *outside}
    return [str(node.name) for node in model.graph if node not in held]


def with_floats(proto: Any, dtype: str) -> Any:
    """A copy of a model with "float64" or "float32" wherever it has a float: stored tensors, constants, casts."""
    from onnx import ModelProto, TensorProto, numpy_helper

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    to = TensorProto.DOUBLE if dtype == "float64" else TensorProto.FLOAT

    def convert(tensor: Any) -> None:
        if tensor.data_type in floats:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))

    made = ModelProto()
    made.CopyFrom(proto)
    for tensor in made.graph.initializer:
        convert(tensor)
    for node in made.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                convert(attribute.t)
            elif (node.op_type, attribute.name) == ("Cast", "to") and attribute.i in floats:
                attribute.i = to
    for value in (*made.graph.input, *made.graph.output, *made.graph.value_info):
        if value.type.tensor_type.elem_type in floats:
            value.type.tensor_type.elem_type = to
    return made


def _sources(layers: Sequence[ExportedLayer]) -> list[ir.Value]:
    return list(dict.fromkeys(o.source for layer in layers for o in layer.operands if o.source is not None))


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

    sources = _sources(layers)
    nodes, tensors, used = _between(sources, outputs)
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
    given = [_float(name, ranks[name]) for name in inputs.values()]
    proto = _model(model, protos, tensors, given, [_float(name, None) for name in results])
    return bytes(proto.SerializeToString())


def _model(model: ir.Model, nodes: list[Any], tensors: list[ir.Value], given: list[Any], results: list[Any]) -> Any:
    """A model of some of a graph's nodes and stored tensors, between described inputs and outputs."""
    import onnx
    import onnx_ir as ir

    stored = [ir.to_proto(tensor.const_value) for tensor in tensors if tensor.const_value is not None]
    graph = onnx.helper.make_graph(nodes, "layers", given, results, initializer=stored)
    opset = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=model.ir_version)


def _widened(product: Any) -> list[Any]:
    """A MatMul of float64 operands between casts, under the same names."""
    from onnx import TensorProto, helper

    sides = [f"{product.output[0]}/double/{index}" for index in range(2)]
    pairs = zip(product.input, sides, strict=True)
    casts = [helper.make_node("Cast", [a], [b], to=TensorProto.DOUBLE) for a, b in pairs]
    total = f"{product.output[0]}/double"
    narrow = helper.make_node("Cast", [total], list(product.output), to=TensorProto.FLOAT)
    return [*casts, helper.make_node("MatMul", sides, [total], name=product.name), narrow]


def _floats(values: Iterable[ir.Value], *, ranks: bool = True) -> list[Any]:
    """Descriptions of values by their own names, in their own number of axes where that is asked for."""
    return [_float(str(v.name), len(v.shape) if ranks and v.shape is not None else None) for v in values]


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
