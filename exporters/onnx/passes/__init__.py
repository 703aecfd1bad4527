"""Small named rewrites of a graph, each returning what it changed; a target runs those it needs, in order."""

from exporters.onnx.passes.activations import quantize_activations
from exporters.onnx.passes.change import Change
from exporters.onnx.passes.cleanup import name_products, strip_metadata
from exporters.onnx.passes.gemm import split_gemms
from exporters.onnx.passes.weights import quantize_weights

__all__ = [
    "Change",
    "name_products",
    "quantize_activations",
    "quantize_weights",
    "split_gemms",
    "strip_metadata",
]
