"""Write trained weights to an artifact in the layout of the base checkpoint, read them back and compare them.

Everything that was not trained (embeddings, norms, tokenizer) is copied byte for byte, one shard at a time, so that
memory use is about one shard. If the base is quantized, its weights that were not trained are written dequantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8pipe.artifact import ArtifactWriter, LayerRecord, disk_guard, none_of
from fp8pipe.artifact.kinds import MergeHealth
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.checkpoint.packed import COMPRESSED_TENSORS
from fp8pipe.models.checkpoint.quantized.base import base_entries, copy_base_files
from fp8pipe.models.checkpoint.sidecars import read_config
from fp8pipe.models.checkpoint.stacks import join_stacks, split_stacks
from fp8pipe.models.checkpoint.tensors import (
    SCALE_SUFFIX,
    SINGLE_NAME,
    header_entries,
    read_tensor,
    weight_files,
    write_index,
)
from pipeline.falqon.flush import FlushReport


class Deployed(NamedTuple):
    """A weight of the final model, in the checkpoint's orientation.

    Attributes:
        values: FP8 codes, packed NVFP4 codes, or a float weight.
        scale: fp32 scalar; the weight is `codes * scale`. For NVFP4 the block scales; None for a float weight.
        transposed: whether the checkpoint stores the weight as (in, out).
        divisor: the reciprocal of the global scale, fp32 `(1,)`; for NVFP4 only.
    """

    values: Tensor
    scale: Tensor | None
    transposed: bool
    divisor: Tensor | None = None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The stored tensors by their names in the checkpoint, where the weight is called `name`."""
        if self.scale is None:
            return {name: self.values}
        if self.divisor is None:
            return {name: self.values, name + SCALE_SUFFIX: self.scale.float()}
        stored = COMPRESSED_TENSORS
        return {name + stored.codes: self.values, name + stored.blocks: self.scale, name + stored.whole: self.divisor}


Weights = dict[str, Deployed]  # by module path, or by checkpoint name without `.weight`


def write_checkpoint(base: Path, root: Path, weights: Weights) -> None:
    """Copy the base checkpoint to the directory `root`, but with the trained weights in place of the original ones.

    Args:
        base: directory of the base checkpoint.
        root: an existing directory.
        weights: the trained weights, by their names in the checkpoint without `.weight`.

    Experts that the base holds stacked are stacked again if all weights are floats, so that transformers loads them;
    codes have a scale for each expert and are stored one by one.

    Raises:
        ConfigurationError: the base checkpoint cannot be read.
    """
    copy_base_files(base, root)
    files = weight_files(base)
    entries = base_entries(base)
    model_type = read_config(base / "config.json").get("model_type")
    trained = {f"{name}.weight": weight.tensors(f"{name}.weight") for name, weight in weights.items()}
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        tensors: dict[str, Tensor] = {}
        for name, entry in entries.items():
            if entry.file != file:
                continue
            if name in trained:
                tensors |= {own: tensor.cpu().contiguous() for own, tensor in trained[name].items()}
            else:
                tensors[name] = read_tensor(entry)
        if not tensors:  # the base's file holds only scales
            continue
        if all(weight.scale is None for weight in weights.values()):
            tensors = join_stacks(model_type, tensors)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        with disk_guard(root, size):
            save_file(tensors, root / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        total += size
    if [file.name for file in files] != [SINGLE_NAME]:
        write_index(root, weight_map, total)


def count_differing(root: Path, weights: Weights) -> int:
    """Reopen a written checkpoint and count the bytes of weights and scales in it that differ from `weights`.

    Raises:
        BadArtifactError: a weight is missing, or there is a scale for a weight that is not quantized.
    """
    wanted = _tensors(weights)
    written = {name: entry for file in weight_files(root) for name, entry in header_entries(file).items()}
    written = split_stacks(read_config(root / "config.json").get("model_type"), written)
    for name in weights:
        if (key := f"{name}.weight{SCALE_SUFFIX}") in written.keys() - wanted.keys():
            raise BadArtifactError(f"{key} was written although {name} is not quantized")
    if missing := sorted(wanted.keys() - written.keys()):
        raise BadArtifactError(f"weights are missing from {root}", why=", ".join(missing[:5]))
    return sum(int((_raw(read_tensor(written[key])) != _raw(tensor.cpu())).sum()) for key, tensor in wanted.items())


def _tensors(weights: Weights) -> dict[str, Tensor]:
    """All tensors of `weights` by their names in the checkpoint."""
    named = (weight.tensors(f"{name}.weight") for name, weight in weights.items())
    return {name: tensor for tensors in named for name, tensor in tensors.items()}


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


_ADAPTER = "adapter.safetensors"


def write_deployed(
    writer: ArtifactWriter, base: Path, deployed: Weights, adapter: Mapping[str, Tensor], names: Mapping[str, str]
) -> list[str]:
    """Write the base checkpoint with the trained weights, and the adapter to a separate file.

    The weights are read back; a gate of the artifact requires that no byte differs.

    Args:
        writer: the writer of the artifact.
        base: directory of the base checkpoint.
        deployed: the trained weights, by module path.
        adapter: the adapter's tensors by name; no file is written if empty.
        names: names of the trained layers in the checkpoint, by module path.

    Returns:
        Names of the weights that are stored as (in, out).
    """
    weights = {names[name]: value for name, value in deployed.items()}
    write_checkpoint(base, writer.root, weights)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter.items()}
    if tensors:
        save_file(tensors, writer.root / _ADAPTER)
    writer.gate(none_of("reopened bytes differing", count_differing(writer.root, weights)))
    return [name for name, weight in weights.items() if weight.transposed]


def renamed(records: Sequence[LayerRecord], names: Mapping[str, str]) -> list[LayerRecord]:
    """The layer records with module paths replaced by names in the checkpoint, to which `names` maps them."""
    return [record.model_copy(update={"name": names.get(record.name, record.name)}) for record in records]


def merge_facts(flushed: Mapping[str, FlushReport], names: Mapping[str, str]) -> dict[str, Any]:
    """The reports of the final merge as fields of `TunedDetails`; empty if there was no final merge.

    Args:
        flushed: reports by module path.
        names: names in the checkpoint, by module path.
    """
    if not flushed:
        return {}
    whole = sum(flushed.values(), FlushReport())
    layers = {names.get(name, name): MergeHealth(**report.health()) for name, report in flushed.items()}
    return {"final_merge": MergeHealth(**whole.health()), "final_merge_layers": layers}
