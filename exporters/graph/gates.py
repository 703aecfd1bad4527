"""The gates of a graph: what was compared, against what, and the verdict.

In the ordinary graph engine and torch differ in last bits between the products, so only layers can be compared that
were fed the same input. In the exact one a float64 graph stands around integer products (`passes/exact.py`) and
nothing is left to the engine's choice (see `fp8pipe/models/vision/exact.py`), so the whole network is compared: all
codes on the way from the pixels to the answer, and the answer itself.

A quantized graph that falls back to float is right and slow, silently. So the optimized graph is written out, and for
every layer with integer codes on both sides the operator that makes its result is looked up (`check_kernels`).

Do both sides choose the same class, and if not, was it a near-tie? How close two logits must be to count as tied is
measured, not chosen: torch runs again with the output of every layer disturbed by what a correct engine may differ
there. Noise in the pixels would not do, since the quantizer of the first layer absorbs it.
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
from fp8pipe.artifact import Comparison, Gate, at_most, none_of
from fp8pipe.core.config import FrozenConfig
from fp8pipe.models.vision.exact import ExactVit
from fp8pipe.models.vision.quantized import QuantizedVit

# fp32 in another order through a whole float net: some 1e-6 of the largest output.
_FLOAT_GRAPH_TOLERANCE: Final = 1e-4
# On pictures a trained model is sure of most, so few can be near-ties. Where low bits make the model itself so
# sensitive that it keeps fewer under rounding errors, an engine may fall behind that by three standard errors.
_LEAST_AGREEMENT: Final = 0.995
_STANDARD_ERRORS: Final = 3.0


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


def class_gates(agreement: ClassAgreement) -> list[Gate]:
    """The whole net: classes that differ without being near-ties."""
    clear, ties = agreement.clear_disagreements, agreement.disagreements
    detail = f"{agreement.agreeing} of {agreement.images} images agree ({agreement.source})"
    detail += f"; outputs differ by up to {agreement.largest_difference:.1e} (relative)"
    if ties:
        margins = ", ".join(f"{tie.margin:.2g}" for tie in ties[:5])
        detail += f"; margins of the differing: {margins} (near-tie: {agreement.near_tie:.2g})"
    value = len(clear) if math.isfinite(agreement.largest_difference) else math.nan
    return [none_of("clear top-1 disagreements", value, detail)]


def agreement_gate(agreement: ClassAgreement, own: float) -> Gate:
    """The share of pictures that both sides give the same class.

    `own` is the agreement of the reference with itself, its layers disturbed by rounding errors (`own_agreement`).
    """
    share = agreement.agreeing / agreement.images
    spread = _STANDARD_ERRORS * math.sqrt(own * (1 - own) / agreement.images)
    least = min(_LEAST_AGREEMENT, own - spread)
    detail = f"{agreement.agreeing} of {agreement.images} {agreement.source}; the reference keeps {own:.1%} of its "
    return Gate(
        name="top-1 agreement", value=share, comparison=Comparison.AT_LEAST, threshold=least,
        detail=detail + "own classes when each of its layers is disturbed by 1e-6",
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
    compared = differing = 0
    pixels = pixels[:_CODE_IMAGES]
    for batch in torch.split(pixels, _BATCH):
        ours: dict[str, Tensor] = {}
        exact(batch, on_codes=ours.__setitem__)
        theirs = run(session, {INPUT_NAME: batch.numpy()})
        for site, name in names.items():
            mine = _in_layout(ours[site], site, quantized).flatten()
            other = quantized.activations[site].codes(torch.from_numpy(theirs[name])).flatten()
            compared += mine.numel()
            differing += mine.numel() if mine.numel() != other.numel() else int((mine != other).sum())
    detail = f"of {compared} in {len(names)} sites, {len(pixels)} images, each net on its own"
    return none_of("codes differing end to end", differing, detail)


def outputs_gate(expected: Tensor, found: Tensor) -> Gate:
    """Outputs of the net `(N, C)` fp32, bit for bit."""
    differing = expected.numel()
    if expected.shape == found.shape and expected.dtype == found.dtype == torch.float32:
        differing = int((expected.view(torch.int32) != found.view(torch.int32)).sum())
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


_RUNS: Final = 2
_AGREEMENT_BATCH: Final = 64
# Both logits of a pair may move by the noise, towards each other.
_NEAR_TIE_FACTOR: Final = 2.0


class NearTie(FrozenConfig):
    """An image whose class differs."""

    image: int = Field(ge=0, description="its number")
    expected_class: int = Field(description="the reference's choice")
    engine_class: int = Field(description="the engine's choice")
    margin: float = Field(description="how far the reference's logits of these two classes are apart")


class ClassAgreement(FrozenConfig):
    """The whole net on images, the reference against the engine."""

    images: int = Field(ge=0, description="images compared")
    source: str = Field(description="where they come from")
    agreeing: int = Field(ge=0, description="images with the same class (features: with the same largest feature)")
    largest_difference: float = Field(description="largest relative difference of an image's outputs (L2); NaN fails")
    near_tie: float = Field(description="largest margin that counts as a near-tie")
    disagreements: list[NearTie] = Field(description="images whose class differs")

    @property
    def clear_disagreements(self) -> list[NearTie]:
        """Those that are no near-ties."""
        return [found for found in self.disagreements if not found.margin <= self.near_tie]


def measure_noise(quantized: QuantizedVit, pixels: Tensor, expected: Tensor) -> float:
    """The largest margin that rounding errors may close: twice the largest change of an output in disturbed runs.

    `pixels` (N, 3, H, W) are normalized, and `expected` (N, C) are the outputs for them.
    The result is in units of the outputs; 0 where no code is near enough to a border to change.
    """
    changes = [float((_disturbed(quantized, pixels, seed) - expected).abs().max()) for seed in range(_RUNS)]
    return _NEAR_TIE_FACTOR * max(changes)


def compare_classes(expected: Tensor, found: Tensor, near_tie: float, source: str) -> ClassAgreement:
    """Compare the reference's outputs `(N, C)` with an engine's; `near_tie` as of `measure_noise`."""
    relative = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    ours, theirs = expected.argmax(1), found.argmax(1)
    differing = [
        NearTie(image=i, expected_class=int(a), engine_class=int(b), margin=float(expected[i, a] - expected[i, b]))
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if a != b
    ]
    return ClassAgreement(
        images=len(expected),
        source=source,
        agreeing=len(expected) - len(differing),
        largest_difference=float(relative.max()),
        near_tie=near_tie,
        disagreements=differing,
    )


def own_agreement(quantized: QuantizedVit, pixels: Tensor, expected: Tensor) -> float:
    """The share of images `(N, 3, H, W)` whose class the model keeps when its own layers are disturbed.

    What a model does not keep here, no engine can be asked to keep either: its sums round in another order.
    """
    parts = [_disturbed(quantized, batch, seed) for seed, batch in enumerate(torch.split(pixels, _AGREEMENT_BATCH))]
    return float((torch.cat(parts).argmax(1) == expected.argmax(1)).float().mean())


@torch.no_grad()
def _disturbed(quantized: QuantizedVit, pixels: Tensor, seed: int) -> Tensor:
    """The outputs when every layer's result is off by 1e-6 of its largest value, of random sign."""
    random = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=random) * 2 - 1
        disturbed: Tensor = output + INTEGER_TOLERANCE * output.abs().max() * signs
        return disturbed

    layers = [quantized.model.get_submodule(name) for name in quantized.structure.linear_names]
    handles = [layer.register_forward_hook(disturb) for layer in layers]
    try:
        outputs: Tensor = quantized(pixels)
        return outputs
    finally:
        for handle in handles:
            handle.remove()
