"""What a builder says it built, read into records: from the log of TensorRT for RTX, and from TensorRT's inspector.

An engine's inspector wants a GPU. The builder's log at its most talkative level holds the same list, written
while it compiles, so precision can be proved on any machine. The text has one line per layer, of the form

    Name: N, LayerType: T, Inputs: [ { Name: .., Dimensions: [..], .., Datatype: D, .. }, ..], Constants: [..],
    Outputs: [..], TacticName: X, StreamId: 0, Metadata: [ONNX Layer: node]<US>[ONNX Layer: node]

where <US> is the unit separator, code 31. Copies of shapes to the device have no constants, and name parameters;
signals between streams name an event.

The inspector prints JSON. 10.x writes a tensor's layout and type in one text, `"Format/Datatype": "Row major linear
FP16 format"`; 11.x has a key for each. Kinds of layers are called as in the listing, so that products are found again
alike. (IEngineInspector; "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x".)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import Field

from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError

__all__ = ["EngineLayer", "Port", "parse_inspector", "parse_listing", "port_type"]

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
    """A tensor at the edge of an engine layer."""

    shape: tuple[int, ...] = Field(description="its sides; -1 where they are dynamic")
    dtype: str = Field(description="the builder's name of its type: Float, Half, Int8, FP8, ...")


class EngineLayer(FrozenConfig):
    """One kernel launch of an engine."""

    name: str = Field(description="the builder's name")
    kind: str = Field(description="the builder's type: gemm, correlation, kgen, ...")
    inputs: tuple[Port, ...] = Field(description="activations it reads")
    constants: tuple[Port, ...] = Field(description="stored tensors it reads")
    outputs: tuple[Port, ...] = Field(description="what it writes")
    tactic: str = Field(description="the kernel, as far as it is known before a GPU is")
    nodes: tuple[str, ...] = Field(description="the graph's nodes that it comes from")


def parse_listing(messages: Iterable[str]) -> tuple[EngineLayer, ...]:
    """The layers listed in a builder's messages, in the order of execution.

    Raises:
        BadArtifactError: a listed layer cannot be read, so a figure made from the others would be false.
    """
    lines = (line for message in messages for line in message.splitlines())
    return tuple(_layer(line) for line in lines if line.startswith("Name: ") and _MARK in line)


def _layer(line: str) -> EngineLayer:
    found = _LINE.match(line)
    if found is None:
        raise BadArtifactError(
            "the builder lists a layer in a form that this version does not know",
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


# The first that a description contains. Longer names stand before those that they contain.
_TYPES: Final = (
    ("fp4", "FP4E2M1"), ("int4", "Int4"), ("fp8", "FP8"), ("e4m3", "FP8"), ("int8", "Int8"), ("bfloat16", "BFloat16"),
    ("bf16", "BFloat16"), ("fp16", "Half"), ("half", "Half"), ("fp32", "Float"), ("float", "Float"),
    ("int64", "Int64"), ("int32", "Int32"), ("bool", "Bool"),
)  # fmt: skip
# Products that are not compiled by Myelin, the part of TensorRT that TensorRT for RTX consists of.
_KINDS: Final[Mapping[str, str]] = {
    "MatrixMultiply": "gemm", "CaskGemmMatrixMultiply": "gemm", "CaskGemmConvolution": "gemm",
    "Convolution": "convolution", "CaskConvolution": "convolution", "CaskFlattenConvolution": "convolution",
}  # fmt: skip
_TYPE_KEYS: Final = ("Datatype", "DataType", "Format/Datatype")
_INSPECTED_NODE: Final = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|\s*$)")


def parse_inspector(text: str) -> tuple[EngineLayer, ...]:
    """The layers of an engine, in the order of execution.

    Args:
        text: of `IEngineInspector.get_engine_information(LayerInformationFormat.JSON)`.

    Raises:
        BadArtifactError: it is no such text, or holds names alone (an engine that was not built with detailed
            profiling verbosity).
    """
    try:
        layers = json.loads(text)["Layers"]
        return tuple(_inspected(entry) for entry in layers)
    except (ValueError, KeyError, TypeError) as error:
        raise BadArtifactError(
            "the engine's inspector answers in a form that this version does not know",
            why=f"{type(error).__name__}: {error}; it begins {text[:120]!r}",
            fix="build with detailed profiling verbosity, and a version of TensorRT from 10.13 to 11.x",
        ) from error


def _inspected(entry: Mapping[str, Any]) -> EngineLayer:
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
    """The builder's name of a type that a text describes."""
    lowered = text.lower()
    return next((name for part, name in _TYPES if part in lowered), text)
