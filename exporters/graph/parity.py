"""Layer by layer, and as a whole: does ONNX Runtime compute what the quantized model computes in torch?

A quantized transformer is chaotic: a difference in the last bit of one layer moves an activation across the border of
two codes, and a few layers on the logits differ by percents, between any two correct implementations. So the
proof is made layer by layer, each fed the same input on both sides: every code must be equal, and every output is
compared with the exact result of those codes, in float64. An engine that adds integers is within 1e-6 of the layer's
largest output, since only its last multiplications round. Sums in fp32 (torch's, and an engine's for FP8 codes and
pixels) round at every addition: a thousand terms differ by some 1e-6 from the exact sum, so 1e-5 is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from exporters.graph.cut import cut_codes, cut_layers, input_name
from exporters.graph.layers import ExportedLayer, Operand
from exporters.graph.runtime import open_session, run
from exporters.graph.trace import ProductKind
from fp8pipe.core.config import FrozenConfig
from fp8pipe.models.vision.quantized import QuantizedVit
from fp8pipe.numerics.nvfp4 import BlockQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "FLOAT_TOLERANCE",
    "INTEGER_TOLERANCE",
    "LayerParity",
    "compare_layers",
    "exact_outputs",
    "in_rank",
    "inputs_of",
    "layer_error",
    "outputs_of",
]

INTEGER_TOLERANCE: Final = 1e-6
FLOAT_TOLERANCE: Final = 1e-5
# The smallest normal fp32 number: a layer whose exact output is zero everywhere.
_TINY: Final = 2.0**-126
# Where torch names the float tensors of a product, by its position.
_TAPS: Final = {
    ProductKind.LINEAR: ("input",), ProductKind.PATCH: ("input",), ProductKind.QK: ("q", "k"),
    ProductKind.AV: ("probs_in", "v"),
}  # fmt: skip


class LayerParity(FrozenConfig):
    """One layer, fed the same input on both sides."""

    layer: str = Field(description="the module; .qk and .av are the products of an attention")
    codes: int = Field(ge=0, description="activation codes compared")
    differing_codes: int = Field(ge=0, description="of these, how many differ")
    integer: bool = Field(description="whether the engine can multiply integers here")
    error: float = Field(description="the engine's largest error, in units of the layer's largest output; NaN fails")
    torch_error: float | None = Field(description="the same of torch's output; none where there is no torch model")

    @property
    def tolerance(self) -> float:
        """The largest accepted error of the engine."""
        return INTEGER_TOLERANCE if self.integer else FLOAT_TOLERANCE


def inputs_of(quantized: QuantizedVit, layers: Sequence[ExportedLayer], taps: Mapping[str, Any]) -> dict[str, Any]:
    """The float inputs of the cut layers, as torch has them: numpy arrays by the inputs' names in the cut model.

    `taps` are those of `quantized.taps(pixels)`.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        for operand, what in zip(layer.operands, _TAPS[layer.kind], strict=False):
            if operand.source is not None:
                tensor = taps[layer.name][what]
                tensor = tensor.transpose(-2, -1) if what == "k" else tensor
                found[input_name(operand.source)] = in_rank(tensor, operand.source).contiguous().numpy()
    return found


def outputs_of(layers: Sequence[ExportedLayer], taps: Mapping[str, Any]) -> dict[str, Tensor]:
    """The layers' results in torch, by label."""
    return {layer.label: taps[layer.name]["logits" if layer.kind is ProductKind.QK else "output"] for layer in layers}


def exact_outputs(layers: Sequence[ExportedLayer], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The layers' results in float64, from the codes and scales of the file; by label."""
    return {layer.label: _exact(layer, inputs) for layer in layers}


def compare_layers(
    model: ir.Model,
    layers: Sequence[ExportedLayer],
    inputs: Mapping[str, Any],
    torch_outputs: Mapping[str, Tensor] | None = None,
    *,
    optimize: bool = True,
) -> list[LayerParity]:
    """Run every layer in ONNX Runtime, optimized as in service, and compare it with the exact result.

    Args:
        model: the graph, as read from its file.
        layers: its layers.
        inputs: float inputs by their names in the cut model (see `inputs_of`).
        torch_outputs: what torch gives for them, by label (see `outputs_of`); compared too.
        optimize: False for graphs that another engine runs: every operator as it stands, no integer kernel of this
            CPU, and sums in float64, so that only the graph is judged.
    """
    outputs = run(open_session(cut_layers(model, layers, wide=not optimize), optimize=optimize), inputs)
    cut = cut_codes(model, layers)
    codes = {} if cut is None else run(open_session(cut), inputs)
    exact = exact_outputs(layers, inputs)
    report = []
    for layer in layers:
        compared, differing = _count_codes(layer, inputs, codes)
        expected = exact[layer.label]
        report.append(
            LayerParity(
                layer=layer.label, codes=compared, differing_codes=differing, integer=layer.integer,
                error=layer_error(torch.from_numpy(outputs[str(layer.output.name)]), expected),
                torch_error=None if torch_outputs is None else layer_error(torch_outputs[layer.label], expected),
            )
        )  # fmt: skip
    return report


def _count_codes(layer: ExportedLayer, inputs: Mapping[str, Any], codes: Mapping[str, Any]) -> tuple[int, int]:
    """Activation codes that were compared, and that differ."""
    compared = differing = 0
    for operand in layer.operands:
        if operand.quantizer is not None and operand.source is not None and operand.codes is not None:
            ours = operand.quantizer.codes(torch.from_numpy(inputs[input_name(operand.source)])).float()
            theirs = torch.from_numpy(codes[f"{operand.codes.name}/float"])
            compared += ours.numel()
            differing += int((ours != theirs).sum())
    return compared, differing


def _exact(layer: ExportedLayer, inputs: Mapping[str, Any]) -> Tensor:
    left, right = (_value(operand, inputs) for operand in layer.operands)
    if layer.kind is ProductKind.LINEAR:
        return functional.linear(left, right, None if layer.bias is None else layer.bias.double())
    if layer.kind is ProductKind.PATCH:
        bias = None if layer.bias is None else layer.bias.double()
        return functional.conv2d(left, right, bias, stride=layer.node.attributes.get_ints("strides"))
    return left @ right


def _value(operand: Operand, inputs: Mapping[str, Any]) -> Tensor:
    """One side of a product, float64, on its grid."""
    if operand.weight is not None:
        return operand.weight.dequantize().double()
    assert operand.source is not None
    x = torch.from_numpy(inputs[input_name(operand.source)])
    if operand.quantizer is None:
        return x.double()
    if isinstance(operand.quantizer, BlockQuantizer):
        return operand.quantizer.fake(x).double()  # exact already
    return operand.quantizer.codes(x).float().double() * operand.quantizer.scale


def layer_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest expected number; NaN where the sizes differ."""
    if found.numel() != expected.numel():
        return float("nan")
    difference = (found.double().reshape(expected.shape) - expected.double()).abs().max()
    return float(difference / expected.abs().max().clamp(min=_TINY))


def in_rank(tensor: Tensor, value: ir.Value) -> Tensor:
    """The same numbers in the graph's number of axes: the exporter may merge some that torch keeps apart."""
    shape = list(value.shape or ())
    if not shape or len(shape) == tensor.dim():
        return tensor
    return tensor.reshape(-1, *(int(side) for side in shape[1:]))  # type: ignore[arg-type]
