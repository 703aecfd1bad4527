"""The gates of an ONNX export: what was compared, against what, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from exporters.graph.classes import ClassAgreement
from exporters.graph.graph_check import KernelReport
from exporters.graph.parity import FLOAT_TOLERANCE, INTEGER_TOLERANCE, LayerParity
from exporters.graph.produce import unquantized
from exporters.graph.runtime import open_session, run
from exporters.graph.trace import INPUT_NAME, OUTPUT_NAME
from fp8pipe.artifact import Comparison, Gate
from fp8pipe.models.vision.quantized import QuantizedVit

__all__ = [
    "agreement_gate", "class_gates", "float_gate", "kernel_gate", "layer_codes_gate", "layer_error_gate",
    "parity_gates", "torch_errors",
]  # fmt: skip

# fp32 in another order through a whole float net: some 1e-6 of the largest output.
_FLOAT_GRAPH_TOLERANCE: Final = 1e-4
# On pictures a trained model is sure of most, so few can be near-ties. Where low bits make the model itself so
# sensitive that it keeps fewer under rounding errors, an engine may fall behind that by three standard errors.
_LEAST_AGREEMENT: Final = 0.995
_STANDARD_ERRORS: Final = 3.0


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


def class_gates(agreement: ClassAgreement) -> list[Gate]:
    """The whole net: classes that differ without being near-ties."""
    clear, ties = agreement.clear_disagreements, agreement.disagreements
    detail = f"{agreement.agreeing} of {agreement.images} images agree ({agreement.source})"
    detail += f"; outputs differ by up to {agreement.largest_difference:.1e} (relative)"
    if ties:
        margins = ", ".join(f"{tie.margin:.2g}" for tie in ties[:5])
        detail += f"; margins of the differing: {margins} (near-tie: {agreement.near_tie:.2g})"
    finite = math.isfinite(agreement.largest_difference)
    return [
        Gate(
            name="clear top-1 disagreements", value=len(clear) if finite else math.nan, detail=detail,
        )
    ]  # fmt: skip


def agreement_gate(agreement: ClassAgreement, own: float) -> Gate:
    """The share of pictures that both sides give the same class.

    Args:
        agreement: of the engine with the reference.
        own: of the reference with itself, its layers disturbed by rounding errors (`own_agreement`).
    """
    share = agreement.agreeing / agreement.images
    spread = _STANDARD_ERRORS * math.sqrt(own * (1 - own) / agreement.images)
    least = min(_LEAST_AGREEMENT, own - spread)
    detail = f"{agreement.agreeing} of {agreement.images} {agreement.source}; the reference keeps {own:.1%} of its "
    return Gate(
        name="top-1 agreement", value=share, comparison=Comparison.AT_LEAST, threshold=least,
        detail=detail + "own classes when each of its layers is disturbed by 1e-6",
    )  # fmt: skip
