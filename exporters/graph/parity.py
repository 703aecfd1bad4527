"""Compares ONNX Runtime with the quantized model in torch, layer by layer.

A quantized transformer is chaotic: a difference in the last bit of one layer pushes an activation across the boundary
between two codes, and a few layers later the logits differ by percents, between any two correct implementations. So the
comparison is made layer by layer, with the same input on both sides: every code must be equal, and every output is
compared with the exact result of those codes, in float64. An engine that sums integers is within 1e-6 of the layer's
largest output, since only its final multiplications round. Sums in fp32 (torch's, and an engine's for FP8 codes and
pixels) round at every addition: a thousand terms differ by some 1e-6 from the exact sum, so 1e-5 is allowed.

The layers are extracted from the graph as one model that runs each of them on its own input. The nodes and tensors are
those of the file; only what lies between the layers is removed. So an error in one layer can neither be masked by, nor
be attributed to, another layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from exporters.graph.layers import ExportedLayer, Operand
from exporters.graph.runtime import open_session, run
from exporters.graph.trace import ProductKind
from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.vision.quantized import QuantizedVit
from fp8pipe.numerics.nvfp4 import BlockQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir


INTEGER_TOLERANCE: Final = 1e-6
FLOAT_TOLERANCE: Final = 1e-5
# The smallest normal fp32 number: the divisor for layers whose exact output is zero everywhere.
_TINY: Final = 2.0**-126
# Torch's names of the float operands of each kind of layer, in order.
_TAPS: Final = {
    ProductKind.LINEAR: ("input",), ProductKind.PATCH: ("input",), ProductKind.QK: ("q", "k"),
    ProductKind.AV: ("probs_in", "v"),
}  # fmt: skip


class LayerParity(FrozenConfig):
    """The comparison of one layer in the engine with its exact result for the same input."""

    layer: str = Field(description="module name; .qk and .av are the two matmuls of an attention")
    codes: int = Field(ge=0, description="activation codes compared")
    differing_codes: int = Field(ge=0, description="number of codes that differ")
    integer: bool = Field(description="whether the engine can multiply integers here")
    error: float = Field(description="the engine's largest error, relative to the layer's largest output; NaN fails")
    torch_error: float | None = Field(description="the same error of torch's output; none without a torch model")

    @property
    def tolerance(self) -> float:
        """The largest accepted error of the engine."""
        return INTEGER_TOLERANCE if self.integer else FLOAT_TOLERANCE


def inputs_of(quantized: QuantizedVit, layers: Sequence[ExportedLayer], taps: Mapping[str, Any]) -> dict[str, Any]:
    """The float inputs of the extracted layers as computed by torch: numpy arrays by input name of the extracted model.

    `taps` are the result of `quantized.taps(pixels)`.

    Raises:
        BadArtifactError: a layer reads an activation where the artifact has a weight.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        for operand, what in zip_longest(layer.operands, _TAPS[layer.kind]):
            if operand is not None and operand.source is not None:
                if what is None:
                    raise BadArtifactError(
                        f"{layer.label} reads {operand.source.name}",
                        why="the artifact stores a quantized weight there, not an activation",
                        fix="export the artifact again",
                    )  # fmt: skip
                tensor = taps[layer.name][what]
                tensor = tensor.transpose(-2, -1) if what == "k" else tensor
                found[input_name(operand.source)] = in_rank(tensor, operand.source).contiguous().numpy()
    return found


def outputs_of(layers: Sequence[ExportedLayer], taps: Mapping[str, Any]) -> dict[str, Tensor]:
    """The layers' results in torch, by label."""
    return {layer.label: taps[layer.name]["logits" if layer.kind is ProductKind.QK else "output"] for layer in layers}


