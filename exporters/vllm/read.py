"""Reading an export back: dequantized weights shard by shard, or a model as an engine's reference.

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

from exporters.vllm.plan import SCALE_SUFFIX
from exporters.vllm.target import KIND, VllmDetails
from fp8pipe.artifact import open_artifact
from fp8pipe.models.checkpoint.tensors import TensorEntry, read_tensor, weight_entries
from fp8pipe.models.language.structure import load_config, model_class
from fp8pipe.numerics.codec import dequantize_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["iter_shards", "iter_weights", "load_torch_model"]


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
    for _, weights in _by_file(Path(export)):
        for entry, scale, transposed in weights:
            yield entry.name, _value(entry, scale, transposed)


def iter_shards(export: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The same, a file at a time: file name and its tensors (fp32, so up to four times the file's size)."""
    for file_name, weights in _by_file(Path(export)):
        yield (
            file_name,
            {entry.name: _value(entry, scale, transposed) for entry, scale, transposed in weights},
        )


def load_torch_model(export_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model with the export's dequantized weights, in evaluation mode, on the CPU.

    Args:
        export_dir: a vllm-export directory.
        dtype: dtype of parameters and compute; weights are rounded to it once, from fp32.

    Raises:
        BadArtifactError: not a finished vllm-export, or damaged.
        ConfigurationError: an architecture transformers does not know.
    """
    config = load_config(Path(export_dir))
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in iter_weights(export_dir)}
    model: PreTrainedModel = model_class(config).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return model.eval()


def _by_file(export: Path) -> Iterator[tuple[str, list[tuple[TensorEntry, TensorEntry | None, bool]]]]:
    artifact = open_artifact(export, kind=KIND, verify=False)
    transposed = set(artifact.manifest.details_of(VllmDetails).transposed)
    entries = weight_entries(export)
    for file in sorted({entry.file for entry in entries.values()}):
        weights = []
        for name, entry in entries.items():
            is_scale = name.endswith(SCALE_SUFFIX) and name[: -len(SCALE_SUFFIX)] in entries
            if entry.file == file and not is_scale:
                weights.append((entry, entries.get(name + SCALE_SUFFIX), name in transposed))
        yield file.name, weights


def _value(entry: TensorEntry, scale: TensorEntry | None, transposed: bool) -> Tensor:
    tensor = read_tensor(entry)
    if scale is not None:
        return dequantize_weight(tensor, read_tensor(scale), transposed=transposed)
    return tensor.float() if tensor.is_floating_point() else tensor.clone()
