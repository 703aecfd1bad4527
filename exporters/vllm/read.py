"""Reading an export back: dequantized weights one by one, or a model as an engine's reference.

The reference model holds `code * scale`, computed in fp32 and rounded once to the dtype asked for. It
quantizes no activations, so it is the reference for `w8a16`, for `bf16`, and for engines that dequantize at
load; a W8A8 engine differs from it by the rounding of activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporters.vllm.target import KIND, VllmDetails
from fp8pipe.artifact import open_artifact
from fp8pipe.models.checkpoint.tensors import SCALE_SUFFIX, is_scale, read_tensor, weight_entries
from fp8pipe.models.language.structure import build_model
from fp8pipe.numerics.grids import dequantize_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def iter_weights(export: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an export but its scales, file by file, one in memory at a time.

    Args:
        export: a vllm-export directory.

    Yields:
        name and value: fp32 for float tensors (FP8 codes dequantized), the stored dtype for others; in the
        orientation stored.

    Raises:
        BadArtifactError: not a finished vllm-export, or damaged.
    """
    artifact = open_artifact(export, kind=KIND, verify=False)
    transposed = set(artifact.manifest.details_of(VllmDetails).transposed)
    entries = weight_entries(Path(export))
    for name, entry in entries.items():
        if is_scale(name, entries):
            continue
        tensor, scale = read_tensor(entry), entries.get(name + SCALE_SUFFIX)
        if scale is not None:
            yield name, dequantize_weight(tensor, read_tensor(scale), transposed=name in transposed)
        else:
            yield name, tensor.float() if tensor.is_floating_point() else tensor.clone()


def load_torch_model(export_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model with the export's dequantized weights, in evaluation mode, on the CPU.

    Args:
        export_dir: a vllm-export directory.
        dtype: dtype of parameters and compute; weights are rounded to it once, from fp32.

    Raises:
        BadArtifactError: not a finished vllm-export, or damaged.
        ConfigurationError: an architecture transformers does not know.
    """
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in iter_weights(export_dir)}
    return build_model(Path(export_dir), state, dtype)
