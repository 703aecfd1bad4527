"""The gates of a graph: what was compared, against what, and the verdict.

In the ordinary graph engine and torch differ in last bits between the products, so only layers can be compared that
were fed the same input. In the exact one a float64 graph stands around integer products (`passes/islands.py`) and
nothing is left to the engine's choice (see `fp8pipe/models/vision/exact.py`), so the whole network is compared: all
codes on the way from the pixels to the answer, and the answer itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from exporters.graph.kernels import KernelReport
from exporters.graph.layers import ExportedLayer
from exporters.graph.parity import FLOAT_TOLERANCE, INTEGER_TOLERANCE, LayerParity
from exporters.graph.produce import unquantized
from exporters.graph.reopen import operand_at_sites
from exporters.graph.runtime import open_session, run
from exporters.graph.trace import INPUT_NAME, OUTPUT_NAME
from fp8pipe.artifact import Comparison, Gate, none_of
from fp8pipe.models.vision.exact import ExactVit
from fp8pipe.models.vision.quantized import QuantizedVit

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "codes_gate", "float_gate", "kernel_gate", "layer_codes_gate",
    "layer_error_gate", "outputs_gate", "parity_gates", "torch_errors",
]  # fmt: skip

# fp32 in another order through a whole float net: some 1e-6 of the largest output.
_FLOAT_GRAPH_TOLERANCE: Final = 1e-4


def float_gate(float_bytes: bytes, quantized: QuantizedVit, pixels: Tensor) -> Gate:
    """The float graph against the float model: everything that is not quantized, with another batch than the traced."""
    model = unquantized(quantized)
    with torch.no_grad():
        expected = model(pixels[:3])
    found = torch.from_numpy(run(open_session(float_bytes), {INPUT_NAME: pixels[:3].numpy()})[OUTPUT_NAME])
    same = found.shape == expected.shape
    error = float((found - expected).abs().max() / expected.abs().max()) if same else math.nan
    return Gate(
        name="float graph error", value=error, comparison=Comparison.AT_MOST, threshold=_FLOAT_GRAPH_TOLERANCE,
        detail=f"largest difference over largest output, batch of {len(expected)}, before quantization",
    )  # fmt: skip


def parity_gates(report: Sequence[LayerParity]) -> list[Gate]:
    """Codes and outputs, layer by layer; no gate for a kind of layer that is not there."""
    kinds = (
        ("integer layer error", {layer.layer: layer.error for layer in report if layer.integer}, INTEGER_TOLERANCE),
        ("float layer error", {layer.layer: layer.error for layer in report if not layer.integer}, FLOAT_TOLERANCE),
        ("torch layer error", torch_errors(report), FLOAT_TOLERANCE),
    )
    codes = layer_codes_gate("activation codes differing", report)
    return [codes, *(layer_error_gate(name, errors, tolerance) for name, errors, tolerance in kinds if errors)]


def torch_errors(report: Sequence[LayerParity]) -> dict[str, float]:
    """Errors of torch's own outputs by layer, where there are any."""
    return {layer.layer: layer.torch_error for layer in report if layer.torch_error is not None}


def layer_codes_gate(name: str, report: Sequence[LayerParity]) -> Gate:
    """Activation codes that differ, over all layers."""
    differing = sum(layer.differing_codes for layer in report)
    detail = f"of {sum(layer.codes for layer in report)} in {len(report)} layers, each fed the same input"
    return Gate(name=name, value=differing, detail=detail)


def layer_error_gate(name: str, errors: Mapping[str, float], tolerance: float) -> Gate:
    """The worst of some layers' errors."""
    worst = max(errors, key=lambda layer: math.inf if math.isnan(errors[layer]) else errors[layer])
    detail = f"against the exact result of the codes, over the layer's largest output; {len(errors)} layers"
    return Gate(
        name=name, value=errors[worst], comparison=Comparison.AT_MOST, threshold=tolerance,
        detail=f"{detail}, the worst: {worst}",
    )  # fmt: skip


def kernel_gate(report: KernelReport) -> Gate:
    """Integer kernels for every layer of integer codes."""
    missing = report.float_layers
    return Gate(
        name="integer layers run in float", value=len(missing),
        detail=f"{report.integer} run on integers{'; the first that does not: ' + missing[0] if missing else ''}",
    )  # fmt: skip


_CODE_IMAGES: Final = 16
_BATCH: Final = 8  # the codes of a whole net are kept for so many images at a time


def codes_gate(model: ir.Model, layers: Sequence[ExportedLayer], quantized: QuantizedVit, pixels: Tensor) -> Gate:
    """All activation codes on the way through the net, ONNX Runtime against torch.

    ONNX Runtime shows what each quantizer reads; the codes of that are made here, by the formula that the comparison of
    layers holds against its own.

    `layers` are those of `model`, as read from its file; of `pixels` (N, 3, H, W), normalized, the first are compared.
    """
    exact, sites = ExactVit(quantized), operand_at_sites(layers, quantized)
    names = {site: str(operand.source.name) for site, operand in sites if operand is not None and operand.source}
    session = open_session(_with_sources(model, list(names.values())))
    compared, first = 0, dict[str, int]()
    pixels = pixels[:_CODE_IMAGES]
    for batch in torch.split(pixels, _BATCH):
        ours: dict[str, Tensor] = {}
        exact(batch, on_codes=ours.__setitem__)
        theirs = run(session, {INPUT_NAME: batch.numpy()})
        for site, name in names.items():
            mine = _in_layout(ours[site], site, quantized)
            compared += mine.numel()
            found = quantized.activations[site].codes(torch.from_numpy(theirs[name]))
            first[name] = first.get(name, 0) + _count(mine, found)
    detail = f"of {compared} in {len(names)} sites, {len(pixels)} images, each net on its own"
    detail += next((f"; the first: {name}" for name, count in first.items() if count), "")
    return none_of("codes differing end to end", sum(first.values()), detail)


def outputs_gate(expected: Tensor, found: Tensor) -> Gate:
    """Outputs of the net `(N, C)` fp32, bit for bit."""
    differing = int((expected.view(torch.int32) != found.view(torch.int32)).sum()) if _alike(expected, found) else -1
    detail = f"of {expected.numel()} for {len(expected)} images, bit for bit"
    return none_of("outputs differing end to end", expected.numel() if differing < 0 else differing, detail)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype == torch.float32


def _count(a: Tensor, b: Tensor) -> int:
    return a.numel() if a.numel() != b.numel() else int((a.flatten() != b.flatten()).sum())


def _in_layout(codes: Tensor, site: str, quantized: QuantizedVit) -> Tensor:
    """The graph's order: keys transposed, pixels as rows of patches."""
    if site.endswith(".k"):
        return codes.transpose(-2, -1).contiguous()
    layer = quantized.model.get_submodule(site.removesuffix(".input")) if site.endswith(".input") else None
    if isinstance(layer, nn.Conv2d):
        return functional.unfold(codes.float(), layer.kernel_size, stride=layer.stride).transpose(1, 2).to(torch.int8)
    return codes


def _with_sources(model: ir.Model, names: Sequence[str]) -> bytes:
    """The graph with what its quantizers read as further outputs.

    Not the codes themselves: where QuantizeLinear is an output of the graph, ONNX Runtime multiplies in float.
    """
    import onnx
    import onnx_ir as ir

    proto: Any = ir.to_proto(model)
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return bytes(proto.SerializeToString())
