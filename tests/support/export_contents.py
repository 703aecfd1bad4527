"""What the files of an export for vLLM hold, read without the code under test."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

__all__ = ["config_of", "raw"]


def raw(root: Path) -> dict[str, Tensor]:
    """All tensors as stored, by name, by the safetensors library."""
    return {name: held for file in sorted(root.glob("model*.safetensors")) for name, held in load_file(file).items()}


def config_of(root: Path) -> dict[str, object]:
    """The quantization block of its config.json."""
    found: dict[str, object] = json.loads((root / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return found
