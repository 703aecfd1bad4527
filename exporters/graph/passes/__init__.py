"""Small named rewrites of a graph, each in place and returning what it changed; a target runs those it needs, in order.

products (Gemm and patch embeddings as MatMul), weights (codes), activations (quantizers), islands and gelu (float64
around integer products), cleanup (names, and nothing of the machine); editing is what they are made of.
"""

from exporters.graph.passes.activations import quantize_activations
from exporters.graph.passes.cleanup import name_products, strip_metadata
from exporters.graph.passes.editing import Change
from exporters.graph.passes.products import split_gemms, unfold_patches
from exporters.graph.passes.weights import quantize_weights

__all__ = [
    "Change", "name_products", "quantize_activations", "quantize_weights", "split_gemms", "strip_metadata",
    "unfold_patches",
]  # fmt: skip
