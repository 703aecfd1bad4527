"""The gates of an exported graph: which results are compared, and with which tolerances.

In the ordinary format, engine and torch differ in the last bits between matrix multiplications, so only layers that are
fed the same input can be compared. In the exact format, integer matrix multiplications are surrounded by float64
(`passes/exact.py`) and the result does not depend on the engine (see `fp8pipe/models/vision/exact.py`), so the whole
network is compared: all codes from the pixels to the output, and the output itself.

A quantized graph that falls back to float is correct but silently slow. So the optimized graph is written to a file,
and for every layer with integer codes on both sides the operator that computes its result is looked up
(`check_kernels`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from exporters.graph.layers import ExportedLayer
from exporters.graph.parity import FLOAT_TOLERANCE, INTEGER_TOLERANCE, LayerParity
from exporters.graph.produce import without_activations
from exporters.graph.reopen import operand_at_sites
from exporters.graph.runtime import import_onnx_package, open_session, run
from exporters.graph.trace import INPUT_NAME, OUTPUT_NAME
from fp8pipe.artifact import Gate, at_most, none_of
from fp8pipe.core.config import FrozenConfig
from fp8pipe.models.vision.exact import ExactVit
from fp8pipe.models.vision.quantized import QuantizedVit

# fp32 sums in a different order through a whole float model: some 1e-6 of the largest output.
_FLOAT_GRAPH_TOLERANCE: Final = 1e-4


def float_gate(float_bytes: bytes, quantized: QuantizedVit, pixels: Tensor) -> Gate:
    """Compare the float graph, before quantization, with the float model in torch.

    `float_bytes` is the serialized graph. The first three of `pixels` (N, 3, H, W) are used: another batch size than
    the one that was traced.
    """
    model = without_activations(quantized, {})
    with torch.no_grad():
        expected = model(pixels[:3])
    found = torch.from_numpy(run(open_session(float_bytes), {INPUT_NAME: pixels[:3].numpy()})[OUTPUT_NAME])
    same = found.shape == expected.shape
    error = float((found - expected).abs().max() / expected.abs().max()) if same else math.nan
    detail = f"largest difference relative to the largest output, batch of {len(expected)}, before quantization"
    return at_most("float graph error", error, _FLOAT_GRAPH_TOLERANCE, detail)


def parity_gates(report: Sequence[LayerParity]) -> list[Gate]:
    """Gates on the layers' codes and outputs; an output gate is left out if no layer of its kind occurs."""
    kinds = (
        ("integer layer error", {layer.layer: layer.error for layer in report if layer.integer}, INTEGER_TOLERANCE),
        ("float layer error", {layer.layer: layer.error for layer in report if not layer.integer}, FLOAT_TOLERANCE),
        ("torch layer error", torch_errors(report), FLOAT_TOLERANCE),
    )
    codes = layer_codes_gate("activation codes differing", report)
    return [codes, *(layer_error_gate(name, errors, tolerance) for name, errors, tolerance in kinds if errors)]


def torch_errors(report: Sequence[LayerParity]) -> dict[str, float]:
    """Errors of torch's outputs by layer, without layers for which none was computed."""
    return {layer.layer: layer.torch_error for layer in report if layer.torch_error is not None}


def layer_codes_gate(name: str, report: Sequence[LayerParity]) -> Gate:
    """Gate on the number of differing activation codes in all layers, which must be 0."""
    differing = sum(layer.differing_codes for layer in report)
    detail = f"of {sum(layer.codes for layer in report)} in {len(report)} layers, each fed the same input"
    return none_of(name, differing, detail)


def layer_error_gate(name: str, errors: Mapping[str, float], tolerance: float) -> Gate:
    """Gate on the largest of these relative errors, which are given by layer and must not be empty; NaN fails."""
    worst = max(errors, key=lambda layer: math.inf if math.isnan(errors[layer]) else errors[layer])
    detail = f"against the exact result of the codes, relative to the layer's largest output; {len(errors)} layers"
    return at_most(name, errors[worst], tolerance, f"{detail}, the worst: {worst}")


def kernel_gate(report: KernelReport) -> Gate:
    """Gate on the number of layers with integer codes that do not run in an integer kernel, which must be 0."""
    missing = report.float_layers
    detail = f"{report.integer} run in integers{'; the first that does not: ' + missing[0] if missing else ''}"
    return none_of("integer layers run in float", len(missing), detail)


_CODE_IMAGES: Final = 16
_BATCH: Final = 8  # the codes of the whole model are kept in memory for this many images at a time


