"""What an engine was made from, and how it is stored. An engine is a cache: of a graph, a builder, a GPU, and settings.

All of it stands in the export's manifest, so an engine that no longer fits is known without loading it. TensorRT loads
an engine only with the version that built it, and only on the architecture it was built for.

Engines at rest are compressed with xz, which takes the repeated source text of their kernels away. As it is loaded, an
engine of a small model is ten times its codes; packed, it has about their size, and so it is stored and shipped. A
runtime wants the unpacked file: `ready_engine` or `xz -dk` gives it back, and `--no-pack` keeps it.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.core.machine import distribution_version

# Distributions that hold each builder; the first that is installed counts.
DISTRIBUTIONS = {"rtx": ("tensorrt-rtx",), "enterprise": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")}
PACKED_SUFFIX: Final = ".xz"
# The text is found at every level; higher ones take seconds per megabyte for what is left, the codes.
_PRESET: Final = 1
_CHUNK_BYTES: Final = 1 << 20
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


# The source text of kernels shrinks to a tenth or so; a file of zeros to a seven-thousandth.
_UNPACKED_TIMES: Final = 200


def pack_engine(engine: Path) -> Path:
    """Replace `NAME.engine` by `NAME.engine.xz`; its path."""
    packed = engine.with_name(engine.name + PACKED_SUFFIX)
    with engine.open("rb") as unpacked, lzma.open(packed, "wb", preset=_PRESET) as file:
        shutil.copyfileobj(unpacked, file, _CHUNK_BYTES)
    engine.unlink()
    return packed


def unpack_engine(packed: Path, target: Path) -> None:
    """Unpack an engine to `target`.

    Raises:
        BadArtifactError: it is not whole, or unpacks to more than an engine can.
    """
    most, written = _UNPACKED_TIMES * packed.stat().st_size + _CHUNK_BYTES, 0
    try:
        with lzma.open(packed) as file, target.open("wb") as unpacked:
            while chunk := file.read(_CHUNK_BYTES):
                written += unpacked.write(chunk)
                if written > most:
                    raise lzma.LZMAError(f"it unpacks to more than {most} bytes")
    except (lzma.LZMAError, EOFError) as error:
        raise BadArtifactError(f"{packed} is damaged", why=str(error), fix="export the model again") from error
