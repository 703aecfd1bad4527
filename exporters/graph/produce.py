"""Makes a quantized graph in memory from an artifact's model: the float graph, then the passes of a format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import nn

from exporters.graph.formats import CLASSES_FILE, GraphDetails, GraphInput, GraphOutput, OnnxFormat
from exporters.graph.lint import lint_graph
from exporters.graph.passes.editing import Change
from exporters.graph.passes.exact import expand_gelus, make_islands
from exporters.graph.passes.products import name_products, split_gemms, strip_metadata, unfold_patches
from exporters.graph.passes.quantize import quantize_activations, quantize_weights
from exporters.graph.trace import INPUT_NAME, OUTPUT_NAME, FloatGraph, trace_float
from fp8pipe.artifact.finding import refuse
from fp8pipe.models.vision.architecture import build
from fp8pipe.models.vision.exact import double_model
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, write_model_file
from fp8pipe.models.vision.quantized import Codes, QuantizedVit, of_type
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import ActivationQuantizer, WeightCodes


@dataclass(frozen=True, slots=True)
class QuantizedGraph:
    """A graph ready to be written."""

    model: ir.Model  # the graph
    # the same graph before quantization (with dequantized weights), serialized, for comparison; empty for the exact
    # format, which is compared end to end
    float_bytes: bytes
    changes: tuple[Change, ...]  # what each pass changed


def float_model(quantized: QuantizedVit) -> nn.Module:
    """The prepared model with dequantized weights and without quantizers, as it is traced."""
    model = build(quantized.architecture)
    model.load_state_dict(quantized.model.state_dict())
    return model


def as_exported(quantized: QuantizedVit, format: OnnxFormat) -> QuantizedVit:
    """The model that an export of this format computes: without activation quantizers for weight-only formats."""
    return quantized if format.quantizes_activations else without_activations(quantized, quantized.weights)


def without_activations(quantized: QuantizedVit, weights: Mapping[str, Codes]) -> QuantizedVit:
    """A copy of the model without activation quantizers, with plain attention and dequantized weights.

    `weights` are the codes that the copy reports as its quantized weights, by layer; they may be empty.
    """
    # A new model, because `quantized.model` has hooks that quantize its activations.
    return QuantizedVit(
        float_model(quantized), quantized.architecture, quantized.preprocessing, quantized.structure, weights, {}
    )


def trace_linted(model: nn.Module, structure: VitStructure, source: str) -> FloatGraph:
    """The float graph of a prepared float model, before any pass; `source` is the artifact's name in messages.

    Raises:
        LintFindingsError: the traced graph is unsuitable for quantization.
        ConfigurationError: the model cannot be traced, or its layers are not found in the graph.
    """
    traced = trace_float(model, structure)
    refuse(lint_graph(traced, model), source)
    return traced


def quantize_graph(quantized: QuantizedVit, format: OnnxFormat, source: str) -> QuantizedGraph:
    """Trace a model, lint its float graph, and apply the passes of a format; `source` is for messages.

    The exact format uses float64 and needs integer codes throughout.

    Raises:
        LintFindingsError, ConfigurationError: as `trace_linted`.
    """
    exact, int4 = format is OnnxFormat.QDQ_EXACT, format is OnnxFormat.INT4_WEIGHT_ONLY
    traced = trace_linted(double_model(quantized) if exact else float_model(quantized), quantized.structure, source)
    float_bytes = b"" if exact else ir.to_proto(traced.model).SerializeToString()
    changes = [split_gemms(traced), *([unfold_patches(traced)] if exact else [])]
    changes.append(quantize_weights(traced, of_type(quantized.weights, WeightCodes), int4=int4, zero_points=True))
    if format.quantizes_activations:
        # Integer codes: one pair per consumer, which ONNX Runtime needs; FP8, which it runs in float: shared pairs.
        activations = of_type(quantized.activations, ActivationQuantizer)
        integer = any(q.kind is Kind.INT for q in activations.values())
        changes.append(quantize_activations(traced, quantized.structure, activations, share=not integer))
    changes.append(name_products(traced))
    if exact:
        changes += [make_islands(traced), expand_gelus(traced.model)]
    changes.append(strip_metadata(traced.model))
    return QuantizedGraph(traced.model, float_bytes, tuple(changes))


def write_description(root: Path, quantized: QuantizedVit) -> None:
    """Write preprocessing.json, and classes.json for a classifier."""
    write_model_file(quantized.preprocessing, root / PREPROCESSING_FILE)
    if quantized.architecture.classes is not None:
        text = json.dumps(quantized.architecture.classes, ensure_ascii=False, indent=2) + "\n"
        (root / CLASSES_FILE).write_text(text, encoding="utf-8")


def graph_details(graph: QuantizedGraph, quantized: QuantizedVit, format: str) -> GraphDetails:
    """The details that the manifest records about a graph."""
    return GraphDetails(
        format=format,
        input=GraphInput(name=INPUT_NAME, shape=("batch", 3, *quantized.architecture.image_size)),
        output=GraphOutput(
            name=OUTPUT_NAME,
            what="logits" if quantized.architecture.classes else "features",
            activation=quantized.architecture.activation,
        ),
        passes={change.name: len(change.changed) for change in graph.changes},
    )
