"""Pass: a float32 graph becomes one in half precision, for engines that take every type as it is written.

Codes and scales keep their values: scales are trained as numbers that FP16 holds exactly, and one that is not is
refused. What changes is the arithmetic between products. Pixels stay float32 up to their quantizer, so their codes are
those of the artifact bit for bit; normalizations take FP16 and compute in float32 (`stash_type` 1). Inputs and
outputs of the graph keep their types. `compare_halved` reads the written file again: only types may have changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch

from exporters.graph.blocks import DYNAMIC_QUANTIZE
from exporters.graph.cut import with_floats
from exporters.graph.findings import LintFindingsError
from exporters.graph.passes import Change
from exporters.graph.passes.editing import add_initializer, cast, cast_outputs
from exporters.graph.produce import float_model
from fp8pipe.artifact import Gate
from fp8pipe.artifact.finding import Finding
from fp8pipe.models.vision.quantized import QuantizedVit

__all__ = ["NotHalf", "compare_halved", "halve", "in_half", "in_single", "refuse_not_half", "stored_arrays"]

_LARGEST: Final = float(np.finfo(np.float16).max)
_QUANTIZERS: Final = ("QuantizeLinear", "DequantizeLinear", DYNAMIC_QUANTIZE)
_MOVES: Final = ("Clip", "Reshape", "Transpose")  # operators that pixels may pass on the way to their quantizer
_SCALE: Final = 1  # position among a quantizer's operands


class NotHalf(ValueError):
    """A stored tensor that FP16 cannot hold: its name, and why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


@contextmanager
def refuse_not_half(source: str, fix: str) -> Iterator[None]:
    """While active, a tensor that FP16 cannot hold is a finding that refuses the export of `source`."""
    try:
        yield
    except NotHalf as error:
        raise LintFindingsError([Finding("not-half", error.name, error.why, fix)], source) from error


def halve(model: ir.Model) -> Change:
    """Convert in place; the change names the stored tensors that are FP16 now.

    Raises:
        NotHalf: a scale that FP16 does not hold exactly, or a finite value beyond its range.
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
        if node not in islands:
            _retype(node)
    _cast_inputs(graph, islands)
    cast_outputs(graph, "half", ir.DataType.FLOAT16)
    return Change("halve", tuple(changed))


def in_single(model: ir.Model) -> ir.Model:
    """A written graph with float32 wherever it has FP16; every number keeps its value."""
    made: ir.Model = ir.from_proto(with_floats(ir.to_proto(model), "float32"))
    return made


def in_half(quantized: QuantizedVit) -> QuantizedVit:
    """The model with every float that is not a code's or a scale's rounded once to FP16: what a halved graph holds."""
    model = float_model(quantized)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float32:
            tensor.data = tensor.data.half().float()
    return QuantizedVit(
        model, quantized.architecture, quantized.preprocessing, quantized.structure, quantized.weights,
        quantized.activations,
    )  # fmt: skip


def _input_islands(graph: ir.Graph) -> frozenset[ir.Node]:
    """Nodes that stay float32: from a graph's input up to its quantizers, where nothing else reads it."""
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
    """A scale that is read inside and outside an island is stored in both types."""
    for value in list(graph.initializers.values()):
        inside = [(node, index) for node, index in value.uses() if node in islands]
        if value.dtype != ir.DataType.FLOAT or not inside or len(inside) == len(value.uses()):
            continue
        assert value.const_value is not None
        twin = add_initializer(graph, f"{value.name}_float", value.const_value.numpy().copy())
        for node, index in inside:
            node.replace_input_with(index, twin)


def _halve_stored(value: ir.Value) -> str:
    assert value.const_value is not None
    array = value.const_value.numpy()
    finite = array[np.isfinite(array)]
    exact = any(node.op_type in _QUANTIZERS and index == _SCALE for node, index in value.uses())
    if exact and not np.array_equal(array, array.astype(np.float16).astype(np.float32)):
        raise NotHalf(str(value.name), "a scale that FP16 does not hold exactly")
    if finite.size and float(np.abs(finite).max()) > _LARGEST and not _is_mask(array):
        raise NotHalf(str(value.name), f"{float(np.abs(finite).max()):g} is beyond FP16")
    name = str(value.name)
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    value.const_value = ir.tensor(half, name=name)
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    return name


def _is_mask(array: np.ndarray) -> bool:
    """Zeros and hugely negative numbers: minus infinity in FP16 masks the same."""
    beyond = np.abs(array) > _LARGEST
    return bool(np.all(array[beyond] < 0) and np.all(array[~beyond] == 0))


def _halve_attributes(node: ir.Node) -> None:
    """Constants and casts that name float32."""
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    value = node.attributes.get("value")
    if node.op_type in ("Constant", "ConstantOfShape") and value is not None and value.type == ir.AttributeType.TENSOR:
        tensor = value.as_tensor()
        if tensor.dtype == ir.DataType.FLOAT:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float16)))


def _retype(node: ir.Node) -> None:
    for value in node.outputs:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)


def _cast_inputs(graph: ir.Graph, islands: frozenset[ir.Node]) -> None:
    """Readers outside the islands get the input in FP16."""
    for value in graph.inputs:
        outside = [(node, index) for node, index in value.uses() if node not in islands]
        if value.dtype != ir.DataType.FLOAT or not outside:
            continue
        names = f"{value.name}/Cast", f"{value.name}/half"
        half = cast(graph, outside[0][0], value, ir.DataType.FLOAT16, *names)
        for node, index in outside:
            node.replace_input_with(index, half)


def stored_arrays(model: ir.Model) -> dict[str, Any]:
    """Copies of all stored tensors, by name."""
    values = model.graph.initializers.items()
    return {name: value.const_value.numpy().copy() for name, value in values if value.const_value is not None}


def compare_halved(before: Mapping[str, Any], written: ir.Model) -> list[Gate]:
    """Gates on a written FP16 graph, read again, against the float32 graph's tensors (`stored_arrays`).

    Every number of these was compared with the artifact.
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
    detail = f"of {len(before)} stored tensors, the written file against the graph before halving"
    return [
        Gate(name=name, value=value, detail=detail)
        for name, value in (
            ("codes changed by halving", codes),
            ("scales changed by halving", scales),
            ("tensors not rounded once to FP16", others),
        )
    ]
