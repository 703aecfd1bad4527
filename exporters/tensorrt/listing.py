"""Parses the layers that a builder reports for an engine, and finds the precision of each matrix multiplication.

An engine's inspector needs a GPU. The builder's log at its most verbose level contains the same list, written during
compilation, so precision can be checked on any machine. The log has one line per layer, of the form

    Name: N, LayerType: T, Inputs: [ { Name: .., Dimensions: [..], .., Datatype: D, .. }, ..], Constants: [..],
    Outputs: [..], TacticName: X, StreamId: 0, Metadata: [ONNX Layer: node]<US>[ONNX Layer: node]

where <US> is the unit separator, code 31. Layers that copy shapes to the device have no constants and name parameters;
signals between streams name an event.

The inspector prints JSON. TensorRT 10.x writes a tensor's layout and type in one string, `"Format/Datatype": "Row major
linear FP16 format"`; 11.x has a key for each. Layer kinds are translated to those of the log, so that matrix
multiplications are found in the same way. (Sources: IEngineInspector; "Migrating IEngineInspector Usage from TensorRT
10.x to 11.x".)

A graph requests a precision, but the builder decides. It may silently dequantize and multiply in half precision, so
each matrix multiplication of the graph (named after its layer) is looked up among the built layers, and its operand
types are read there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pydantic import Field

from exporters.graph.layers import ExportedLayer
from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.numerics.kinds import Kind

_LINE: Final = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?"
    r"Outputs: \[(?P<outputs>.*?)\], (?:ParameterType: .*?, )?Tactic(?:Name|Value): (?P<tactic>.*?), StreamId: \d+, "
    r"(?:EventId: \d+, )?Metadata: (?P<nodes>.*)$"
)
_PORT: Final = re.compile(r"Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (?P<dtype>\w+)")
_NODE: Final = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1f\[]|\s*$)")
_MARK: Final = " LayerType: "


class Port(FrozenConfig):
    """An input or output tensor of an engine layer."""

    shape: tuple[int, ...] = Field(description="sizes of its dimensions; -1 if dynamic")
    dtype: str = Field(description="its dtype as named by the builder: Float, Half, Int8, FP8, ...")


class EngineLayer(FrozenConfig):
    """One kernel launch of an engine."""

    name: str = Field(description="the builder's name")
    kind: str = Field(description="the builder's type: gemm, correlation, kgen, ...")
    inputs: tuple[Port, ...] = Field(description="activations it reads")
    constants: tuple[Port, ...] = Field(description="stored tensors it reads")
    outputs: tuple[Port, ...] = Field(description="tensors it writes")
    tactic: str = Field(description="the kernel, as far as it is known without a GPU")
    nodes: tuple[str, ...] = Field(description="the graph's nodes that it comes from")


def parse_listing(messages: Iterable[str]) -> tuple[EngineLayer, ...]:
    """The layers listed in a builder's messages, in execution order.

    Raises:
        BadArtifactError: a listed layer cannot be parsed, so counts from the other layers would be wrong.
    """
    lines = (line for message in messages for line in message.splitlines())
    return tuple(_layer(line) for line in lines if line.startswith("Name: ") and _MARK in line)


def _layer(line: str) -> EngineLayer:
    # Parse one line of the builder's log.
    found = _LINE.match(line)
    if found is None:
        raise BadArtifactError(
            "the builder lists a layer in an unknown form",
            why=line[:200],
            fix="use a version of TensorRT that this project was tested with",
        )
    inputs, constants, outputs = (_ports(found[section] or "") for section in ("inputs", "constants", "outputs"))
    return EngineLayer(
        name=found["name"], kind=found["kind"], inputs=inputs, constants=constants, outputs=outputs,
        tactic=found["tactic"], nodes=tuple(_NODE.findall(found["nodes"])),
    )  # fmt: skip


def _ports(text: str) -> tuple[Port, ...]:
    return tuple(
        Port(shape=tuple(int(side) for side in port["shape"].split(",") if side), dtype=port["dtype"])
        for port in _PORT.finditer(text)
    )


# Parts of a type description, and the builder's type names. The first part that occurs in a description decides, so
# longer parts precede those that they contain.
_TYPES: Final = (
    ("fp4", "FP4E2M1"), ("int4", "Int4"), ("fp8", "FP8"), ("e4m3", "FP8"), ("int8", "Int8"), ("bfloat16", "BFloat16"),
    ("bf16", "BFloat16"), ("fp16", "Half"), ("half", "Half"), ("fp32", "Float"), ("float", "Float"),
    ("int64", "Int64"), ("int32", "Int32"), ("bool", "Bool"),
)  # fmt: skip
# Kinds of multiplying layers that TensorRT does not compile with Myelin (the only compiler of TensorRT for RTX), and
# the names of the same kinds in the log.
_KINDS: Final[Mapping[str, str]] = {
    "MatrixMultiply": "gemm", "CaskGemmMatrixMultiply": "gemm", "CaskGemmConvolution": "gemm",
    "Convolution": "convolution", "CaskConvolution": "convolution", "CaskFlattenConvolution": "convolution",
}  # fmt: skip
_TYPE_KEYS: Final = ("Datatype", "DataType", "Format/Datatype")
_INSPECTED_NODE: Final = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|\s*$)")


def parse_inspector(text: str) -> tuple[EngineLayer, ...]:
    """The layers of an engine, in execution order.

    `text` is the output of `IEngineInspector.get_engine_information(LayerInformationFormat.JSON)`.

    Raises:
        BadArtifactError: it is not such output, or holds only names (an engine that was not built with detailed
            profiling verbosity).
    """
    try:
        layers = json.loads(text)["Layers"]
        return tuple(_inspected(entry) for entry in layers)
    except (ValueError, KeyError, TypeError) as error:
        raise BadArtifactError(
            "the engine's inspector answers in an unknown form",
            why=f"{type(error).__name__}: {error}; it begins {text[:120]!r}",
            fix="build with detailed profiling verbosity, and a version of TensorRT from 10.13 to 11.x",
        ) from error


def _inspected(entry: Mapping[str, Any]) -> EngineLayer:
    # Convert one layer of the inspector's JSON to the form of the log; a TypeError if it is only a name.
    if not isinstance(entry, Mapping):
        raise TypeError(f"a layer is only named: {str(entry)[:80]}")
    constants = _tensors(entry.get("Constants", ()))
    weights = entry.get("Weights")
    if isinstance(weights, Mapping) and weights.get("Count"):
        constants += (Port(shape=(int(weights["Count"]),), dtype=port_type(str(weights["Type"]))),)
    return EngineLayer(
        name=entry["Name"], kind=_KINDS.get(entry["LayerType"], entry["LayerType"]), inputs=_tensors(entry["Inputs"]),
        constants=constants, outputs=_tensors(entry["Outputs"]), tactic=str(entry.get("TacticName", "")),
        nodes=tuple(_INSPECTED_NODE.findall(entry.get("Metadata") or "")),
    )  # fmt: skip


def _tensors(entries: Any) -> tuple[Port, ...]:
    return tuple(
        Port(
            shape=tuple(int(side) for side in entry["Dimensions"]),
            dtype=port_type(next(str(entry[key]) for key in _TYPE_KEYS if key in entry)),
        )
        for entry in entries
    )


def port_type(text: str) -> str:
    """The builder's name of the type that a description mentions, such as Half; the description itself if unknown."""
    lowered = text.lower()
    return next((name for part, name in _TYPES if part in lowered), text)


