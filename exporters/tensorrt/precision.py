"""In which precision an engine really multiplies: every product of the graph, found again in the builder's listing.

A graph asks; the builder decides. It may dequantize and multiply in half precision without a word, so each product of
the graph (named after its layer) is looked up among the layers that were built, and its operands' types are read there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from pydantic import Field

from exporters.graph.layers import ExportedLayer
from exporters.tensorrt.listing import EngineLayer
from fp8pipe.core.config import FrozenConfig
from fp8pipe.numerics.kinds import Kind

__all__ = ["NAMES", "PrecisionReport", "ProductPrecision", "artifact_precisions", "read_precision"]

# The builder's types, by the names that people use.
NAMES: Final[Mapping[str, str]] = {
    "Int8": "int8", "FP8": "fp8", "FP4E2M1": "fp4", "Int4": "int4", "Half": "fp16", "BFloat16": "bf16", "Float": "fp32",
}  # fmt: skip
_KINDS: Final[Mapping[Kind, str]] = {Kind.INT: "int8", Kind.E4M3: "fp8", Kind.NVFP4: "fp4"}
_PRODUCTS: Final = ("gemm", "correlation", "convolution", "runtime_fusion")
_ATTENTION: Final = "mha"
_LITERALS: Final = frozenset(((), (1,), (1, 1), (1, 1, 1), (1, 1, 1, 1)))


class ProductPrecision(FrozenConfig):
    """One product of the graph as it was built."""

    node: str = Field(description="the graph's node")
    layer: str = Field(description="the engine's layer; empty when none was found")
    operands: tuple[str, ...] = Field(description="types it multiplies: activation, then weight or second activation")
    output: str = Field(description="type it writes")
    fused_attention: bool = Field(description="whether both products of the attention and its softmax are one kernel")

    @property
    def name(self) -> str:
        """The precision in one word: the operands' common type, or both."""
        return "x".join(dict.fromkeys(self.operands)) or "unknown"


class PrecisionReport(FrozenConfig):
    """All products, and what stands around them."""

    products: tuple[ProductPrecision, ...] = Field(description="in the graph's order")
    other_layers: dict[str, int] = Field(description="how many engine layers of each other type")

    def counts(self) -> dict[str, int]:
        """Products by precision."""
        return dict(Counter(product.name for product in self.products))

    def not_in(self, precisions: Mapping[str, str]) -> tuple[str, ...]:
        """Nodes whose product is in another precision than the one named for it; a node that is not named may be so."""
        return tuple(p.node for p in self.products if p.name != precisions.get(p.node, p.name))


def artifact_precisions(layers: Sequence[ExportedLayer]) -> dict[str, str]:
    """The precision of each product in the artifact, by its node: that of its codes.

    A product of which a side is float, or sides of two families, has none.
    """
    found = {}
    for layer in layers:
        left, right = (operand.kinds for operand in layer.operands)
        if left and left == right:
            (kind,) = left
            found[str(layer.node.name)] = _KINDS[kind]
    return found


def read_precision(nodes: Sequence[str], layers: Sequence[EngineLayer]) -> PrecisionReport:
    """Find the graph's products (MatMul, Conv), by their nodes' names, among the layers that the builder listed."""
    multiplying = [layer for layer in layers if _multiplies(layer)]
    return PrecisionReport(
        products=tuple(_find(node, multiplying) for node in nodes),
        other_layers=dict(Counter(layer.kind for layer in layers if not _multiplies(layer))),
    )


def _multiplies(layer: EngineLayer) -> bool:
    return layer.kind in _PRODUCTS or _ATTENTION in layer.name


def _find(node: str, layers: Sequence[EngineLayer]) -> ProductPrecision:
    # A fused layer names all nodes it comes from; one that carries the product's own name is preferred.
    candidates = [layer for layer in layers if node in layer.nodes]
    own = [layer for layer in candidates if layer.name.startswith(node)] or candidates
    if not own:
        return ProductPrecision(node=node, layer="", operands=(), output="", fused_attention=False)
    layer = own[0]
    attention = _ATTENTION in layer.name
    return ProductPrecision(
        node=node,
        layer=layer.name,
        operands=tuple(NAMES.get(dtype, dtype) for dtype in _operands(layer, attention)),
        output=NAMES.get(layer.outputs[0].dtype, layer.outputs[0].dtype) if layer.outputs else "",
        fused_attention=attention,
    )


def _operands(layer: EngineLayer, attention: bool) -> list[str]:
    """Types of what is multiplied. Behind them may come a residual that is added in the same kernel, and literals."""
    activations = [port.dtype for port in layer.inputs]
    stored = [port.dtype for port in layer.constants if port.shape not in _LITERALS]
    if attention:
        return activations
    return [*activations[:1], *stored[:1]] if stored else activations[:2]
