"""The gates of a quantized vision transformer: its codes, its agreement with the teacher, and its files, read again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8pipe.artifact import Comparison, Gate, Verdict
from fp8pipe.core.devices import parts_on
from fp8pipe.models.vision.answers import agreeing
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.quantized import QuantizedVit
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure

__all__ = ["agreement_gate", "code_gate", "rebuild_gate"]

_BATCH: Final = 32


def code_gate(quantized: QuantizedVit) -> Gate:
    """A gate that no weight has more distinct codes than its bit width allows, such as 16 for a 4-bit weight."""
    above = sum(len(w.codes.view(torch.uint8).unique()) > 2**w.bits for w in quantized.weights.values())
    return Gate(name="weights with too many codes", value=above)


@torch.no_grad()
def agreement_gate(
    vision: VisionModel, quantized: QuantizedVit, pixels: Tensor, structure: VitStructure, device: torch.device
) -> Gate:
    """A gate on how well the deployed model agrees with its teacher on the calibration images.

    Args:
        vision: the original model, on `device`.
        quantized: the deployed model, on `device`.
        pixels: normalized calibration images `(N, 3, H, W)`, on the host.
        structure: the original model's structure.
        device: where the models run.
    """
    teacher = torch.cat([vision_outputs(vision.model, batch).cpu() for batch in parts_on(pixels, _BATCH, device)])
    student = torch.cat([quantized(batch).cpu() for batch in parts_on(pixels, _BATCH, device)])
    if structure.is_backbone:
        value = float(torch.cosine_similarity(teacher, student, dim=1).mean())
        name = "cosine with the teacher's features"
        detail = "on the calibration images"
    else:
        value = float(agreeing(teacher, student, vision.architecture.activation).float().mean())
        name, detail = "top-1 agreement with the teacher", "on the calibration images"
        if not vision.architecture.ranked:
            name = "agreement with the teacher's outputs"
            detail += ": share whose outputs differ by less than half of the teacher's spread"
    return Gate(
        name=name, value=value, comparison=Comparison.AT_LEAST, threshold=0.5, detail=detail,
        failure=Verdict.REGRESSION,
    )  # fmt: skip


_FRESH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from fp8pipe.models.vision.quantized import load_quantized
torch.set_num_threads(int(sys.argv[3]))
with torch.no_grad():
    logits = load_quantized(Path(sys.argv[1]))(load_file(Path(sys.argv[2]) / "probe.safetensors")["pixels"])
save_file({"logits": logits.contiguous()}, Path(sys.argv[2]) / "answer.safetensors")
"""


@torch.no_grad()
def rebuild_gate(quantized: QuantizedVit, pixels: Tensor, root: Path, scratch: Path) -> Gate:
    """A gate that the model, rebuilt from the written files in a new process, gives bit-identical logits.

    Args:
        quantized: the model that was written, on the CPU.
        pixels: normalized images `(N, 3, H, W)` to compare on.
        root: the directory with the written files.
        scratch: an existing directory for images and logits; the caller deletes it.
    """
    save_file({"pixels": pixels.contiguous()}, scratch / "probe.safetensors")
    command = [sys.executable, "-P", "-c", _FRESH, str(root), str(scratch), str(torch.get_num_threads())]
    ended = subprocess.run(command, capture_output=True, text=True)
    name = "logits differing after a fresh process"
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or ["no message"]
        return Gate(name=name, value=float(pixels.shape[0]), detail=last[0][:300])
    again = load_file(scratch / "answer.safetensors")["logits"]
    differing = int((again != quantized(pixels)).sum())
    return Gate(name=name, value=differing, detail=f"of {again.numel()}")
