"""A quantized vision model as the graph that TensorRT builds well: strongly typed, one quantizer a value."""

from __future__ import annotations

from exporters.graph.lint import lint_graph, refuse
from exporters.graph.passes import (
    Change,
    name_products,
    quantize_activations,
    quantize_weights,
    split_gemms,
    strip_metadata,
)
from exporters.graph.passes.patches import unfold_patches
from exporters.graph.produce import QuantizedGraph, float_model
from exporters.graph.trace import PlainGraph, export_plain
from exporters.tensorrt.barrier import hold_queries
from exporters.tensorrt.flatten import flatten_products
from exporters.tensorrt.nvfp4 import quantize_block_activations, quantize_block_weights, raise_opset
from exporters.tensorrt.options import TrtFormat
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
        LintFindingsError: the traced graph cannot be quantized well.
        ConfigurationError: it cannot be traced, or its layers are not found in the graph.
    """
    import onnx_ir as ir

    model = float_model(quantized)
    plain = export_plain(model, quantized.structure)
    refuse(lint_graph(plain, model), source)
    float_bytes = ir.to_proto(plain.model).SerializeToString()
    plain, split = split_gemms(plain)
    plain, unfolded = unfold_patches(plain)
    changes = [
        split,
        unfolded,
        *_prepared(plain, quantized),
        quantize_weights(
            plain, of_type(quantized.weights, WeightCodes), int4=format is TrtFormat.INT4_WEIGHT_ONLY, block=INT4_BLOCK
        ),
        quantize_block_weights(plain, of_type(quantized.weights, BlockCodes)),
        quantize_activations(
            plain, quantized.structure, of_type(quantized.activations, ActivationQuantizer), share=True
        ),
        quantize_block_activations(plain, quantized.structure, of_type(quantized.activations, BlockQuantizer)),
        name_products(plain),
        strip_metadata(plain.model),
        hold_queries(plain.model),
    ]
    return QuantizedGraph(plain.model, float_bytes, tuple(changes))


def _prepared(plain: PlainGraph, quantized: QuantizedVit) -> list[Change]:
    """What NVFP4 alone needs: a newer opset, and at most three axes where activations are rounded in blocks."""
    if not of_type(quantized.weights, BlockCodes):
        return []
    sites = of_type(quantized.activations, BlockQuantizer)
    rounded = [site.name for site in quantized.structure.linears if f"{site.input_group}.input" in sites]
    return [raise_opset(plain.model, activations=bool(sites)), flatten_products(plain, rounded)]
