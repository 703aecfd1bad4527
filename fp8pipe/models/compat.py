"""The one place that knows how third-party packages must be imported.

With a CPU build of torch, the torchvision on PyPI (built for CUDA) cannot load its operators; importing it
then fails with "operator torchvision::nms does not exist" and takes transformers, timm and peft down with it.
Declaring the two operators that are missing is enough for everything but running them.
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
# torch drops a library's definitions with the object, so it lives as long as the process.
_libraries: list[Any] = []


def declare_torchvision_operators() -> None:
    """Declare torchvision's operators where its own library cannot load; call before importing transformers.

    Does nothing on a CUDA build of torch, without torchvision, where torchvision's library loads (a CPU
    build of it), when the operators exist, or the second time.
    """
    spec = None if _libraries else importlib.util.find_spec("torchvision")
    if spec is None:
        return
    import torch

    if torch.version.cuda is not None:
        return
    for folder in spec.submodule_search_locations or []:
        for library_path in Path(folder).glob("_C*.so"):
            # As torchvision itself does: a library that cannot load is left to the declarations below.
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(library_path))
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    # qnms exists only with quantized operators: a library that brought nms is whole without it.
    if "nms" not in missing:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(name + _SCHEMA)
    _libraries.append(library)


def import_transformers() -> ModuleType:
    """Import and return transformers, with torchvision's operators declared first where that is needed."""
    declare_torchvision_operators()
    return importlib.import_module("transformers")


def import_package(name: str, what: str, fix: str) -> Any:
    """Import and return a package that not every installation has.

    Raises:
        MissingCapabilityError: it cannot be imported; `what` it is needed for and the `fix` are the caller's words.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingCapabilityError(what, why=str(error), fix=fix) from error


def import_timm() -> ModuleType:
    """Import and return timm, with torchvision's operators declared first where that is needed.

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
