"""From an artifact's model to a quantized graph in memory: the float graph, then the passes of a format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from exporters.graph.exact import exact_graph
from exporters.graph.formats import OnnxFormat
from exporters.graph.lint import lint_graph, refuse
from exporters.graph.passes import (
    Change,
    name_products,
    quantize_activations,
    quantize_weights,
    split_gemms,
    strip_metadata,
)
from exporters.graph.trace import PlainGraph, export_plain
from fp8pipe.models.vision.architecture import build
from fp8pipe.models.vision.quantized import Codes, QuantizedVit, of_type
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import ActivationQuantizer, WeightCodes

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["QuantizedGraph", "as_exported", "float_model", "quantize_graph", "unquantized"]


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


def quantize_graph(quantized: QuantizedVit, format: OnnxFormat, source: str) -> QuantizedGraph:
    """Trace, lint and rewrite.

    Args:
        quantized: the artifact's model.
        format: what the graph shall hold.
        source: the artifact, for messages.

    Raises:
        LintFindingsError: the traced graph cannot be quantized well.
        ConfigurationError: it cannot be traced, or its layers are not found in the graph.
    """
    import onnx_ir as ir

    if format is OnnxFormat.QDQ_EXACT:
        exact, changed = exact_graph(quantized, source)
        return QuantizedGraph(exact, b"", changed)
    model = float_model(quantized)
    plain = export_plain(model, quantized.structure)
    refuse(lint_graph(plain, model), source)
    float_bytes = ir.to_proto(plain.model).SerializeToString()
    plain, split = split_gemms(plain)
    int4 = format is OnnxFormat.INT4_WEIGHT_ONLY
    weights = of_type(quantized.weights, WeightCodes)
    changes = [split, quantize_weights(plain, weights, int4=int4, zero_points=True)]
    if format is OnnxFormat.QDQ:
        changes.append(_activations(plain, quantized))
    changes += [name_products(plain), strip_metadata(plain.model)]
    return QuantizedGraph(plain.model, float_bytes, tuple(changes))


def _activations(plain: PlainGraph, quantized: QuantizedVit) -> Change:
    """Integer codes: one pair a reader, which ONNX Runtime needs; FP8, which it runs in float: shared pairs."""
    activations = of_type(quantized.activations, ActivationQuantizer)
    integer = any(q.kind is Kind.INT for q in activations.values())
    return quantize_activations(plain, quantized.structure, activations, share=not integer)
