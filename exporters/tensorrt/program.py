"""Reads the kernel launches of a TensorRT for RTX engine from its file, on any machine and without loading the engine.

An engine file holds its program as text: every tensor with its type, and every kernel launch with its inputs, its
outputs and the nodes of the graph that it was made from:

    tensor={ ... dims={ 1 128 384 } ... name="A" ... region=B-consts ... type=int8 }
    fully_connected={ name="qkv" output={"C" } input={"D" "A" } ... layers="[ONNX Layer: qkv]\n[ONNX Layer: x_dq]" }
    function={ name=_gemm_mha_v2 ... input_args={ "E" "F" } ... output_args={ "G" } ... layers="[ONNX Layer: qk]..." }

The manifest and `layers.json` record what the builder reported; this module reads what the engine file contains.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Final

from exporters.tensorrt.listing import EngineLayer, Port, port_type
from fp8pipe.core.errors import BadArtifactError

__all__ = ["read_program"]

_TENSOR: Final = re.compile(rb"\n +(?:sub_)?tensor=\{ ([^\n]*?) type=(\w+) \}")
_DIMS: Final = re.compile(rb" dims=\{ ([^}]*)\}")
_NAME, _BASE = re.compile(rb' name="([^"]*)"'), re.compile(rb'base="([^"]*)"')
_LAUNCH: Final = re.compile(
    rb'\n +(?P<kind>\w+)=\{ name="?(?P<name>[^" \n]+)"? '
    rb'(?P<rest>[^\n]*?) layers="(?P<nodes>[^"]*)"'
)
_READS: Final = re.compile(rb" input(?:_args)?=\{ ?([^}]*)\}")
_WRITES: Final = re.compile(rb"\boutput(?:_args)?=\{ ?([^}]*)\}")
_NODE: Final = re.compile(rb"\[ONNX Layer: ([^\]\n]*)\]")
_KINDS: Final = {"fully_connected": "gemm", "function": "kgen"}  # the names in the builder's listing
_CONSTANTS: Final = b"-consts"


def read_program(engine: Path) -> tuple[EngineLayer, ...]:
    """The kernel launches of an engine, in the form of the builder's listing (`parse_listing`).

    Raises:
        BadArtifactError: no program is found: the file is not an engine, or one of an unknown version.
    """
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        tensors: dict[bytes, tuple[Port, bool]] = {}
        for found in _TENSOR.finditer(content):
            name, dims, base = (part.search(found[1]) for part in (_NAME, _DIMS, _BASE))
            if name is not None and dims is not None:
                constant = tensors[base[1]][1] if base is not None and base[1] in tensors else _CONSTANTS in found[1]
                shape = tuple(-1 if side.startswith(b'"') else int(side) for side in dims[1].split())
                port = Port(shape=shape, dtype=port_type(found[2].decode()))
                tensors[name[1]] = port, constant
        layers = tuple(_layer(found, tensors) for found in _LAUNCH.finditer(content))
    if not layers:
        raise BadArtifactError(
            f"no program can be read from {engine.name}",
            why="it is not an engine of TensorRT for RTX, or of a version whose file format is unknown",
            fix="export again, with a version of TensorRT for RTX that this project was tested with",
        )
    return layers


def _layer(found: re.Match[bytes], tensors: dict[bytes, tuple[Port, bool]]) -> EngineLayer:
    reads = [tensors[name] for name in _names(_READS, found["rest"]) if name in tensors]
    kind = found["kind"].decode()
    return EngineLayer(
        name=found["name"].decode(), kind=_KINDS.get(kind, kind),
        inputs=tuple(port for port, constant in reads if not constant),
        constants=tuple(port for port, constant in reads if constant),
        outputs=tuple(tensors[name][0] for name in _names(_WRITES, found["rest"]) if name in tensors),
        tactic="", nodes=tuple(node.decode() for node in _NODE.findall(found["nodes"])),
    )  # fmt: skip


def _names(section: re.Pattern[bytes], text: bytes) -> list[bytes]:
    found = section.search(text)
    return re.findall(rb'"([^"]*)"', found[1]) if found is not None else []
