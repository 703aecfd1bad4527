"""The one place that says which packages an ONNX export needs, how to get them, and what they may not do.

Official builds of ONNX Runtime from 1.32 on send events to their maker, unless a variable forbids it before they load.
Here they do not, unless the user sets it otherwise (`ORT_DISABLE_TELEMETRY=0`).
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from fp8pipe.core.errors import MissingCapabilityError

__all__ = ["import_onnx_package"]


def import_onnx_package(name: str) -> ModuleType:
    """Import `onnx`, `onnx_ir`, `onnxscript` or `onnxruntime`.

    Raises:
        MissingCapabilityError: it is not installed.
    """
    if name == "onnxruntime":
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingCapabilityError(
            f"an ONNX export needs the package {name.replace('_', '-')}",
            why=f"no module named {error.name}",
            fix="pip install 'fp8pipe[onnx]'",
        ) from error
