"""The stage's last gate without its fresh process, which costs seconds a run; a few tests start the real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp8pipe.artifact.gate import Gate, none_of
from fp8pipe.models.vision.quantized import QuantizedVit, load_quantized

__all__ = ["rebuild_here"]


def rebuild_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the written files again in this process, and compare the logits."""

    def gate(quantized: QuantizedVit, pixels: Tensor, root: Path, scratch: Path) -> Gate:
        with torch.no_grad():
            differing = int((load_quantized(root)(pixels) != quantized(pixels)).sum())
        return none_of("logits differing after a fresh process", differing, "rebuilt in this process")

    monkeypatch.setattr("pipeline.vit.deploy.rebuild_gate", gate)
