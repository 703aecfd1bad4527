"""From an artifact's model to a quantized graph in memory: the float graph, then the passes of a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from exporters.graph.formats import OnnxFormat
from exporters.graph.lint import lint_graph, refuse
from exporters.graph.passes import (
    Change,
    name_products,
    quantize_activations,
    quantize_weights,
    split_gemms,
    strip_metadata,
    unfold_patches,
)
from exporters.graph.passes.gelu import expand_gelus
from exporters.graph.passes.islands import make_islands
from exporters.graph.trace import FloatGraph, trace_float
from fp8pipe.models.vision.architecture import build
from fp8pipe.models.vision.exact import double_model
from fp8pipe.models.vision.quantized import Codes, QuantizedVit, of_type
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import ActivationQuantizer, WeightCodes

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["QuantizedGraph", "as_exported", "float_model", "quantize_graph", "trace_linted", "unquantized"]


@dataclass(frozen=True, slots=True)
class QuantizedGraph:
    """A graph ready to be written.

    Attributes:
        model: the graph.
        float_bytes: the same graph before it was quantized (with dequantized weights), serialized, for comparison;
            empty for the exact format, which is compared whole.
        changes: what each pass did.
    """

    model: ir.Model
    float_bytes: bytes
    changes: tuple[Change, ...]


def float_model(quantized: QuantizedVit) -> nn.Module:
    """The prepared model with dequantized weights and nothing that quantizes: what is traced."""
    model = build(quantized.architecture)
    model.load_state_dict(quantized.model.state_dict())
    return model


def as_exported(quantized: QuantizedVit, format: OnnxFormat) -> QuantizedVit:
    """The model that an export of this format computes: without activation quantizers for weights alone."""
    if format.quantizes_activations:
        return quantized
    return _with(quantized, quantized.weights)


def unquantized(quantized: QuantizedVit) -> QuantizedVit:
    """The float model with dequantized weights, its attentions by the plain formula: what is traced."""
    return _with(quantized, {})


def _with(quantized: QuantizedVit, weights: Mapping[str, Codes]) -> QuantizedVit:
    # From a fresh model: `quantized.model` carries the hooks that quantize its activations.
    return QuantizedVit(
        float_model(quantized), quantized.architecture, quantized.preprocessing, quantized.structure, weights, {}
    )


def trace_linted(model: nn.Module, structure: VitStructure, source: str) -> FloatGraph:
    """The float graph of a prepared float model, before any pass; `source` is the artifact's name in messages.

    Raises:
        LintFindingsError: the traced graph cannot be quantized well.
        ConfigurationError: it cannot be traced, or its layers are not found in the graph.
    """
    traced = trace_float(model, structure)
    refuse(lint_graph(traced, model), source)
    return traced


def quantize_graph(quantized: QuantizedVit, format: OnnxFormat, source: str) -> QuantizedGraph:
    """Trace, lint and rewrite; for the exact format in float64, and with integer codes throughout.

    Raises:
        LintFindingsError, ConfigurationError: as `trace_linted`.
    """
    import onnx_ir as ir

    exact, int4 = format is OnnxFormat.QDQ_EXACT, format is OnnxFormat.INT4_WEIGHT_ONLY
    traced = trace_linted(double_model(quantized) if exact else float_model(quantized), quantized.structure, source)
    float_bytes = b"" if exact else ir.to_proto(traced.model).SerializeToString()
    changes = [split_gemms(traced), *([unfold_patches(traced)] if exact else [])]
    changes.append(quantize_weights(traced, of_type(quantized.weights, WeightCodes), int4=int4, zero_points=True))
    if format.quantizes_activations:
        # Integer codes: one pair for each reader, which ONNX Runtime needs; FP8, which it runs in float: shared pairs.
        activations = of_type(quantized.activations, ActivationQuantizer)
        integer = any(q.kind is Kind.INT for q in activations.values())
        changes.append(quantize_activations(traced, quantized.structure, activations, share=not integer))
    changes.append(name_products(traced))
    if exact:
        changes += [make_islands(traced), expand_gelus(traced.model)]
    changes.append(strip_metadata(traced.model))
    return QuantizedGraph(traced.model, float_bytes, tuple(changes))