def compare_layers(
    model: ir.Model,
    layers: Sequence[ExportedLayer],
    inputs: Mapping[str, Any],
    torch_outputs: Mapping[str, Tensor] | None = None,
    *,
    optimize: bool = True,
) -> list[LayerParity]:
    """Run every layer in ONNX Runtime, optimized as in service, and compare it with the exact result.

    `inputs` are float, by their names in the extracted model (`inputs_of`); torch's outputs for them, by label
    (`outputs_of`), are compared, too. Without `optimize`, for graphs meant for another engine, every operator runs
    unoptimized, without this CPU's integer kernels, and with sums in float64, so that only the graph is checked.
    """
    outputs = run(open_session(cut_layers(model, layers, wide=not optimize), optimize=optimize), inputs)
    coded = dict.fromkeys(o.codes for layer in layers for o in layer.operands if o.codes is not None)
    codes = run(open_session(_cut(model, layers, list(coded), as_float=True)), inputs) if coded else {}
    return judge_layers(layers, inputs, outputs, torch_outputs, lambda layer: _count_codes(layer, inputs, codes))


def judge_layers(
    layers: Sequence[ExportedLayer], inputs: Mapping[str, Any], outputs: Mapping[str, Any],
    torch_outputs: Mapping[str, Tensor] | None, count: Callable[[ExportedLayer], tuple[int, int]],
) -> list[LayerParity]:  # fmt: skip
    """Compare an engine's outputs, by name, with the exact results of the layers.

    `count` returns a layer's number of activation codes, and how many of them differ. `torch_outputs`, by label, are
    compared with the exact results, too, unless None.
    """
    report = []
    for layer in layers:
        (compared, differing), expected = count(layer), _exact(layer, inputs)
        report.append(
            LayerParity(
                layer=layer.label, codes=compared, differing_codes=differing, integer=layer.integer,
                error=layer_error(torch.from_numpy(outputs[str(layer.output.name)]), expected),
                torch_error=None if torch_outputs is None else layer_error(torch_outputs[layer.label], expected),
            )
        )  # fmt: skip
    return report


def _count_codes(layer: ExportedLayer, inputs: Mapping[str, Any], codes: Mapping[str, Any]) -> tuple[int, int]:
    """Number of activation codes, and how many of them differ."""
    compared = differing = 0
    for operand in layer.operands:
        if operand.quantizer is not None and operand.source is not None and operand.codes is not None:
            ours = operand.quantizer.codes(torch.from_numpy(inputs[input_name(operand.source)])).float()
            theirs = torch.from_numpy(codes[f"{operand.codes.name}/float"])
            compared += ours.numel()
            differing += int((ours != theirs).sum())
    return compared, differing


def _exact(layer: ExportedLayer, inputs: Mapping[str, Any]) -> Tensor:
    """A layer's result in float64, from the codes and scales in the file."""
    left, right = (_value(operand, inputs) for operand in layer.operands)
    bias = None if layer.bias is None else layer.bias.double()
    if layer.kind is ProductKind.LINEAR:
        return functional.linear(left, right, bias)
    if layer.kind is ProductKind.PATCH:
        return functional.conv2d(left, right, bias, stride=layer.node.attributes.get_ints("strides"))
    return left @ right


def _value(operand: Operand, inputs: Mapping[str, Any]) -> Tensor:
    """One operand in float64: the dequantized weight, or the quantized and dequantized activation."""
    if operand.weight is not None:
        return operand.weight.dequantize().double()
    assert operand.source is not None
    x = torch.from_numpy(inputs[input_name(operand.source)])
    if operand.quantizer is None:
        return x.double()
    if isinstance(operand.quantizer, BlockQuantizer):
        return operand.quantizer.fake(x).double()  # no rounding error: dequantized NVFP4 values are exact in fp32
    return operand.quantizer.codes(x).float().double() * operand.quantizer.scale


