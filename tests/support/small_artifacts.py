"""A small artifact of three files, and what the manifests of each kind must state at least."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fp8pipe.artifact import Artifact, ArtifactWriter
from fp8pipe.artifact.kinds import Details, kind_named
from fp8pipe.artifact.manifest import Encoding

SHARD = "model-00002-of-00002.safetensors"
E4M3 = Encoding(format="e4m3", bits=8, granularity="per-channel")
INT8 = Encoding(format="int", bits=8, granularity="per-channel")
_PIXELS = {"name": "pixels", "shape": ["batch", 3, 32, 48]}
_LOGITS = {"name": "logits", "what": "logits"}
LEAST: dict[str, dict[str, Any]] = {
    "falqon": {"adapter": "flushed"},
    "lora-merged": {"adapter": "merged"},
    "vit": {"precision": "w8a8", "images": 0, "image_method": "gaussian"},
    "vllm-export": {"format": "fp8", "payload_bytes": 5},
    "onnx-export": {"format": "qdq", "input": _PIXELS, "output": _LOGITS},
    "trt-export": {"format": "int8", "base": "fp16", "input": _PIXELS, "output": _LOGITS},
    "trt-language-export": {
        "format": "fp8", "base": "fp16", "output": _LOGITS, "calibration": {"data": "text.jsonl", "records": 1},
        "activations": {"format": "e4m3", "bits": 8, "granularity": "per-tensor"},
    },
    "modelopt-export": {"format": "modelopt-checkpoint", "quant_algo": "FP8"},
}  # fmt: skip


def details_of(kind: str, **changes: object) -> Details:
    """The details of a kind: the fewest that it takes, and `changes`."""
    return kind_named(kind).details.model_validate(LEAST[kind] | changes)


def write(
    output: Path, *, content: bytes = b"codes", force: bool = False, kind: str = "falqon", **fields: Any
) -> Artifact:
    with ArtifactWriter(output, kind=kind, stage="finetune", force=force) as writer:
        (writer.root / "config.json").write_text("{}")
        (writer.root / "nested").mkdir()
        (writer.root / "nested" / "a.txt").write_bytes(content)
        save_file({"w": torch.arange(64.0)}, writer.root / SHARD)
        return writer.commit(**{"details": details_of(kind), **fields})
