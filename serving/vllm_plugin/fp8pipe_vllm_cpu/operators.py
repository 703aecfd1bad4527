"""Makes torchvision importable with a CPU build of torch; multimodal models in vLLM need it to process images.

The torchvision on PyPI is built for CUDA. With a CPU build of torch its library cannot be loaded, and the import fails
with "operator torchvision::nms does not exist". It is enough to declare the missing operators without implementing
them, because no vision-language model runs them. They must be declared after torch is imported and before torchvision
is, in each of vLLM's processes and before vLLM itself is imported. So a `.pth` file in the environment calls `install`
when Python starts. This only adds an import hook: torch is not imported until torchvision is, so the cost at startup is
negligible.
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
_libraries: list[Any] = []  # kept alive: torch removes the definitions of a library when the object is deleted


def install() -> None:
    """Install an import hook that declares torchvision's operators when torchvision is first imported."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """An import hook: it runs before torchvision is imported, and leaves the import itself to Python."""

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
    """Try to load torchvision's library, then declare the operators that are still missing."""
    import torch

    if torch.version.cuda is not None:
        return
    for library in (file for folder in folders for file in folder.glob("_C*.so")):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(library))
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if "nms" in missing:  # otherwise the library was loaded (qnms exists only with quantized operators)
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in missing:
            _libraries[-1].define(name + _SCHEMA)