def layer_error(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference over the largest absolute expected number; NaN if the sizes differ."""
    if found.numel() != expected.numel():
        return float("nan")
    difference = (found.double().reshape(expected.shape) - expected.double()).abs().max()
    return float(difference / expected.abs().max().clamp(min=_TINY))


def in_rank(tensor: Tensor, value: ir.Value) -> Tensor:
    """The same numbers with the graph's number of axes: the exporter may merge axes that torch keeps separate."""
    shape = list(value.shape or ())
    if not shape or len(shape) == tensor.dim():
        return tensor
    return tensor.reshape(-1, *(int(side) for side in shape[1:]))  # type: ignore[arg-type]


def input_name(value: ir.Value) -> str:
    """The name of the extracted model's input that replaces this value of the graph."""
    return f"input/{value.name}"


def cut_layers(model: ir.Model, layers: Sequence[ExportedLayer], *, wide: bool = False) -> bytes:
    """Extract the layers as one serialized model whose outputs are the layers' outputs, by their names in the graph.

    With `wide`, matrix multiplications sum in float64, so that differences are due to the graph alone.
    """
    return _cut(model, layers, [layer.output for layer in layers], wide=wide)


def _cut(
    model: ir.Model,
    layers: Sequence[ExportedLayer],
    outputs: Sequence[ir.Value],
    *,
    as_float: bool = False,
    wide: bool = False,
) -> bytes:
    # Extract the nodes from the layers' float inputs to `outputs` as a serialized model.
    #
    # With `as_float`, the outputs are cast to float32 and named NAME/float; `wide` as in `cut_layers`.
    import onnx
    import onnx_ir as ir

    sources = sources_of(layers)
    nodes, tensors, used = way_between(sources, outputs)
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
    if as_float:  # numpy does not support FP8 arrays
        results = [f"{name}/float" for name in names]
        cast = zip(names, results, strict=True)
        protos += [onnx.helper.make_node("Cast", [a], [b], to=onnx.TensorProto.FLOAT) for a, b in cast]
    ranks = {input_name(s): None if s.shape is None else len(s.shape) for s in sources}
    given = [float_value(name, ranks[name]) for name in inputs.values()]
    made = model_of(model, protos, tensors, given, [float_value(name, None) for name in results])
    return bytes(made.SerializeToString())


def model_of(model: ir.Model, nodes: list[Any], tensors: list[ir.Value], given: list[Any], results: list[Any]) -> Any:
    """Make an `onnx.ModelProto` from parts of a graph.

    Args:
        model: the model that the parts are from, whose opset and IR version are used.
        nodes: nodes as `NodeProto`.
        tensors: stored tensors that the nodes read.
        given: descriptions of the inputs as `ValueInfoProto`.
        results: descriptions of the outputs as `ValueInfoProto`.
    """
    import onnx

    stored = [_inline(tensor.const_value) for tensor in tensors if tensor.const_value is not None]
    graph = onnx.helper.make_graph(nodes, "layers", given, results, initializer=stored)
    opset = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=model.ir_version)


def _inline(tensor: ir.TensorProtocol) -> Any:
    """A stored tensor with its numbers, also where the graph has them in a file of their own."""
    import onnx_ir as ir

    external = isinstance(tensor, ir.ExternalTensor)
    return ir.to_proto(ir.tensor(tensor.numpy(), name=tensor.name) if external else tensor)


def sources_of(layers: Sequence[ExportedLayer]) -> list[ir.Value]:
    """The float values from which the layers' operands are computed."""
    return list(dict.fromkeys(o.source for layer in layers for o in layer.operands if o.source is not None))


def _widened(product: Any) -> list[Any]:
    """Replace a float32 MatMul by casts to float64, a float64 MatMul and a cast back; its names stay the same."""
    from onnx import TensorProto, helper

    sides = [f"{product.output[0]}/double/{index}" for index in range(2)]
    pairs = zip(product.input, sides, strict=True)
    casts = [helper.make_node("Cast", [a], [b], to=TensorProto.DOUBLE) for a, b in pairs]
    total = f"{product.output[0]}/double"
    narrow = helper.make_node("Cast", [total], list(product.output), to=TensorProto.FLOAT)
    return [*casts, helper.make_node("MatMul", sides, [total], name=product.name), narrow]


def float_value(name: str, rank: int | None) -> Any:
    """The description of a float32 tensor with this number of axes, or any number if None."""
    import onnx

    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None if rank is None else [None] * rank)


def way_between(
    sources: Iterable[ir.Value], outputs: Iterable[ir.Value]
) -> tuple[list[ir.Node], list[ir.Value], set[ir.Value]]:
    """The part of a graph that computes `outputs` from `sources`.

    Returns:
        Its nodes in the graph's order, its stored tensors, and those of `sources` that it reads.
    """
    stop, used = set(sources), set[Any]()
    nodes: dict[int, Any] = {}
    tensors: dict[Any, None] = {}
    # One layer's result may be another one's source: the search starts at its producer, so it is not taken as an input.
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
