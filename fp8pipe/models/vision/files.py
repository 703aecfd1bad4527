"""Small configurations beside the weights: one JSON file each, read back strictly."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fp8pipe.core.errors import BadArtifactError

__all__ = ["read_model_file", "write_model_file"]

T = TypeVar("T", bound=BaseModel)


def write_model_file(config: BaseModel, path: Path) -> None:
    """Write a configuration as JSON."""
    path.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_model_file(cls: type[T], path: Path) -> T:
    """Read what `write_model_file` wrote.

    Raises:
        BadArtifactError: the file is absent, or not a valid `cls`.
    """
    try:
        return cls.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        why = (
            "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
            if isinstance(error, ValidationError)
            else f"{type(error).__name__}: {error}"
        )
        raise BadArtifactError(
            f"{path} is not a valid {cls.__name__}", why=why, fix="write the directory again"
        ) from error
