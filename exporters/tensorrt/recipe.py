"""What an engine was made from. An engine is a cache: of a graph, a builder, a GPU's architecture and settings.

All of it stands in the export's manifest, so an engine that no longer fits is known without loading it. TensorRT loads
an engine only with the version that built it, and only on the architecture it was built for.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.machine import distribution_version

__all__ = ["DISTRIBUTIONS", "EngineRecipe", "cache_folder", "installed_builder"]

# Distributions that hold each builder; the first that is installed counts.
DISTRIBUTIONS = {
    "rtx": ("tensorrt-rtx",),
    "enterprise": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}
_NAMES = {"rtx": "TensorRT for RTX", "enterprise": "TensorRT"}


class EngineRecipe(FrozenConfig):
    """Everything that decides an engine's bytes, or whether they can be loaded."""

    builder: Literal["rtx", "enterprise"] = Field(description="TensorRT for RTX, or TensorRT")
    version: str = Field(description="the builder's version")
    capability: str = Field(description="compute capability, for instance 8.9")
    graph_sha256: str = Field(description="digest of the ONNX file")
    profiles: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = Field(
        description="smallest, usual and largest shape of every input"
    )
    settings: dict[str, Any] = Field(description="builder flags and the like")

    @property
    def digest(self) -> str:
        """sha256 of all fields, hexadecimal: the engine's name in the cache."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, wanted: EngineRecipe) -> tuple[str, ...]:
        """Why an engine of this recipe does not serve in the place of `wanted`; empty when it does."""
        mine, theirs = self.model_dump(mode="json"), wanted.model_dump(mode="json")
        words = {
            "builder": f"it was built by {_NAMES[self.builder]}, not {_NAMES[wanted.builder]}",
            "version": f"it was built by {_NAMES[self.builder]} {self.version}, and {wanted.version} is installed",
            "capability": f"it is for compute capability {self.capability}, not {wanted.capability}",
            "graph_sha256": f"it is of another graph ({self.graph_sha256[:12]}, not {wanted.graph_sha256[:12]})",
            "profiles": "it is for other input shapes",
            "settings": "it was built with other settings",
        }
        return tuple(words[key] for key in mine if mine[key] != theirs[key])


def installed_builder(builder: str) -> str | None:
    """Version of the installed builder; None where there is none. Nothing is imported."""
    return next((v for name in DISTRIBUTIONS[builder] if (v := distribution_version(name)) is not None), None)


def cache_folder() -> Path:
    """`$FP8PIPE_CACHE/engines`, or `~/.cache/fp8pipe/engines`."""
    base = os.environ.get("FP8PIPE_CACHE")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "fp8pipe") / "engines"
