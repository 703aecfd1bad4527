"""Makes the graph of a quantized vision model in a form that TensorRT builds well: strongly typed Q/DQ.

Chooses the format in which an artifact is exported, checks that the GPUs support it (only Blackwell's tensor cores
multiply NVFP4), and runs the passes: those of `exporters/graph`, those for NVFP4, and two that the builder needs, which
keep the queries' quantizers in place and limit the inputs of linears to three axes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

import numpy as np
import onnx_ir as ir

from exporters.graph.formats import fits_int4
from exporters.graph.passes.editing import Change, add_initializer, insert, stored_bias
from exporters.graph.passes.products import name_products, split_gemms, strip_metadata, unfold_patches
from exporters.graph.passes.quantize import (
    quantize_activations,
    quantize_block_activations,
    quantize_block_weights,
    quantize_weights,
    raise_opset,
)
from exporters.graph.produce import QuantizedGraph, float_model, trace_linted, without_activations
from exporters.graph.trace import FloatGraph, Product, ProductKind, stored_array
from exporters.tensorrt.lint.products import moved_quantizers
from exporters.tensorrt.lint.view import View
from exporters.tensorrt.target import TrtExportOptions, TrtFormat, compile_for
from fp8pipe.artifact.finding import Finding, refuse
from fp8pipe.models.vision.quantized import QuantizedVit, of_type
from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BlockCodes, BlockQuantizer
from fp8pipe.numerics.quantizers import INT8_MAX, INT8_MIN, ActivationQuantizer, WeightCodes

# The smallest block size that the builder accepts; most layers are divisible by it.
INT4_BLOCK = 32


def typed_graph(quantized: QuantizedVit, format: TrtFormat, source: str) -> QuantizedGraph:
    """Trace, lint and rewrite a model, which must be the result of `in_format` for the same format.

    All floats of the graph are float32; `halve` converts them. `source` is the artifact's name in messages.

    Raises:
        LintFindingsError, ConfigurationError: as `trace_linted`.
    """
    traced = trace_linted(float_model(quantized), quantized.structure, source)
    float_bytes = ir.to_proto(traced.model).SerializeToString()
    changes = [
        split_gemms(traced),
        unfold_patches(traced),
        *_prepared(traced, quantized),
        quantize_weights(
            traced, of_type(quantized.weights, WeightCodes), int4=format is TrtFormat.INT4_WEIGHT_ONLY, block=INT4_BLOCK
        ),
        quantize_block_weights(traced, of_type(quantized.weights, BlockCodes)),
        quantize_activations(
            traced, quantized.structure, of_type(quantized.activations, ActivationQuantizer), share=True
        ),
        quantize_block_activations(traced, quantized.structure, of_type(quantized.activations, BlockQuantizer)),
        name_products(traced),
        strip_metadata(traced.model),
        hold_queries(traced.model),
    ]
    return QuantizedGraph(traced.model, float_bytes, tuple(changes))


def _prepared(traced: FloatGraph, quantized: QuantizedVit) -> list[Change]:
    """Changes only for NVFP4: a newer opset, and at most three axes where activations are quantized in blocks."""
    if not of_type(quantized.weights, BlockCodes):
        return []
    sites = of_type(quantized.activations, BlockQuantizer)
    rounded = [site.name for site in quantized.structure.linears if f"{site.input_group}.input" in sites]
    return [raise_opset(traced.model, activations=bool(sites)), flatten_products(traced, rounded)]


_QUERIES = ".q/QuantizeLinear"  # how the names of the queries' quantizers end
_MOST_AXES = 3  # of an input of TensorRT's dynamic quantizer


def hold_queries(model: ir.Model) -> Change:
    """Clip every quantized query to its range, even where quantizing alone would saturate it; in place.

    The builder moves a quantizer upwards, through transposes and slices, into the matrix multiplication that produces
    its input. The joint multiplication for queries, keys and values has three such quantizers with different scales; to
    apply them the builder folds the scales into the weights, which it dequantizes for that purpose. The result is an
    FP8 or INT8 model whose largest matrix multiplications silently run in half precision. A Clip cannot be moved, so it
    keeps one of the three quantizers in place, and with it the weights' codes. Its bounds are the values of the
    smallest and largest code, so it changes no code.

    In other matrix multiplications with several such quantizers (for example keys and values in attention pooling), the
    first quantizer by name gets a Clip. The linter's `moved_quantizers` finds them.
    """
    queries = [n for n in model.graph if n.op_type == "QuantizeLinear" and (n.name or "").endswith(_QUERIES)]
    changed = [_clip(model.graph, node) for node in queries if _unclipped(node)]
    for product in View(model).products:
        if len(moved := moved_quantizers(product)) > 1:
            changed.append(_clip(model.graph, min(moved, key=lambda node: str(node.name))))
    return Change("hold_queries", tuple(changed))


def _unclipped(quantize: ir.Node) -> bool:
    producer = quantize.inputs[0].producer() if quantize.inputs[0] is not None else None
    return producer is None or producer.op_type != "Clip"


def _clip(graph: ir.Graph, quantize: ir.Node) -> str:
    # Insert a Clip to the range of the codes before a quantizer; returns the quantizer's site.
    value = quantize.inputs[0]
    assert value is not None
    site = str(quantize.name).removesuffix("/QuantizeLinear")
    scale, zero = quantize.inputs[1], quantize.inputs[2]
    assert zero is not None
    low, high = (INT8_MIN, INT8_MAX) if zero.dtype == ir.DataType.INT8 else (-E4M3.max, E4M3.max)
    step = stored_array(scale)
    bounds = [
        add_initializer(graph, f"{site}/{name}", (np.asarray(code, step.dtype) * step).astype(step.dtype))
        for name, code in (("low", low), ("high", high))
    ]
    clipped = insert(graph, quantize, "Clip", [value, *bounds], f"{site}/Clip", f"{site}/clipped", value)
    quantize.replace_input_with(0, clipped)
    return site


def flatten_products(traced: FloatGraph, names: Collection[str]) -> Change:
    """Rewrite linears in `names` with four axes to three, since TensorRT's dynamic quantizer does not accept more.

    Models that keep patches as an image (Swin in timm) multiply inputs of shape `(N, rows, columns, C)`. The axes
    between the first and the last are merged before the multiplication and split again after its bias, which leaves the
    numbers and their order unchanged. Only the first axis may be dynamic.

    The graph must be without Gemm (see `split_gemms`) and not yet quantized; `names` are linears whose inputs will be
    quantized in blocks. The result lists the linears that were rewritten.

    Raises:
        ValueError: an axis other than the first is dynamic.
    """
    flat: dict[ir.Value, ir.Value] = {}
    changed = []
    for product in traced.products:
        if product.kind is ProductKind.LINEAR and product.name in names and _axes(product.node.inputs[0]) > _MOST_AXES:
            _flatten(traced.model.graph, product, flat)
            changed.append(product.name)
    return Change("flatten_products", tuple(changed))


def _axes(value: ir.Value | None) -> int:
    return 0 if value is None or value.shape is None else len(value.shape)


def _flatten(graph: ir.Graph, product: Product, flat: dict[ir.Value, ir.Value]) -> None:
    # Reshape one linear's input to three axes, and its result back; `flat` holds the inputs reshaped so far.
    node, value = product.node, product.node.inputs[0]
    assert value is not None
    assert value.shape is not None
    first, *middle, width = value.shape
    sides = [side for side in middle if isinstance(side, int)]
    if len(sides) != len(middle) or not isinstance(width, int):
        raise ValueError(f"{product.name} has dynamic sides besides its first: {value.shape}")
    tokens = math.prod(sides)
    if value not in flat:  # consumers of one value keep sharing one quantizer
        reshape = _reshape(graph, value, f"{product.name}/tokens", (0, tokens, width), ir.Shape([first, tokens, width]))
        graph.insert_before(node, reshape)
        flat[value] = reshape.outputs[0]
    node.replace_input_with(0, flat[value])
    last = stored_bias(node) or node
    result, weight = last.outputs[0], node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    out = int(weight.shape[-1])  # type: ignore[arg-type]
    shape, readers = result.shape, list(result.uses())
    node.outputs[0].shape = result.shape = ir.Shape([first, tokens, out])
    image = _reshape(graph, result, f"{product.name}/image", (0, *sides, out), shape)
    graph.insert_after(last, image)
    for reader, index in readers:
        reader.replace_input_with(index, image.outputs[0])


def _reshape(graph: ir.Graph, value: ir.Value, name: str, sides: tuple[int, ...], shape: ir.Shape | None) -> ir.Node:
    """Create a Reshape that is not yet in the graph; 0 in `sides` keeps a dimension, `shape` is the output's."""
    stored = add_initializer(graph, f"{name}/shape", np.array(sides, np.int64))
    node = ir.node("Reshape", [value, stored], name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, value.type, shape
    return node


# By number type of the codes: its name in messages, the format that stores it, and the value of --bits that yields it.
_OWN: Final = {
    Kind.INT: ("integers", TrtFormat.INT8, "integer bits, for instance w8a8"),
    Kind.E4M3: ("FP8", TrtFormat.FP8, "wfp8afp8"),
    Kind.NVFP4: ("NVFP4", TrtFormat.NVFP4, "wnvfp4anvfp4"),
}


def choose_format(quantized: QuantizedVit, wanted: TrtFormat | None, source: str) -> TrtFormat:
    """The requested format, or the artifact's own.

    Raises:
        LintFindingsError: the artifact's codes cannot be stored in this format without being rounded again.
    """
    kinds = {weight.kind for weight in quantized.weights.values()}
    # NVFP4 artifacts also hold FP8 codes; all others hold codes of a single type.
    kind = next((kind for kind in (Kind.NVFP4, Kind.E4M3) if kind in kinds), Kind.INT)
    called, own, _ = _OWN[kind]
    format = own if wanted is None else wanted
    findings = []
    if kind is not format.kind:
        bits = _OWN[format.kind][2]
        why = f"the artifact's codes are {called}; {format} would round them again"
        findings.append(Finding("format", "weights", why, f"export as {own}, or quantize with --bits {bits}"))
    elif format is TrtFormat.INT4_WEIGHT_ONLY and not any(map(fits_int4, quantized.weights.values())):
        findings.append(Finding("int4-width", "weights", "no weight has 4-bit codes", "export as int8-weight-only"))
    refuse(findings, source)
    return format


def in_format(quantized: QuantizedVit, format: TrtFormat) -> QuantizedVit:
    """The model that an export computes: without activation quantizers for weight-only formats."""
    return without_activations(quantized, quantized.weights) if format.weight_only else quantized


def with_targets(options: TrtExportOptions, format: TrtFormat) -> TrtExportOptions:
    """The options with the compute capabilities to compile for; see `compile_for`."""
    given = "compute_capabilities" in options.model_fields_set
    wanted = compile_for(format, options.compute_capabilities, options.builder, given=given)
    return (
        options
        if wanted == options.compute_capabilities
        else options.model_copy(update={"compute_capabilities": wanted})
    )
