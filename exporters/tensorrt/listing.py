"""What the builder says it built: one line a layer of its log, read into plain records.

An engine's inspector wants a GPU. The builder's log at its most talkative level holds the same list, written
while it compiles, so precision can be proved on any machine. The text has the form

    Name: N, LayerType: T, Inputs: [ { Name: .., Dimensions: [..], .., Datatype: D, .. }, ..], Constants: [..],
    Outputs: [..], TacticName: X, StreamId: 0, Metadata: [ONNX Layer: node]<US>[ONNX Layer: node]

where <US> is the unit separator, code 31. Copies of shapes to the device have no constants, and name parameters;
signals between streams name an event.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from pydantic import Field

from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError

__all__ = ["EngineLayer", "Port", "parse_listing"]

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
