"""What an engine was built from, and how it is stored. An engine is a cache of a graph, builder, GPU, and settings.

All of these are in the export's manifest, so a stale engine can be recognized without loading it. TensorRT loads an
engine only with the version that built it, and only on the architecture it was built for.

Stored engines are compressed with xz, which removes the redundancy of their kernels' source text. Uncompressed, the
engine of a small model is ten times as large as its codes; compressed, it has about their size. It is stored and
shipped in that form. A runtime needs the uncompressed file: `ready_engine` or `xz -dk` restores it, and `--no-pack`
stores it uncompressed.
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

# Python distributions that contain each builder, in order of preference; the first one installed is used.
DISTRIBUTIONS = {"rtx": ("tensorrt-rtx",), "enterprise": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")}
PACKED_SUFFIX: Final = ".xz"
# Every xz level compresses the text; higher ones spend seconds per megabyte on the remaining data, the codes.
_PRESET: Final = 1
_CHUNK_BYTES: Final = 1 << 20
_NAMES = {"rtx": "TensorRT for RTX", "enterprise": "TensorRT"}


class EngineRecipe(FrozenConfig):
    """Everything that determines an engine's bytes, or whether it can be loaded."""

    builder: Literal["rtx", "enterprise"] = Field(description="TensorRT for RTX, or TensorRT")
    version: str = Field(description="the builder's version")
    capability: str = Field(description="compute capability, for instance 8.9")
    graph_sha256: str = Field(description="digest of the ONNX file")
    profiles: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = Field(
        description="smallest, typical and largest shape of every input"
    )
    settings: dict[str, Any] = Field(description="builder flags and other settings")

    @property
    def digest(self) -> str:
        """sha256 of all fields, hexadecimal: the engine's name in the cache."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, wanted: EngineRecipe) -> tuple[str, ...]:
        """The reasons why an engine built by this recipe cannot be used where `wanted` is needed; empty if it can."""
        mine, theirs = self.model_dump(mode="json"), wanted.model_dump(mode="json")
        words = {
            "builder": f"it was built by {_NAMES[self.builder]}, not {_NAMES[wanted.builder]}",
            "version": f"it was built by {_NAMES[self.builder]} {self.version}, but {wanted.version} is installed",
            "capability": f"it is for compute capability {self.capability}, not {wanted.capability}",
            "graph_sha256": f"its graph is another ({self.graph_sha256[:12]}, not {wanted.graph_sha256[:12]})",
            "profiles": "it was built for other input shapes",
            "settings": "it was built with other settings",
        }
        return tuple(words[key] for key in mine if mine[key] != theirs[key])


def installed_builder(builder: str) -> str | None:
    """Version of the installed builder ("rtx" or "enterprise"), from package metadata; None if it is not installed."""
    return next((v for name in DISTRIBUTIONS[builder] if (v := distribution_version(name)) is not None), None)


def cache_folder() -> Path:
    """`$FP8PIPE_CACHE/engines`, or `~/.cache/fp8pipe/engines`."""
    base = os.environ.get("FP8PIPE_CACHE")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "fp8pipe") / "engines"


# The largest accepted ratio of unpacked to packed size: kernel source text compresses to about a tenth, but a file of
# zeros, which would fill the disk, to 1/7000.
_UNPACKED_TIMES: Final = 200


def pack_engine(engine: Path) -> Path:
    """Replace `NAME.engine` by `NAME.engine.xz` and return the new path."""
    packed = engine.with_name(engine.name + PACKED_SUFFIX)
    with engine.open("rb") as unpacked, lzma.open(packed, "wb", preset=_PRESET) as file:
        shutil.copyfileobj(unpacked, file, _CHUNK_BYTES)
    engine.unlink()
    return packed


def unpack_engine(packed: Path, target: Path) -> None:
    """Decompress an engine to `target`.

    Raises:
        BadArtifactError: the file is incomplete or damaged, or unpacks to more than 200 times its size.
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
