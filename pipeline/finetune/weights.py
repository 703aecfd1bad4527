"""Writing the trained weights over a copy of the base checkpoint, and reading them back to be sure.

Everything that was not trained (embeddings, norms, tokenizer) is carried over byte for byte, shard by shard, so memory
stays near one shard.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8pipe.artifact import disk_guard
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.checkpoint.sidecars import BASE_MODEL_FILES, copy_sidecars
from fp8pipe.models.checkpoint.tensors import (
    SCALE_SUFFIX,
    SINGLE_NAME,
    TensorEntry,
    blame_configuration,
    header_entries,
    read_tensor,
    weight_files,
    write_index,
)


class Deployed(NamedTuple):
    """A weight in the form that is served, in the checkpoint's orientation.

    Attributes:
        values: FP8 codes, or a float weight.
        scale: fp32 scalar, `codes * scale`; None for a float weight.
        transposed: the checkpoint's orientation is (in, out).
    """

    values: Tensor
    scale: Tensor | None
    transposed: bool


Weights = dict[str, Deployed]


def write_checkpoint(base: Path, root: Path, weights: Weights) -> None:
    """Copy the base checkpoint to `root`, with `weights` in place of the tensors they name.

    Args:
        base: the base checkpoint's directory.
        root: destination; exists.
        weights: by checkpoint name without `.weight`.

    Raises:
        ConfigurationError: the base checkpoint cannot be read.
    """
    copy_sidecars(base, root, BASE_MODEL_FILES)
    with blame_configuration():
        files = weight_files(base)
    trained = _tensors(weights)
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        tensors: dict[str, Tensor] = {}
        for name, entry in header_entries(file).items():
            own = (name, name + SCALE_SUFFIX)
            if name in trained:
                tensors |= {n: trained[n].cpu().contiguous() for n in own if n in trained}
            else:
                tensors[name] = read_tensor(entry)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        with disk_guard(root, size):
            save_file(tensors, root / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        total += size
    if [file.name for file in files] != [SINGLE_NAME]:
        write_index(root, weight_map, total)


def count_differing(root: Path, weights: Weights) -> int:
    """Reopen a written checkpoint and count the bytes of `weights` (and scales) that differ from it.

    Raises:
        BadArtifactError: a weight is missing, or a scale is there of a weight that has none.
    """
    wanted = _tensors(weights)
    written: dict[str, TensorEntry] = {}
    for file in weight_files(root):
        written |= header_entries(file)
    for name in weights:
        if (key := f"{name}.weight{SCALE_SUFFIX}") in written.keys() - wanted.keys():
            raise BadArtifactError(f"{key} was written although {name} is not quantized")
    if missing := sorted(wanted.keys() - written.keys()):
        raise BadArtifactError(f"weights are missing from {root}", why=", ".join(missing[:5]))
    return sum(int((_raw(read_tensor(written[key])) != _raw(tensor.cpu())).sum()) for key, tensor in wanted.items())


def _tensors(weights: Weights) -> dict[str, Tensor]:
    """Weights and scales by their names in the checkpoint."""
    tensors: dict[str, Tensor] = {}
    for name, (values, scale, _) in weights.items():
        tensors[f"{name}.weight"] = values
        if scale is not None:
            tensors[f"{name}.weight{SCALE_SUFFIX}"] = scale.float()
    return tensors


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
