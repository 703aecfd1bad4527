"""Export to ONNX: a quantized vision model in, a graph out whose numbers are the artifact's, bit for bit.

What is listed here is loaded when it is first used: serving takes `exporters.onnx.runtime` alone, in images that hold
neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.onnx.export import CLASSES_FILE, EXPORT_KIND, MODEL_FILE, OnnxPlan, export_onnx, plan_export
    from exporters.onnx.options import OnnxExportOptions, OnnxFormat

__all__ = [
    "CLASSES_FILE",
    "EXPORT_KIND",
    "MODEL_FILE",
    "OnnxExportOptions",
    "OnnxFormat",
    "OnnxPlan",
    "export_onnx",
    "plan_export",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "options" if name in ("OnnxExportOptions", "OnnxFormat") else "export"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
