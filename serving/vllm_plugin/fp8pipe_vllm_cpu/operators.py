"""Let torchvision be imported beside a CPU build of torch: models with pictures need it in vLLM.

The torchvision on PyPI is built for CUDA. Beside a CPU build of torch its library cannot load, and its import fails
with "operator torchvision::nms does not exist". Declaring what is missing is enough for everything but running these
operators, and no model of pictures and text runs them. The declaration has to come between torch and torchvision, in
each of vLLM's processes and before vLLM itself, so a `.pth` file of the environment calls `install` when Python starts.
It costs next to nothing there: torch is imported when torchvision is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["install"]

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[Any] = []  # torch drops a library's definitions with the object


def install() -> None:
    """Declare torchvision's operators when it is first imported; does nothing before."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds nothing itself; the import of torchvision passes by here first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and path is None:
            sys.meta_path.remove(self)
            spec = PathFinder.find_spec(fullname)
            _declare(Path(folder) for folder in (spec and spec.submodule_search_locations) or [])
            return spec
        return None


def _declare(folders: Any) -> None:
    """Declare what the library, which is tried first, does not bring."""
    import torch

    if torch.version.cuda is not None:
        return
    for library in (file for folder in folders for file in folder.glob("_C*.so")):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(library))
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if "nms" in missing:  # else the library did load: qnms is there with quantized operators alone
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in missing:
            _libraries[-1].define(name + _SCHEMA)
