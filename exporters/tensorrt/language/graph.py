"""A FALQON artifact as the graph that TensorRT builds well: its codes, static scales, float islands, and a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exporters.graph.findings import LintFindingsError
from exporters.graph.passes import Change, name_products, quantize_weights, strip_metadata
from exporters.tensorrt.half import refuse_not_half
from exporters.tensorrt.language.passes import quantize_inputs, tie_head, type_scales
from exporters.tensorrt.language.source import LanguageModel
from exporters.tensorrt.language.trace import CacheShape, cache_shape, trace_decoder
from exporters.tensorrt.options import Base
from fp8pipe.artifact.finding import Finding

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["TORCH_TYPES", "DecoderGraph", "decoder_graph"]

TORCH_TYPES = {Base.FP16: torch.float16, Base.FP32: torch.float32}


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """The graph before it is written.

    Attributes:
        model: strongly typed.
        changes: what the passes did.
        cache: shape of the cache; none for a graph without one.
    """

    model: ir.Model
    changes: tuple[Change, ...]
    cache: CacheShape | None


def decoder_graph(model: LanguageModel, scales: Mapping[str, float], base: Base, *, cache: bool) -> DecoderGraph:
    """Trace and rewrite.

    Args:
        model: the artifact.
        scales: static activation scales by layer.
        base: type of what is not quantized.
        cache: with a key/value cache.

    Raises:
        ConfigurationError: it cannot be traced, or its layers are not found in the graph.
        LintFindingsError: a scale or a tensor that FP16 does not hold.
    """
    import onnx_ir as ir

    dtype = TORCH_TYPES[base]
    decoder = model.torch_model(dtype)
    refuse_overflow(model, dtype)
    traced = trace_decoder(decoder, list(model.weights), cache=cache)
    shape = cache_shape(decoder)
    changes = [
        strip_metadata(traced.model),  # first: it takes the tracer's prefix off names, and ours have none
        quantize_weights(traced, model.weights),
        quantize_inputs(traced, scales),
        name_products(traced),
        tie_head(traced.model),
    ]
    traced.model.graph.name = "decoder"
    fix = "export with --base fp32, or train with a rule whose scales are powers of two (live)"
    with refuse_not_half(str(model.root), fix):
        changes.append(type_scales(traced.model, ir.DataType.FLOAT16 if base is Base.FP16 else ir.DataType.FLOAT))
    return DecoderGraph(traced.model, tuple(changes), shape if cache else None)


def refuse_overflow(model: LanguageModel, dtype: torch.dtype) -> None:
    """Refuse float tensors with values beyond the base type.

    Raises:
        LintFindingsError: naming every one.
    """
    findings = [
        Finding("not-half", name, f"a value beyond the largest of {dtype}", "export with --base fp32")
        for name, tensor in model.floats.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor.to(dtype)).all()
    ]
    if findings:
        raise LintFindingsError(findings, str(model.root))
