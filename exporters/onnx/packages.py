"""The one place that says which packages an ONNX export needs, and how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

from fp8pipe.errors import MissingCapabilityError

__all__ = ["import_onnx_package"]


def import_onnx_package(name: str) -> ModuleType:
    """Import `onnx`, `onnx_ir`, `onnxscript` or `onnxruntime`.

    Raises:
        MissingCapabilityError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingCapabilityError(
            f"an ONNX export needs the package {name.replace('_', '-')}",
            why=f"no module named {error.name}",
            fix="pip install 'fp8pipe[onnx]'",
        ) from error
