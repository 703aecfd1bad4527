"""The layers of an engine of TensorRT, as its inspector prints them: JSON, read into the builder listing's records.

10.x writes a tensor's layout and type in one text, `"Format/Datatype": "Row major linear FP16 format"`; 11.x has a key
for each. Kinds of layers are called as in TensorRT for RTX's listing, so that products are found again alike.
(IEngineInspector; "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x".)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from exporters.tensorrt.listing import EngineLayer, Port
from fp8pipe.core.errors import BadArtifactError

__all__ = ["parse_inspector"]

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
_NODE: Final = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|\s*$)")


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
        return tuple(_layer(entry) for entry in layers)
    except (ValueError, KeyError, TypeError) as error:
        raise BadArtifactError(
            "the engine's inspector answers in a form that this version does not know",
            why=f"{type(error).__name__}: {error}; it begins {text[:120]!r}",
            fix="build with detailed profiling verbosity, and a version of TensorRT from 10.13 to 11.x",
        ) from error


def _layer(entry: Mapping[str, Any]) -> EngineLayer:
    if not isinstance(entry, Mapping):
        raise TypeError(f"a layer is only named: {str(entry)[:80]}")
    constants = _ports(entry.get("Constants", ()))
    weights = entry.get("Weights")
    if isinstance(weights, Mapping) and weights.get("Count"):
        constants += (Port(shape=(int(weights["Count"]),), dtype=_dtype(str(weights["Type"]))),)
    return EngineLayer(
        name=entry["Name"], kind=_KINDS.get(entry["LayerType"], entry["LayerType"]), inputs=_ports(entry["Inputs"]),
        constants=constants, outputs=_ports(entry["Outputs"]), tactic=str(entry.get("TacticName", "")),
        nodes=tuple(_NODE.findall(entry.get("Metadata") or "")),
    )  # fmt: skip


def _ports(entries: Any) -> tuple[Port, ...]:
    return tuple(
        Port(
            shape=tuple(int(side) for side in entry["Dimensions"]),
            dtype=_dtype(next(str(entry[key]) for key in _TYPE_KEYS if key in entry)),
        )
        for entry in entries
    )


def _dtype(text: str) -> str:
    lowered = text.lower()
    return next((name for part, name in _TYPES if part in lowered), text)
