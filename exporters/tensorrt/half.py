"""Passes that convert a float32 graph to FP16, for strongly typed engines, which compute in the types of the graph.

Codes and scales keep their values: scales are trained to be exactly representable in FP16, and any other scale is
refused. What changes is the arithmetic between the matrix multiplications. Pixels stay float32 up to their quantizer,
so their codes equal the artifact's bit for bit; normalizations take FP16 inputs and compute in float32 (`stash_type`
1). Inputs and outputs of the graph keep their types. `compare_halved` reads the written file again: only types may have
changed.

`dequantize_graph` removes all quantizers from a graph, as the baseline for measuring the speed of an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch

from exporters.graph.between import with_floats
from exporters.graph.layers import DYNAMIC_QUANTIZE
from exporters.graph.passes.editing import Change, add_initializer, cast, cast_outputs
from exporters.graph.produce import float_model
from exporters.graph.trace import stored_array
from fp8pipe.artifact import Gate, none_of
from fp8pipe.artifact.finding import Finding, LintFindingsError
from fp8pipe.models.vision.quantized import QuantizedVit

_LARGEST: Final = float(np.finfo(np.float16).max)
_QUANTIZERS: Final = ("QuantizeLinear", "DequantizeLinear", DYNAMIC_QUANTIZE)
_MOVES: Final = ("Clip", "Reshape", "Transpose")  # operators that may lie between the pixels and their quantizer
_SCALE: Final = 1  # index of the scale among a quantizer's operands


class NotHalf(ValueError):
    """A stored tensor that cannot be represented in FP16: its name, and why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


@contextmanager
def refuse_not_half(source: str, fix: str) -> Iterator[None]:
    """Within this context, a tensor that FP16 cannot represent is a finding that refuses the export of `source`."""
    try:
        yield
    except NotHalf as error:
        raise LintFindingsError([Finding("not-half", error.name, error.why, fix)], source) from error


def halve(model: ir.Model) -> Change:
    """Convert a float32 graph to FP16 in place; the result lists the stored tensors that were converted.

    Raises:
        NotHalf: a scale that FP16 cannot represent exactly, or a finite value beyond its range.
    """
    graph = model.graph
    islands = _input_islands(graph)
    _split_shared(graph, islands)
    changed = []
    for value in list(graph.initializers.values()):
        readers = [node for node, _ in value.uses()]
        if value.dtype == ir.DataType.FLOAT and not all(node in islands for node in readers):
            changed.append(_halve_stored(value))
    for node in graph:
        _halve_attributes(node)
        for value in () if node in islands else node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(ir.DataType.FLOAT16)
    _cast_inputs(graph, islands)
    cast_outputs(graph, "half", ir.DataType.FLOAT16)
    return Change("halve", tuple(changed))


def in_single(model: ir.Model) -> ir.Model:
    """Convert every FP16 tensor of a written graph to float32; all numbers keep their values."""
    made: ir.Model = ir.from_proto(with_floats(ir.to_proto(model), "float32"))
    return made


def in_half(quantized: QuantizedVit) -> QuantizedVit:
    """The model with all floats except codes and scales rounded once to FP16, as in the converted graph."""
    model = float_model(quantized)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float32:
            tensor.data = tensor.data.half().float()
    return QuantizedVit(
        model, quantized.architecture, quantized.preprocessing, quantized.structure, quantized.weights,
        quantized.activations,
    )  # fmt: skip


def _input_islands(graph: ir.Graph) -> frozenset[ir.Node]:
    """Nodes that stay float32: from a graph input up to its quantizers; none if anything else reads that input."""
    found: set[ir.Node] = set()
    waiting = [node for value in graph.inputs for node, _ in value.uses()]
    while waiting:
        node = waiting.pop()
        found.add(node)
        if node.op_type in ("QuantizeLinear", "Shape"):
            continue
        if node.op_type not in _MOVES:
            return frozenset()
        waiting += [reader for reader, _ in node.outputs[0].uses()]
    return frozenset(found)


def _split_shared(graph: ir.Graph, islands: frozenset[ir.Node]) -> None:
    """Store a second, float32 copy of every tensor that is read both inside and outside the islands, for the inside."""
    for value in list(graph.initializers.values()):
        inside = [(node, index) for node, index in value.uses() if node in islands]
        if value.dtype != ir.DataType.FLOAT or not inside or len(inside) == len(value.uses()):
            continue
        twin = add_initializer(graph, f"{value.name}_float", stored_array(value).copy())
        for node, index in inside:
            node.replace_input_with(index, twin)


def _halve_stored(value: ir.Value) -> str:
    # Convert a stored tensor to FP16, and return its name. Raises NotHalf if its numbers cannot be represented.
    array, name = stored_array(value), str(value.name)
    finite = array[np.isfinite(array)]
    exact = any(node.op_type in _QUANTIZERS and index == _SCALE for node, index in value.uses())
    if exact and not np.array_equal(array, array.astype(np.float16).astype(np.float32)):
        raise NotHalf(name, "a scale that FP16 cannot represent exactly")
    if finite.size and float(np.abs(finite).max()) > _LARGEST and not _is_mask(array):
        raise NotHalf(name, f"{float(np.abs(finite).max()):g} is beyond the range of FP16")
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    value.const_value = ir.tensor(half, name=name)
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    return name


