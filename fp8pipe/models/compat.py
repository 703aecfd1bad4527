"""Imports third-party packages that need a workaround; the only module that knows how.

With a CPU build of torch, the torchvision on PyPI (built for CUDA) cannot load its operators; importing it
then fails with "operator torchvision::nms does not exist", and so do transformers, timm and peft.
Declaring the two missing operators is enough for everything except running them.
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
# torch drops a library's definitions when the object is deleted, so it is kept for the life of the process.
_libraries: list[Any] = []


def declare_torchvision_operators() -> None:
    """Declare torchvision's operators if its own library cannot load; call before importing transformers.

    Does nothing on a CUDA build of torch, without torchvision, if torchvision's library loads (a CPU
    build of it), if the operators exist, or on a second call.
    """
    spec = None if _libraries else importlib.util.find_spec("torchvision")
    if spec is None:
        return
    import torch

    if torch.version.cuda is not None:
        return
    for folder in spec.submodule_search_locations or []:
        for library_path in Path(folder).glob("_C*.so"):
            # As torchvision itself does: if the library cannot load, the declarations below take over.
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(library_path))
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    # qnms exists only with quantized operators: a library that provides nms is complete without it.
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

    Raises:
        MissingCapabilityError: it cannot be imported; the caller words `what` it is needed for and the `fix`.
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
