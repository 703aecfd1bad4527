"""A small artifact of three files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from fp8pipe.artifact import Artifact, ArtifactWriter

SHARD = "model-00002-of-00002.safetensors"


def write(output: Path, *, content: bytes = b"codes", force: bool = False, **fields: object) -> Artifact:
    with ArtifactWriter(output, kind="falqon", stage="finetune", force=force) as writer:
        (writer.root / "config.json").write_text("{}")
        (writer.root / "nested").mkdir()
        (writer.root / "nested" / "a.txt").write_bytes(content)
        save_file({"w": torch.arange(64.0)}, writer.root / SHARD)
        return writer.commit(**fields)