def _is_mask(array: np.ndarray) -> bool:
    """Whether a tensor holds only zeros and negative numbers beyond FP16: as minus infinity they mask the same."""
    beyond = np.abs(array) > _LARGEST
    return bool(np.all(array[beyond] < 0) and np.all(array[~beyond] == 0))


def _halve_attributes(node: ir.Node) -> None:
    """Change float32 to FP16 in a node's Cast target or constant tensor."""
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    value = node.attributes.get("value")
    if node.op_type in ("Constant", "ConstantOfShape") and value is not None and value.type == ir.AttributeType.TENSOR:
        tensor = value.as_tensor()
        if tensor.dtype == ir.DataType.FLOAT:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float16)))


def _cast_inputs(graph: ir.Graph, islands: frozenset[ir.Node]) -> None:
    """Cast the graph's inputs to FP16 for all consumers outside the islands."""
    for value in graph.inputs:
        outside = [(node, index) for node, index in value.uses() if node not in islands]
        if value.dtype != ir.DataType.FLOAT or not outside:
            continue
        half = cast(graph, outside[0][0], value, ir.DataType.FLOAT16, f"{value.name}/Cast", f"{value.name}/half")
        for node, index in outside:
            node.replace_input_with(index, half)


def stored_arrays(model: ir.Model) -> dict[str, Any]:
    """Copies of all stored tensors, by name."""
    values = model.graph.initializers.items()
    return {name: value.const_value.numpy().copy() for name, value in values if value.const_value is not None}


def compare_halved(before: Mapping[str, Any], written: ir.Model) -> list[Gate]:
    """Gates on a written graph, read from its file, against the tensors of the float32 graph (`stored_arrays`).

    The float32 graph has already been compared with the artifact.
    """
    after = stored_arrays(written)
    codes = scales = others = 0
    for name, array in before.items():
        found = after.get(name)
        if found is None or found.shape != array.shape:
            codes, scales, others = codes + 1, scales, others + 1
        elif array.dtype != np.float32:
            codes += int((found.view(np.uint8) != array.view(np.uint8)).sum()) if array.dtype.itemsize == 1 else 0
            others += int(array.dtype.itemsize > 1 and not np.array_equal(found, array))
        elif name.endswith("scale"):
            scales += int((found.astype(np.float32) != array).sum())
        else:
            with np.errstate(over="ignore"):
                expected = array if found.dtype == np.float32 else array.astype(np.float16)
            others += int(not np.array_equal(found, expected))
    detail = f"of {len(before)} stored tensors, the written file against the graph before its conversion to FP16"
    counts = (
        ("codes changed by halving", codes),
        ("scales changed by halving", scales),
        ("tensors not rounded once to FP16", others),
    )
    return [none_of(name, count, detail) for name, count in counts]


def dequantize_graph(model: ir.Model) -> int:
    """Replace stored codes by dequantized values in their scale's dtype, and remove activation quantizers, in place.

    Returns the number of DequantizeLinear nodes that were removed.
    """
    graph, gone = model.graph, 0
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        codes, output = node.inputs[0], node.outputs[0]
        assert codes is not None
        producer = codes.producer()
        if codes.const_value is not None:
            value = _stored(graph, node)
        elif producer is not None and producer.op_type == "QuantizeLinear" and producer.inputs[0] is not None:
            value = _typed(graph, node, _unclipped(producer.inputs[0]))
        else:
            continue
        output.replace_all_uses_with(value)
        graph.remove(node, safe=True)
        gone += 1
    for kind in ("QuantizeLinear", "Clip"):
        for node in [node for node in graph if node.op_type == kind and not node.outputs[0].uses()]:
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    return gone


def _stored(graph: ir.Graph, node: ir.Node) -> ir.Value:
    codes, scale = (stored_array(value) for value in node.inputs[:2])
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    array = (codes.astype(np.float32) * _spread(scale, codes, axis, block)).astype(scale.dtype)
    return add_initializer(graph, f"{node.name}/value", array)


def _spread(scale: Any, codes: Any, axis: int, block: int) -> Any:
    """Reshape a scale (per tensor, per channel or per block) to float32 that broadcasts to the shape of the codes."""
    if block:
        return np.repeat(scale, block, axis=axis).astype(np.float32)
    if scale.size == 1:
        return scale.astype(np.float32)
    sides = [1] * codes.ndim
    sides[axis] = scale.size
    return scale.astype(np.float32).reshape(sides)


def _unclipped(value: ir.Value) -> ir.Value:
    """The input of a Clip that feeds only a quantizer, and so belongs to it; otherwise the value itself."""
    producer = value.producer()
    if producer is None or producer.op_type != "Clip" or len(value.uses()) > 1 or producer.inputs[0] is None:
        return value
    return producer.inputs[0]


def _typed(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """The activation before its quantizer, cast to the dtype after it if they differ, as for float32 pixels."""
    wanted = node.inputs[1].dtype if node.inputs[1] is not None else None
    if wanted is None or value.dtype == wanted:
        return value
    return cast(graph, node, value, wanted, f"{node.name}/Cast", f"{node.name}/cast")
