"""Refuses a disk that is too full for a run before the run trains, not when it writes its result hours later."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path

from fp8pipe.artifact import disk_guard
from fp8pipe.models.checkpoint.quantized.base import base_entries
from fp8pipe.models.checkpoint.tensors import TensorEntry
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loop import Trainer

__all__ = ["check_room", "moment_bytes", "output_sizes"]


def output_sizes(
    config: FinetuneConfig, entries: Mapping[str, TensorEntry], trained: Collection[str]
) -> dict[str, int]:
    """Bytes of tensors in each weight file of the output, which has the files of the base.

    Args:
        config: the run's configuration.
        entries: the base's tensors, by name.
        trained: names of those that the run replaces.
    """
    sizes: dict[str, int] = {}
    for name, entry in entries.items():
        new = int(prod(entry.shape) * config.bytes_per_weight)
        sizes[entry.file.name] = sizes.get(entry.file.name, 0) + (new if name in trained else entry.size_bytes)
    return sizes


def moment_bytes(config: FinetuneConfig) -> int:
    """Bytes of the optimizer's two moments per trained value."""
    return 2 if config.optimizer == "adamw-8bit" else 8


def check_room(
    config: FinetuneConfig, base: Path, trainer: Trainer, root: Path, names: Collection[str], spilled: int = 0
) -> None:
    """Check that the disk has room for the checkpoints and the weights that a run has still to write.

    Only tensors are counted, so the space that is asked for is never more than what will be needed.

    Args:
        config: the run's configuration.
        base: directory of the base model.
        trainer: the run, prepared: the converted base is already written.
        root: directory in which the artifact is written.
        names: the trained layers' names in the checkpoint.
        spilled: bytes of further files that will be there together with the checkpoints and the weights.

    Raises:
        OutOfMemoryError: there is less space than needed; the message states both numbers.
    """
    output = sum(output_sizes(config, base_entries(base), {f"{name}.weight" for name in names}).values())
    state = sum(tensor.numel() * tensor.element_size() for tensor in trainer.method.step_state().values())
    state += moment_bytes(config) * sum(parameter.numel() for parameter in trainer.names)
    kept = min(config.saves, config.keep_checkpoints)
    # What an interrupted run left is replaced, or counts as one of these checkpoints.
    places = ("*.safetensors", "checkpoints/step-*/*.safetensors")
    written = sum(file.stat().st_size for place in places for file in root.glob(place))
    disk_guard(root, max(0, output + kept * state - written) + spilled)
