"""The minimum version of ONNX Runtime for a graph, from its opset, its IR version and its types.

The tables hold facts about published releases of ONNX Runtime; comments name their sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx_ir as ir

__all__ = ["least_onnxruntime", "needs"]

# The releases that first implement an opset, and that first read an IR version:
# https://onnxruntime.ai/docs/reference/compatibility.html#onnx-opset-support; for IRs with onnx's docs/Versioning.md.
_OPSETS: Final[Mapping[int, str]] = {17: "1.13", 18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23"}
_IRS: Final[Mapping[int, str]] = {8: "1.13", 9: "1.15", 10: "1.18", 11: "1.23"}
# The release that first runs stored tensors of a type, found by loading exports of each format in the CPU wheels
# (docs/onnx.md).
_TYPES: Final[Mapping[str, str]] = {"INT4": "1.19", "UINT4": "1.19", "FLOAT8E4M3FN": "1.32"}
_COMMON: Final = frozenset(("FLOAT", "DOUBLE", "FLOAT16", "INT8", "UINT8", "INT32", "INT64", "BOOL"))


def needs(model: ir.Model, checked: str) -> dict[str, str]:
    """What a graph requires of ONNX Runtime, each with the first release that supports it.

    Args:
        model: the graph.
        checked: a version that ran the graph; it is given for requirements that are not in the tables.

    Returns:
        Versions by requirement: the opset, the IR version, and less common types and operator domains.
    """
    types = {value.dtype.name for value in model.graph.initializers.values() if value.dtype is not None}
    domains = sorted(domain for domain in model.graph.opset_imports if domain not in ("", "ai.onnx"))
    opset = model.graph.opset_imports.get("", 0)
    return {
        f"opset {opset}": _OPSETS.get(opset, checked),
        f"IR {model.ir_version}": _IRS.get(int(model.ir_version or 0), checked),
        **{name: _TYPES.get(name, checked) for name in sorted(types - _COMMON)},
        **dict.fromkeys(domains, checked),
    }


def least_onnxruntime(found: Mapping[str, str]) -> str:
    """The minimum version for a graph: the newest of the versions that `needs` returned."""
    return max(found.values(), key=lambda version: tuple(int(part) for part in version.split(".") if part.isdigit()))
