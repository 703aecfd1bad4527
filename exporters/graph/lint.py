"""Checks before a file is written: values that an engine would misinterpret, and graphs that it would run slowly.

Engines do not refuse a NaN scale or a code that exceeds its bit width; they compute with it. All findings are collected
before the export is refused.
"""

from __future__ import annotations

import torch
from torch import nn

from exporters.graph.formats import OnnxFormat, fits_int4
from exporters.graph.trace import FloatGraph, owner, stored_bytes
from fp8pipe.artifact.finding import Finding
from fp8pipe.models.vision.exact import inexact_sites
from fp8pipe.models.vision.quantized import Codes, QuantizedVit
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BlockCodes
from fp8pipe.numerics.quantizers import weight_limits

# The largest size of a protobuf file, bytes.
_LARGEST_FILE_BYTES = 2**31 - 1
_LARGEST_NIBBLE = 15  # the largest E2M1 code, stored one per byte


def lint_model(quantized: QuantizedVit, format: OnnxFormat, *, runtime: bool = True) -> list[Finding]:
    """Check an artifact's values, and whether the format can represent them; returns all findings.

    `runtime` says whether ONNX Runtime will run the graph: it does not support four-bit floats.
    """
    findings = []
    if not quantized.weights:
        findings.append(
            Finding("nothing-quantized", "the model", "no weight is quantized", "export an artifact of quantize-vit")
        )
    for name, weight in quantized.weights.items():
        findings += _values(name, weight)
    if runtime and any(weight.kind is Kind.NVFP4 for weight in quantized.weights.values()):
        findings.append(Finding("no-fp4", "weights", "ONNX Runtime has no kernels for NVFP4", "export to --target trt"))
    if format is OnnxFormat.INT4_WEIGHT_ONLY and not any(map(fits_int4, quantized.weights.values())):
        findings.append(
            Finding("int4-width", "weights", "no weight has 4-bit codes", "use --format qdq for this artifact")
        )
    if format.quantizes_activations:
        findings += _mixed(quantized)
    if format is OnnxFormat.QDQ_EXACT:
        why, fix = (
            "its sums are rounded, so the result depends on their order",
            "quantize to integers (wXaY), or use --format qdq",
        )
        findings += [Finding("no-exact-sum", name, why, fix) for name in inexact_sites(quantized)]
    for name, tensor in quantized.model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            findings.append(Finding("not-finite", name, "it holds NaN or infinity", "write the artifact again"))
    return findings


def lint_graph(traced: FloatGraph, model: nn.Module) -> list[Finding]:
    """Check a float graph before any pass; returns all findings.

    Every LayerNorm must be a single operator, since engines have one kernel for it, and the graph must fit into one
    ONNX file. `model` is the module from which the graph was traced.
    """
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    findings = [
        Finding(
            "layer-norm", owner(node, norms), f"the export split it into {node.op_type} and other operators",
            "use the versions of torch and onnxscript that this project was tested with",
        )
        for node in traced.model.graph
        if owner(node, norms) and node.op_type != "LayerNormalization"
    ]  # fmt: skip
    size = stored_bytes(traced.model)
    if size > _LARGEST_FILE_BYTES:
        findings.append(
            Finding(
                "file-size", "the float graph", f"{size} bytes", "an ONNX file holds at most 2 GB: use a smaller model"
            )
        )
    return findings


def _values(name: str, weight: Codes) -> list[Finding]:
    # Check one weight: scales must be positive and finite, and codes within their bit width and not NaN.
    findings = []
    if not bool((torch.isfinite(weight.scale) & (weight.scale > 0)).all()):
        findings.append(Finding("scale", name, "a scale is not a positive number", "quantize the model again"))
    if isinstance(weight, BlockCodes):
        beyond = int((weight.codes > _LARGEST_NIBBLE).sum())
        why = f"{beyond} codes have more than 4 bits"
        return [*findings, Finding("code-range", name, why, "quantize the model again")] if beyond else findings
    if weight.kind is Kind.E4M3:
        nan = int(torch.isnan(weight.codes.float()).sum())
        if nan:
            findings.append(Finding("e4m3-nan", name, f"{nan} codes are NaN", "quantize the model again"))
        return findings
    low, high = weight_limits(weight.bits)
    outside = int(((weight.codes < low) | (weight.codes > high)).sum())
    if outside:
        why = f"{outside} codes are outside {low}..{high} ({weight.bits} bits)"
        findings.append(Finding("code-range", name, why, "quantize the model again"))
    return findings


def _mixed(quantized: QuantizedVit) -> list[Finding]:
    """Findings on matrix multiplications of integers by FP8, for which no engine has a kernel."""
    findings = []
    groups = {site.name: f"{site.input_group}.input" for site in quantized.structure.linears}
    for name, weight in quantized.weights.items():
        activation = quantized.activations.get(groups[name])
        if activation is not None and activation.kind is not weight.kind:
            why = f"{weight.kind} weights, {activation.kind} activations"
            findings.append(Finding("mixed-kinds", name, why, "quantize weights and activations to the same type"))
    for attention in quantized.structure.attention_names:
        for pair in (("q", "k"), ("probs", "v")):
            kinds = {q.kind for what in pair if (q := quantized.activations.get(f"{attention}.{what}")) is not None}
            if len(kinds) > 1:
                findings.append(
                    Finding("mixed-kinds", f"{attention}.{pair[0]}", "int and e4m3 operands", "use one type for both")
                )
    return findings
