"""What a method has trained, as an artifact's files and facts: weights written over the base, and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from fp8pipe.artifact import ArtifactWriter, LayerRecord, none_of
from fp8pipe.artifact.kinds import MergeHealth
from pipeline.falqon.flush import FlushReport
from pipeline.finetune.weights import Weights, count_differing, write_checkpoint

_ADAPTER = "adapter.safetensors"


class Trained(Protocol):
    """A method that has finished."""

    def deployed_weights(self) -> Weights:
        """The weights as they are served, by module path."""

    def adapter(self) -> dict[str, Tensor]:
        """Tensors of the adapter, kept beside the weights for the record."""


def write_deployed(writer: ArtifactWriter, base: Path, method: Trained, names: Mapping[str, str]) -> list[str]:
    """Write the base checkpoint with the trained weights in place, and the adapter; gate what is read back.

    Args:
        writer: of the artifact.
        base: the base checkpoint.
        method: finished.
        names: of trained layers in the checkpoint, by module path.

    Returns:
        names of weights that are stored as (in, out).
    """
    weights = {names[name]: value for name, value in method.deployed_weights().items()}
    write_checkpoint(base, writer.root, weights)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in method.adapter().items()}
    if tensors:
        save_file(tensors, writer.root / _ADAPTER)
    writer.gate(none_of("reopened bytes differing", count_differing(writer.root, weights)))
    return [name for name, weight in weights.items() if weight.transposed]


def renamed(records: Sequence[LayerRecord], names: Mapping[str, str]) -> list[LayerRecord]:
    """Layer records under the names of the checkpoint."""
    return [record.model_copy(update={"name": names.get(record.name, record.name)}) for record in records]


def merge_facts(flushed: Mapping[str, FlushReport], names: Mapping[str, str]) -> dict[str, Any]:
    """What the final merge did, as `TunedDetails` has it; nothing where there was none."""
    if not flushed:
        return {}
    whole = sum(flushed.values(), FlushReport())
    layers = {names.get(name, name): MergeHealth(**report.health()) for name, report in flushed.items()}
    return {"final_merge": MergeHealth(**whole.health()), "final_merge_layers": layers}
