"""A quantized vision model as the graph that TensorRT builds well: strongly typed, one quantizer per value."""

from __future__ import annotations

from exporters.graph.passes import (
    Change,
    name_products,
    quantize_activations,
    quantize_weights,
    split_gemms,
    strip_metadata,
    unfold_patches,
)
from exporters.graph.produce import QuantizedGraph, float_model, trace_linted
from exporters.graph.trace import FloatGraph
from exporters.tensorrt.nvfp4 import quantize_block_activations, quantize_block_weights, raise_opset
from exporters.tensorrt.options import TrtFormat
from exporters.tensorrt.passes import flatten_products, hold_queries
from fp8pipe.models.vision.quantized import QuantizedVit, of_type
from fp8pipe.numerics.nvfp4 import BlockCodes, BlockQuantizer
from fp8pipe.numerics.quantizers import ActivationQuantizer, WeightCodes

__all__ = ["INT4_BLOCK", "typed_graph"]

# The smallest block that the builder takes: the most layers fit it.
INT4_BLOCK = 32


def typed_graph(quantized: QuantizedVit, format: TrtFormat, source: str) -> QuantizedGraph:
    """Trace, lint and rewrite; every float is float32 still (see `halve`).

    Args:
        quantized: the model of this format (`in_format`).
        format: how weights are stored.
        source: the artifact, for messages.

    Raises:
        LintFindingsError, ConfigurationError: as `trace_linted`.
    """
    import onnx_ir as ir

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
    """What NVFP4 alone needs: a newer opset, and at most three axes where activations are rounded in blocks."""
    if not of_type(quantized.weights, BlockCodes):
        return []
    sites = of_type(quantized.activations, BlockQuantizer)
    rounded = [site.name for site in quantized.structure.linears if f"{site.input_group}.input" in sites]
    return [raise_opset(traced.model, activations=bool(sites)), flatten_products(traced, rounded)]
