"""The gates of a graph: what was compared, against what, and the verdict.

In the ordinary graph engine and torch differ in last bits between the products, so only layers can be compared that
were fed the same input. In the exact one a float64 graph stands around integer products (`passes/exact.py`) and
nothing is left to the engine's choice (see `fp8pipe/models/vision/exact.py`), so the whole network is compared: all
codes on the way from the pixels to the answer, and the answer itself.

A quantized graph that falls back to float is right and slow, silently. So the optimized graph is written out, and for
every layer with integer codes on both sides the operator that makes its result is looked up (`check_kernels`).
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

# fp32 in another order through a whole float net: some 1e-6 of the largest output.
_FLOAT_GRAPH_TOLERANCE: Final = 1e-4


def float_gate(float_bytes: bytes, quantized: QuantizedVit, pixels: Tensor) -> Gate:
    """The float graph against the float model: everything that is not quantized, with another batch than the traced."""
    model = without_activations(quantized, {})
    with torch.no_grad():
        expected = model(pixels[:3])
    found = torch.from_numpy(run(open_session(float_bytes), {INPUT_NAME: pixels[:3].numpy()})[OUTPUT_NAME])
    same = found.shape == expected.shape
    error = float((found - expected).abs().max() / expected.abs().max()) if same else math.nan
    detail = f"largest difference over largest output, batch of {len(expected)}, before quantization"
    return at_most("float graph error", error, _FLOAT_GRAPH_TOLERANCE, detail)


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
    return none_of(name, differing, detail)


def layer_error_gate(name: str, errors: Mapping[str, float], tolerance: float) -> Gate:
    """The worst of some layers' errors."""
    worst = max(errors, key=lambda layer: math.inf if math.isnan(errors[layer]) else errors[layer])
    detail = f"against the exact result of the codes, over the layer's largest output; {len(errors)} layers"
    return at_most(name, errors[worst], tolerance, f"{detail}, the worst: {worst}")


def kernel_gate(report: KernelReport) -> Gate:
    """Integer kernels for every layer of integer codes."""
    missing = report.float_layers
    detail = f"{report.integer} run on integers{'; the first that does not: ' + missing[0] if missing else ''}"
    return none_of("integer layers run in float", len(missing), detail)


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
            if mine.numel() == other.numel():  # NaN has a code, too, and is equal to nothing
                count = int(((mine != other) | ~values.isfinite().flatten()).sum())
            differing[name] = differing.get(name, 0) + count
    detail = f"of {compared} in {len(names)} sites, {len(pixels)} images, each net on its own"
    detail += next((f"; the first: {name}" for name, count in differing.items() if count), "")
    return none_of("codes differing end to end", sum(differing.values()), detail)


def outputs_gate(expected: Tensor, found: Tensor) -> Gate:
    """Outputs of the net `(N, C)` fp32, bit for bit; NaN is equal to nothing."""
    differing = expected.numel()
    if expected.shape == found.shape and expected.dtype == found.dtype == torch.float32:
        same = (expected.view(torch.int32) == found.view(torch.int32)) & expected.isfinite()
        differing = int((~same).sum())
    detail = f"of {expected.numel()} for {len(expected)} images, bit for bit"
    return none_of("outputs differing end to end", differing, detail)


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

    proto: Any = ir.to_proto(model)
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return bytes(proto.SerializeToString())


_INTEGER: Final = frozenset(("MatMulIntegerToFloat", "QLinearMatMul", "QGemm"))


class KernelReport(FrozenConfig):
    """Which operator runs each layer."""

    operators: dict[str, str] = Field(description="the operator of every layer in the optimized graph")
    integer: int = Field(ge=0, description="layers that run on integers")
    float_layers: list[str] = Field(description="layers with integer codes on both sides that run in float")


def check_kernels(model: Path, layers: Sequence[ExportedLayer]) -> KernelReport:
    """Optimize a graph file as in service, and look the layers up that `read_layers` found in it."""
    onnx_ir = import_onnx_package("onnx_ir")
    with tempfile.TemporaryDirectory(prefix="fp8pipe-graph-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(model, write_to=optimized)
        made_by = {value.name: node.op_type for node in onnx_ir.load(optimized).graph for value in node.outputs}
    # The product may have swallowed the bias, or not: either name may be the product's result.
    operators = {
        layer.label: made_by.get(layer.node.outputs[0].name) or made_by.get(layer.output.name, "fused away")
        for layer in layers
    }
    integer = [label for label, operator in operators.items() if operator in _INTEGER]
    wanted = [layer.label for layer in layers if layer.integer]
    return KernelReport(
        operators=operators, integer=len(integer), float_layers=[label for label in wanted if label not in integer]
    )
