"""The formats of a Q/DQ graph, its files, and the details in manifests."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field, model_validator

from fp8pipe.artifact.kinds import Details
from fp8pipe.core.config import FrozenConfig
from fp8pipe.models.vision.answers import Activation
from fp8pipe.numerics.kinds import Kind

if TYPE_CHECKING:
    from fp8pipe.models.vision.quantized import Codes

CLASSES_FILE: Final = "classes.json"
MODEL_FILE: Final = "model.onnx"
_INT4_BITS: Final = 4


class OnnxFormat(StrEnum):
    """How quantized parts are stored and run.

    `qdq`: weight codes (INT8 or FP8 E4M3) and activation quantizers, as trained.
    `qdq-exact`: the same with float64 between matrix multiplications, so that results are unique, bit for bit; slower.
    `int4-weight-only`: weights of at most 4 bits in INT4, half the bytes; activations stay float.
    """

    QDQ = "qdq"
    QDQ_EXACT = "qdq-exact"
    INT4_WEIGHT_ONLY = "int4-weight-only"

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are quantized."""
        return self is not OnnxFormat.INT4_WEIGHT_ONLY


def fits_int4(weight: Codes) -> bool:
    """Whether a weight's codes fit into INT4."""
    return weight.kind is Kind.INT and weight.bits <= _INT4_BITS


class GraphInput(FrozenConfig):
    """The input of a graph."""

    name: str = Field(description="name in the graph")
    shape: tuple[str | int, ...] = Field(description="sizes of the dimensions; a name is a size that may vary")
    type: str = Field(default="float32", description="element type")


class GraphOutput(FrozenConfig):
    """The output of a graph."""

    name: str = Field(description="name in the graph")
    what: str = Field(description="logits or features")
    activation: Activation = Field(
        default="softmax", description="function that turns them into probabilities; none: they are values or features"
    )

    @model_validator(mode="before")
    @classmethod
    def _usual_activation(cls, data: Any) -> Any:
        """Reads exports from before this field existed, when all classifiers were treated as softmax classifiers."""
        if isinstance(data, dict) and "activation" not in data:
            return {**data, "activation": "none" if data.get("what") == "features" else "softmax"}
        return data


class GraphDetails(Details):
    """The manifest's details for an export that stores a vision model as a graph."""

    format: str = Field(description="export format, as given to --format")
    input: GraphInput = Field(description="pixels")
    output: GraphOutput = Field(description="logits of classes, or features")
    passes: dict[str, int] = Field(default_factory=dict, description="number of places that each pass changed")