def codes_gate(model: ir.Model, layers: Sequence[ExportedLayer], quantized: QuantizedVit, pixels: Tensor) -> Gate:
    """Compare all activation codes in the model, ONNX Runtime against torch.

    ONNX Runtime returns the input of each quantizer, and its codes are computed from that in torch. The comparison of
    single layers checks that torch and ONNX Runtime compute the same codes from the same input.

    `layers` are those of `model`, read from its file. Of the normalized `pixels` (N, 3, H, W), the first 16 are used.
    """
    exact, sites = ExactVit(quantized), operand_at_sites(layers, quantized)
    names = {site: str(operand.source.name) for site, operand in sites if operand is not None and operand.source}
    session = open_session(_with_sources(model, list(names.values())))
    compared, differing = 0, dict[str, int]()
    pixels = pixels[:_CODE_IMAGES]
    for batch in torch.split(pixels, _BATCH):
        ours: dict[str, Tensor] = {}
        exact(batch, on_codes=ours.__setitem__)
        theirs = run(session, {INPUT_NAME: batch.numpy()})
        for site, name in names.items():
            mine = _in_layout(ours[site], site, quantized).flatten()
            values = torch.from_numpy(theirs[name])
            other = quantized.activations[site].codes(values).flatten()
            compared += mine.numel()
            count = mine.numel()
            if mine.numel() == other.numel():  # NaN has a code, too, but never counts as equal
                count = int(((mine != other) | ~values.isfinite().flatten()).sum())
            differing[name] = differing.get(name, 0) + count
    detail = f"of {compared} in {len(names)} sites, {len(pixels)} images, each model running end to end"
    detail += next((f"; the first: {name}" for name, count in differing.items() if count), "")
    return none_of("codes differing end to end", sum(differing.values()), detail)


def outputs_gate(expected: Tensor, found: Tensor) -> Gate:
    """Compare the model's outputs `(N, C)`, fp32, in torch (`expected`) and the engine (`found`) bit for bit.

    NaN and infinity never count as equal.
    """
    differing = expected.numel()
    if expected.shape == found.shape and expected.dtype == found.dtype == torch.float32:
        same = (expected.view(torch.int32) == found.view(torch.int32)) & expected.isfinite()
        differing = int((~same).sum())
    detail = f"of {expected.numel()} for {len(expected)} images, bit for bit"
    return none_of("outputs differing end to end", differing, detail)


def _in_layout(codes: Tensor, site: str, quantized: QuantizedVit) -> Tensor:
    """Rearrange torch's codes into the graph's layout: keys are transposed, and every patch of pixels becomes a row."""
    if site.endswith(".k"):
        return codes.transpose(-2, -1).contiguous()
    layer = quantized.model.get_submodule(site.removesuffix(".input")) if site.endswith(".input") else None
    if isinstance(layer, nn.Conv2d):
        return functional.unfold(codes.float(), layer.kernel_size, stride=layer.stride).transpose(1, 2).to(torch.int8)
    return codes


def _with_sources(model: ir.Model, names: Sequence[str]) -> bytes:
    """Serialize the graph with the named values, the inputs of its quantizers, as additional outputs.

    The codes themselves are not made outputs: ONNX Runtime would then multiply in float.
    """
    import onnx

    proto: Any = ir.to_proto(model)
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return bytes(proto.SerializeToString())


_INTEGER: Final = frozenset(("MatMulIntegerToFloat", "QLinearMatMul", "QGemm"))


class KernelReport(FrozenConfig):
    """Which operator of ONNX Runtime's optimized graph runs each layer."""

    operators: dict[str, str] = Field(description="the operator of every layer in the optimized graph")
    integer: int = Field(ge=0, description="layers that run in integers")
    float_layers: list[str] = Field(description="layers with integer codes on both sides that run in float")


def check_kernels(model: Path, layers: Sequence[ExportedLayer]) -> KernelReport:
    """Let ONNX Runtime optimize a graph file as in service, and look up which operator runs each layer.

    `layers` are the result of `read_layers` for the same file.
    """
    onnx_ir = import_onnx_package("onnx_ir")
    with tempfile.TemporaryDirectory(prefix="fp8pipe-graph-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(model, write_to=optimized)
        made_by = {value.name: node.op_type for node in onnx_ir.load(optimized).graph for value in node.outputs}
    # If the matmul was fused with its bias, only the name of the sum is left; otherwise the matmul keeps its own.
    operators = {
        layer.label: made_by.get(layer.node.outputs[0].name) or made_by.get(layer.output.name, "fused away")
        for layer in layers
    }
    integer = [label for label, operator in operators.items() if operator in _INTEGER]
    wanted = [layer.label for layer in layers if layer.integer]
    return KernelReport(
        operators=operators, integer=len(integer), float_layers=[label for label in wanted if label not in integer]
    )
