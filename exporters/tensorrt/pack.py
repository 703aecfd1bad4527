"""Engines at rest: compressed with xz, which takes the repeated source text of their kernels away.

Plain, an engine of a small model is ten times its codes; packed, it has about their size, and so it is stored and
shipped. A runtime wants the plain file: `ready_engine` or `xz -dk` gives it back, and `--no-pack` keeps it.
"""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path
from typing import Final

from fp8pipe.core.errors import BadArtifactError

__all__ = ["PACKED_SUFFIX", "pack_engine", "unpack_engine"]

PACKED_SUFFIX: Final = ".xz"
# The text is found at every level; higher ones take seconds a megabyte for what is left, the codes.
_PRESET: Final = 1
_CHUNK_BYTES: Final = 1 << 20


def pack_engine(engine: Path) -> Path:
    """Replace `NAME.engine` by `NAME.engine.xz`; its path."""
    packed = engine.with_name(engine.name + PACKED_SUFFIX)
    with engine.open("rb") as plain, lzma.open(packed, "wb", preset=_PRESET) as file:
        shutil.copyfileobj(plain, file, _CHUNK_BYTES)
    engine.unlink()
    return packed


def unpack_engine(packed: Path, target: Path) -> None:
    """Write the plain engine of a packed one to `target`.

    Raises:
        BadArtifactError: it is not whole.
    """
    try:
        with lzma.open(packed) as file, target.open("wb") as plain:
            shutil.copyfileobj(file, plain, _CHUNK_BYTES)
    except (lzma.LZMAError, EOFError) as error:
        raise BadArtifactError(f"{packed} is damaged", why=str(error), fix="export the model again") from error
