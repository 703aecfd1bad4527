"""Small named rewrites of a graph, each returning what it changed; a target runs those it needs, in order."""

from exporters.graph.passes.activations import quantize_activations
from exporters.graph.passes.change import Change
from exporters.graph.passes.cleanup import name_products, strip_metadata
from exporters.graph.passes.gemm import split_gemms
from exporters.graph.passes.weights import quantize_weights

__all__ = [
    "Change",
    "name_products",
    "quantize_activations",
    "quantize_weights",
    "split_gemms",
    "strip_metadata",
]
