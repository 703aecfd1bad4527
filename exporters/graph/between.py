"""Checks the operators between matrix multiplications: from the output of one to the input of the next quantizer.

The graph is cut at the outputs of the matrix multiplications. Each piece is fed the parent's own outputs (computed by
torch from the artifact), and what it passes to the next quantizer, or to the output, is compared with torch in float64.
ONNX's reference evaluator, which shares no code with an engine, runs the pieces in float64: a wrong operator, attribute
or constant exceeds a tolerance of 4e-7. An engine runs the same pieces as in service, with a tolerance of 1e-5, because
its sums round. Nothing is quantized here and errors do not propagate between pieces, so a difference can be attributed
to the nodes of its piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from exporters.graph.layers import ExportedLayer
from exporters.graph.parity import (
    float_value,
    in_rank,
    input_name,
    inputs_of,
    layer_error,
    model_of,
    sources_of,
    way_between,
)
from exporters.graph.runtime import open_session, run
from exporters.graph.trace import INPUT_NAME, ProductKind
from fp8pipe.artifact import Comparison, Gate, none_of
from fp8pipe.core.errors import BadArtifactError, one_line
from fp8pipe.models.vision.attention import intercept_attention
from fp8pipe.models.vision.exact import as_fp32, double_model
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.quantized import QuantizedVit
from fp8pipe.models.vision.structure import LinearSite

if TYPE_CHECKING:
    import onnx_ir as ir

# In float64 only constants differ, which the graph stores in fp32: a relative error of 6e-8 each. Over 28 families the
# largest difference was 2e-8, and 2.3e-7 where the parent resizes its position embeddings in fp32.
EVALUATED_TOLERANCE: Final = 4e-7
ENGINE_TOLERANCE: Final = 1e-5
# Rotary tables and resized position embeddings are also rounded to FP16, unlike the parent's: relative error 2^-11.
HALF_TOLERANCE: Final = 1e-3
_PATCHES: Final = "/patches"
_SHOWN: Final = 6  # number of a piece's nodes that are named


@dataclass(frozen=True, slots=True)
class _Between:
    """The operators between the matrix multiplications.

    Attributes:
        proto: an `onnx.ModelProto`; its inputs and outputs have the names of the graph's values.
        inputs: outputs of matrix multiplications and inputs of the graph that it reads.
        pieces: its outputs (inputs of quantizers, and the graph's outputs) in the graph's order, each with the names of
            those nodes leading to it that belong to no earlier piece.
        stored: by output, the names of all stored tensors with more than one number that it depends on.
        passed: those of `pieces` that are themselves outputs of matrix multiplications, and so not outputs of `proto`.
    """

    proto: Any
    inputs: tuple[str, ...]
    pieces: dict[str, list[str]]
    stored: dict[str, frozenset[str]]
    passed: tuple[str, ...]


def _cut(model: ir.Model, layers: Sequence[ExportedLayer]) -> _Between:
    """Extract everything from the biased results of matrix multiplications to the next quantizers and the output."""
    import onnx_ir as ir

    stop = {*(layer.output for layer in layers), *model.graph.inputs}
    order = {node: index for index, node in enumerate(model.graph)}
    ends = sorted(
        dict.fromkeys([*sources_of(layers), *model.graph.outputs]),
        key=lambda value: order.get(value.producer(), -1),  # type: ignore[arg-type]
    )
    pieces, stored, seen = {}, {}, set[Any]()
    for value in ends:
        nodes, tensors, _ = way_between(stop, [] if value in stop else [value])
        stored[str(value.name)] = frozenset(str(t.name) for t in tensors if _is_table(t))
        pieces[str(value.name)] = [str(node.name) for node in nodes if node not in seen]
        seen.update(nodes)
    made = [value for value in ends if value not in stop]
    nodes, tensors, used = way_between(stop, made)
    inputs = [value for value in (*model.graph.inputs, *(x.output for x in layers)) if value in used]
    proto = model_of(model, [ir.to_proto(node) for node in nodes], tensors, _floats(inputs), _floats(made, ranks=False))
    passed = tuple(str(value.name) for value in ends if value in stop)
    return _Between(proto, tuple(str(value.name) for value in inputs), pieces, stored, passed)


def _is_table(value: ir.Value) -> bool:
    """Whether a stored tensor is of a float type and has more than one element."""
    tensor = value.const_value
    return tensor is not None and tensor.size > 1 and tensor.dtype.name in ("FLOAT", "FLOAT16", "DOUBLE")


def _uncompared_nodes(model: ir.Model, layers: Sequence[ExportedLayer]) -> list[str]:
    """Nodes that are neither in an extracted layer nor between layers, so no comparison runs them."""
    ends = [*sources_of(layers), *model.graph.outputs]
    inside, _, _ = way_between(sources_of(layers), [layer.output for layer in layers])
    outside, _, _ = way_between([*(layer.output for layer in layers), *model.graph.inputs], ends)
    held = {*inside, *outside}
    return [str(node.name) for node in model.graph if node not in held]


def with_floats(proto: Any, dtype: str) -> Any:
    """A copy of a model with "float64" or "float32" instead of every float type: stored tensors, constants, casts."""
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


def _floats(values: Iterable[ir.Value], *, ranks: bool = True) -> list[Any]:
    """ONNX descriptions of values under their own names, with their number of axes if `ranks`."""
    return [float_value(str(v.name), len(v.shape) if ranks and v.shape is not None else None) for v in values]


@dataclass(frozen=True, slots=True)
class PieceParity:
    """The comparison of one piece, which ends at a quantizer or at the output.

    Attributes:
        value: the graph's value.
        nodes: operators that lead to it and belong to no earlier piece.
        error: largest difference, relative to the largest expected number; NaN fails.
        exact: whether all constants involved are known exactly as the graph stores them.
    """

    value: str
    nodes: list[str]
    error: float
    exact: bool


@dataclass(frozen=True, slots=True)
class Pieces:
    """The inputs of the pieces and the expected outputs, by the names of the graph's values.

    Attributes:
        feeds: outputs of the matrix multiplications, and the pixels; numpy arrays.
        expected: inputs of the quantizers, and the output; torch tensors, float64.
        exact: names of the stored tensors whose exact values were used for `expected`; None means all. The exporter
            computes the others from several tensors, and rounds only the result to FP16.
    """

    feeds: Mapping[str, Any]
    expected: Mapping[str, Tensor]
    exact: frozenset[str] | None = None


def parent_pieces(
    model: ir.Model, layers: Sequence[ExportedLayer], quantized: QuantizedVit, pixels: Tensor, *, half: bool = False
) -> Pieces:
    """The parent's outputs of matrix multiplications in torch, and the values that follow from them in float64.

    `quantized` computes what the graph computes (`as_exported`, `in_half`); `pixels` (N, 3, H, W) must be normalized;
    `half` says that the graph stores its constants in FP16.
    """
    taps = quantized.taps(pixels)
    found, output = _follow(quantized, taps, pixels, half=half)
    feeds = {INPUT_NAME: pixels.numpy()}
    for layer in layers:
        tensor = taps[layer.name]["logits" if layer.kind is ProductKind.QK else "output"]
        if _is_unfolded(layer):
            tensor = tensor.flatten(2).transpose(1, 2)
        feeds[str(layer.output.name)] = in_rank(tensor, layer.output).contiguous().numpy()
    expected = {name: torch.from_numpy(array) for name, array in inputs_of(quantized, layers, found).items()}
    for layer in layers:
        source = layer.operands[0].source
        if _is_unfolded(layer) and source is not None:
            weight = quantized.model.get_submodule(layer.name).get_parameter("weight")
            kernel = tuple(weight.shape[2:])
            patches = functional.unfold(found[layer.name]["input"], kernel, stride=kernel)
            expected[input_name(source)] = patches.transpose(1, 2)
    by_value = {str(o.source.name): expected[input_name(o.source)] for x in layers for o in x.operands if o.source}
    exact = frozenset(quantized.model.state_dict()) if half else None
    return Pieces(feeds, {**by_value, str(model.graph.outputs[0].name): output}, exact)


def run_to(model: ir.Model, names: Sequence[str], pixels: Any) -> dict[str, Any]:
    """Run a graph in ONNX Runtime without optimization on a numpy array of pixels; returns the named values."""
    import onnx
    import onnx_ir as ir

    proto: Any = ir.to_proto(model)
    present = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    wanted = [name for name in dict.fromkeys(names) if name not in present]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted)
    found = run(open_session(proto.SerializeToString(), optimize=False), {INPUT_NAME: pixels}) | {INPUT_NAME: pixels}
    return {name: found[name] for name in names}


def file_pieces(model: ir.Model, layers: Sequence[ExportedLayer], pixels: Tensor) -> Pieces:
    """Compute inputs and expected outputs from the graph itself, without optimization, if there is no parent."""
    cut = _cut(model, layers)
    feeds = run_to(model, [INPUT_NAME, *cut.inputs, *cut.passed], pixels.numpy())
    wide = {name: feeds[name].astype("float64") for name in cut.inputs}
    made = evaluate(with_floats(cut.proto, "float64"), wide) | {name: feeds[name] for name in cut.passed}
    return Pieces(feeds, {name: torch.from_numpy(made[name]) for name in cut.pieces})


def _is_unfolded(layer: ExportedLayer) -> bool:
    """Whether a layer is a patch embedding that was rewritten as a matrix multiplication of rearranged pixels."""
    source = layer.operands[0].source
    return layer.kind is ProductKind.LINEAR and source is not None and str(source.name).endswith(_PATCHES)


@torch.no_grad()
def _follow(
    quantized: QuantizedVit, taps: Mapping[str, Mapping[str, Tensor]], pixels: Tensor, *, half: bool
) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """Run the model in float64 with the given layer outputs substituted; returns every operand, and the output."""
    model, found = double_model(quantized), {}

    def linear(site: LinearSite, layer: nn.Module) -> None:
        def forward(x: Tensor) -> Tensor:
            found[site.name] = {"input": x}
            return taps[site.name]["output"].double()

        layer.forward = forward

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        logits = taps[name]["logits"].double()
        probs = (logits if mask is None else logits + mask).softmax(-1)
        factor = float(torch.tensor(scale).half()) if half else as_fp32(scale)
        found[name] = {"q": q * factor, "k": k, "v": v, "probs_in": probs}
        return taps[name]["output"].double()

    for site in quantized.structure.linears:
        linear(site, model.get_submodule(site.name))
    with intercept_attention(model, quantized.structure.attention_names, attend):
        output = vision_outputs(model, pixels.double())
    return found, output


def evaluate(proto: Any, feeds: Mapping[str, Any], operators: Sequence[Any] = ()) -> dict[str, Any]:
    """All outputs of a model by name from ONNX's reference evaluator, which runs one node after the other.

    Raises:
        BadArtifactError: an operator cannot be evaluated.
    """
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(proto, new_ops=list(operators))
        return dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))
    except Exception as error:  # the implementation of an operator may raise anything
        raise BadArtifactError(
            "ONNX's reference evaluator cannot run the graph", why=one_line(error, 600),
            fix="export it again",
        ) from error  # fmt: skip


def compare_between(
    model: ir.Model, layers: Sequence[ExportedLayer], pieces: Pieces, *, engine: bool, optimize: bool = True
) -> list[PieceParity]:
    """Run every piece, and compare its output with `pieces.expected`.

    With `engine` the pieces run in ONNX Runtime (with `optimize`, as in service), otherwise in the reference evaluator.
    """
    cut = _cut(model, layers)
    feeds = {name: pieces.feeds[name] for name in cut.inputs}
    if engine:
        found = run(open_session(cut.proto.SerializeToString(), optimize=optimize), feeds)
    else:
        wide = {name: array.astype("float64") for name, array in feeds.items()}
        found = evaluate(with_floats(cut.proto, "float64"), wide)
    found |= {name: pieces.feeds[name] for name in cut.passed}
    return [
        PieceParity(
            name, nodes, _error(found[name], pieces.expected.get(name)),
            exact=pieces.exact is None or cut.stored[name] <= pieces.exact,
        )
        for name, nodes in cut.pieces.items()
    ]  # fmt: skip


def _error(found: Any, expected: Tensor | None) -> float:
    """The largest relative difference; NaN for a value without a counterpart in the parent, such as an extra output."""
    return math.nan if expected is None else layer_error(torch.from_numpy(found), expected)


def between_gates(
    model: ir.Model, layers: Sequence[ExportedLayer], pieces: Pieces, *, engine: bool = True
) -> list[Gate]:
    """Gates on all pieces in the reference evaluator, in ONNX Runtime too if `engine`, and on operators in no piece."""
    evaluated = compare_between(model, layers, pieces, engine=False)
    gates = [
        _uncompared(model, layers),
        _gate([piece for piece in evaluated if piece.exact], EVALUATED_TOLERANCE, "evaluated in float64"),
    ]
    rounded = [piece for piece in evaluated if not piece.exact]
    if rounded:
        gates.append(_gate(rounded, HALF_TOLERANCE, "evaluated in float64 with constants of FP16"))
    if engine:
        gates.append(_gate(compare_between(model, layers, pieces, engine=True), ENGINE_TOLERANCE, "in ONNX Runtime"))
    return gates


def _gate(report: Sequence[PieceParity], tolerance: float, where: str) -> Gate:
    """Gate on the worst error; names the first differing piece and its operators, since later pieces depend on it."""
    if not report:
        return none_of(f"operators between products, {where}", 0, "no such operators")
    worst = max(report, key=lambda piece: math.inf if math.isnan(piece.error) else piece.error)
    first = next((piece for piece in report if not piece.error <= tolerance), worst)
    way = ", ".join(first.nodes[-_SHOWN:]) or "no operator of the graph"
    said = "the worst" if first.error <= tolerance else "the first that differs"
    return Gate(
        name=f"operators between products, {where}", value=worst.error, comparison=Comparison.AT_MOST,
        threshold=tolerance,
        detail=f"largest difference over the largest value, {len(report)} tensors; {said}: {first.value}, "
        f"computed by {way}",
    )  # fmt: skip


def _uncompared(model: ir.Model, layers: Sequence[ExportedLayer]) -> Gate:
    """Gate on the number of operators that no comparison runs, being neither in layers nor between them."""
    missing = _uncompared_nodes(model, layers)
    return none_of("operators compared nowhere", len(missing), ", ".join(missing[:_SHOWN]))
