"""What other processes need to evaluate for rank 0: the quantized model's files, which only rank 0 has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.image_folder import ImageFolder
from fp8pipe.models.vision.quantized import QUANTIZED_FILES
from fp8pipe.models.vision.sources import VisionModel
from pipeline.vit.evaluate import folder_digest

__all__ = ["accuracy_payload", "open_accuracy_payload"]

_FIX: Final = "give every machine the same files, under the same paths"


def accuracy_payload(root: Path, vision: VisionModel, folder: ImageFolder) -> bytes:
    """A line of JSON, then the files that `save_quantized` has written to `root`, one after another."""
    files = {name: (root / name).read_bytes() for name in QUANTIZED_FILES}
    described = {
        "model": vision.digest, "pictures": folder_digest(folder), "threads": torch.get_num_threads(),
        "files": {name: len(data) for name, data in files.items()},
    }  # fmt: skip
    return json.dumps(described).encode() + b"\n" + b"".join(files.values())


def open_accuracy_payload(payload: bytes, root: Path, vision: VisionModel, folder: ImageFolder) -> None:
    """Write the files to `root`, for `load_quantized`, and compute with rank 0's number of threads from now on.

    Raises:
        ConfigurationError: this machine's model or pictures are not those of rank 0.
    """
    line, _, rest = payload.partition(b"\n")
    described = json.loads(line)
    for name, found in (("model", vision.digest), ("pictures", folder_digest(folder))):
        if described[name] != found:
            raise ConfigurationError(
                f"the {name} of this rank are not those of rank 0",
                why=f"digest {found[:23]}, and {described[name][:23]} there",
                fix=_FIX,
            )
    torch.set_num_threads(described["threads"])
    for name, size in described["files"].items():
        (root / name).write_bytes(rest[:size])
        rest = rest[size:]
