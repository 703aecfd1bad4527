"""What manifests say of an ONNX graph: its format, its input and its output."""

from __future__ import annotations

from pydantic import Field

from fp8pipe.artifact.kinds import Details
from fp8pipe.core.config import FrozenConfig

__all__ = ["GraphDetails", "GraphInput", "GraphOutput"]


class GraphInput(FrozenConfig):
    """The input of a graph."""

    name: str = Field(description="in the graph")
    shape: tuple[str | int, ...] = Field(description="a name stands for a size that may vary")
    type: str = Field(default="float32", description="of its elements")


class GraphOutput(FrozenConfig):
    """The output of a graph."""

    name: str = Field(description="in the graph")
    what: str = Field(description="logits or features")


class GraphDetails(Details):
    """Of an export that is a graph of a vision model."""

    format: str = Field(description="as in --format")
    input: GraphInput = Field(description="pixels")
    output: GraphOutput = Field(description="logits of classes, or features")
    passes: dict[str, int] = Field(default_factory=dict, description="places that each pass changed")