# Common names of types, by the builder's names.
NAMES: Final[Mapping[str, str]] = {
    "Int8": "int8", "FP8": "fp8", "FP4E2M1": "fp4", "Int4": "int4", "Half": "fp16", "BFloat16": "bf16", "Float": "fp32",
}  # fmt: skip
_PRECISIONS: Final[Mapping[Kind, str]] = {Kind.INT: "int8", Kind.E4M3: "fp8", Kind.NVFP4: "fp4"}
_PRODUCTS: Final = ("gemm", "correlation", "convolution", "runtime_fusion")
_ATTENTION: Final = "mha"
_LITERALS: Final = frozenset(((), (1,), (1, 1), (1, 1, 1), (1, 1, 1, 1)))


class ProductPrecision(FrozenConfig):
    """One matrix multiplication or convolution of the graph as it was built."""

    node: str = Field(description="the graph's node")
    layer: str = Field(description="the engine's layer; empty when none was found")
    operands: tuple[str, ...] = Field(description="types it multiplies: activation, then weight or second activation")
    output: str = Field(description="type it writes")
    fused_attention: bool = Field(description="whether both matmuls of the attention and its softmax are one kernel")

    @property
    def name(self) -> str:
        """The precision: the operands' common type, or both types joined by "x"; "unknown" without operands."""
        return "x".join(dict.fromkeys(self.operands)) or "unknown"


class PrecisionReport(FrozenConfig):
    """All matrix multiplications and convolutions, and the layers around them."""

    products: tuple[ProductPrecision, ...] = Field(description="all of them, in the graph's order")
    other_layers: dict[str, int] = Field(description="number of engine layers of each other type")

    def counts(self) -> dict[str, int]:
        """Number of matrix multiplications and convolutions by precision."""
        return dict(Counter(product.name for product in self.products))

    def not_in(self, precisions: Mapping[str, str]) -> tuple[str, ...]:
        """Nodes that run in another precision than `precisions` requires; nodes missing there may use any."""
        return tuple(p.node for p in self.products if p.name != precisions.get(p.node, p.name))


def artifact_precisions(layers: Sequence[ExportedLayer]) -> dict[str, str]:
    """The precision of the codes that each matrix multiplication has in the artifact, by name of its node.

    Those with a float operand, or with operands of two different types, are left out.
    """
    found = {}
    for layer in layers:
        left, right = (operand.kinds for operand in layer.operands)
        if left and left == right:
            (kind,) = left
            found[str(layer.node.name)] = _PRECISIONS[kind]
    return found


def read_precision(nodes: Sequence[str], layers: Sequence[EngineLayer]) -> PrecisionReport:
    """Find the engine layers that run the graph's matrix multiplications and convolutions, given by node name."""
    multiplying = [layer for layer in layers if _multiplies(layer)]
    return PrecisionReport(
        products=tuple(_find(node, multiplying) for node in nodes),
        other_layers=dict(Counter(layer.kind for layer in layers if not _multiplies(layer))),
    )


def _multiplies(layer: EngineLayer) -> bool:
    return layer.kind in _PRODUCTS or _ATTENTION in layer.name


def _find(node: str, layers: Sequence[EngineLayer]) -> ProductPrecision:
    # Several layers may list the node among those they were fused from; one that is named after it is preferred.
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
    """Types of the multiplied operands. Inputs after these, such as a residual or a scalar constant, are ignored."""
    activations = [port.dtype for port in layer.inputs]
    stored = [port.dtype for port in layer.constants if port.shape not in _LITERALS]
    if attention:
        return activations
    return [*activations[:1], *stored[:1]] if stored else activations[:2]
