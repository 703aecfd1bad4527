"""Imports optional third-party packages, with the workaround that some of them need on a CPU build of torch.

The torchvision on PyPI is built for CUDA, and cannot load its compiled operators with a CPU build of torch. Importing
it then fails with "operator torchvision::nms does not exist", and so does importing transformers, timm or peft.
Declaring the two missing operators makes the imports work; only calling these operators would still fail.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from fp8pipe.core.errors import MissingCapabilityError

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# torch removes a library's declarations when the Library object is deleted, so it is kept until the process ends.
_libraries: list[Any] = []


def declare_torchvision_operators() -> None:
    """Declare torchvision's operators if its own library cannot load; call before importing transformers.

    Does nothing if torch is a CUDA build, if torchvision is not installed or its compiled library loads (as a CPU
    build does), if the operators are already declared, and on a second call.
    """
    spec = None if _libraries else importlib.util.find_spec("torchvision")
    if spec is None:
        return
    import torch

    if torch.version.cuda is not None:
        return
    for folder in spec.submodule_search_locations or []:
        for library_path in Path(folder).glob("_C*.so"):
            # torchvision loads its library in the same way. If that fails, the operators are declared below.
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(library_path))
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    # qnms exists only in builds with quantized operators, so a library that has nms but no qnms is complete.
    if "nms" not in missing:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(name + _SCHEMA)
    _libraries.append(library)


def import_transformers() -> ModuleType:
    """Import and return transformers, declaring torchvision's operators first if needed."""
    declare_torchvision_operators()
    return importlib.import_module("transformers")


def import_package(name: str, what: str, fix: str) -> Any:
    """Import and return an optional package.

    Args:
        name: the module to import.
        what: error message if it cannot be imported, for instance "onnx_ir is not installed".
        fix: how the user can solve that, for instance a pip command.

    Raises:
        MissingCapabilityError: the package cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingCapabilityError(what, why=str(error), fix=fix) from error


def import_timm() -> ModuleType:
    """Import and return timm, declaring torchvision's operators first if needed.

    Raises:
        MissingCapabilityError: timm or torchvision is not installed.
    """
    declare_torchvision_operators()
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise MissingCapabilityError(
            "vision models need the packages timm and torchvision",
            why=f"no module named {error.name}",
            fix="pip install 'fp8pipe[vit]' torch==VERSION, with the version of torch that is installed now",
        ) from error
