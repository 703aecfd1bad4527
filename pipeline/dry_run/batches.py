"""Sizes of a run's batches, which determine its activations and its time, and whether its rows can be packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from fp8pipe.artifact.kinds import PackingFacts
from fp8pipe.models.language.structure import model_class
from fp8pipe.models.language.unstacking import unstack_experts
from pipeline.dry_run.activations import layer_count, with_layers
from pipeline.finetune.batches import Batch, Batches
from pipeline.finetune.packing import find_packing

_LOOKED_AT: Final = 512  # maximum number of batches searched for the largest
_LAYERS: Final = 2
_PROBED_WEIGHTS: Final = 1 << 26  # a larger model would take longer to create than the rest of a plan


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Sizes of the largest of some batches, and how they compare.

    Attributes:
        count: number of batches in an epoch.
        rows, length: shape of the largest one; `length` includes padding.
        answers: its answer tokens.
        share: mean size of a batch relative to the largest.
    """

    count: int
    rows: int
    length: int
    answers: int
    share: float


def batch_sizes(batches: Batches, used: int) -> BatchSizes:
    """The sizes of the first `used` batches; of a long run only some hundreds are read."""
    seen = [batches.at(index) for index in range(min(used, _LOOKED_AT))]
    sizes = [batch.input_ids.numel() + batch.answer_tokens for batch in seen]
    largest = seen[sizes.index(max(sizes))]
    rows, length = largest.input_ids.shape
    return BatchSizes(len(batches), rows, length, largest.answer_tokens, sum(sizes) / len(sizes) / max(sizes))


def largest_with_images(batches: Batches, used: int) -> Batch | None:
    """The longest of the first `used` batches that have images; of a long run only some hundreds are read."""
    seen = (batches.at(index) for index in range(min(used, _LOOKED_AT)))
    pictured = (batch for batch in seen if batch.image_inputs is not None)
    return max(pictured, key=lambda batch: batch.input_ids.numel(), default=None)


def probe_packing(settings: Any, dtype: torch.dtype, weights: int, batches: Batches) -> PackingFacts | None:
    """What the packing probe finds for this architecture, with two layers of random weights.

    Args:
        settings: the model's transformers configuration.
        dtype: of the model.
        weights: the number of all its weights.
        batches: the packed training batches.

    Returns:
        None if two layers are too large to be created for a plan.
    """
    layers = layer_count(settings)
    count = min(_LAYERS, layers)
    text = settings.get_text_config(decoder=True)
    ends = 2 * int(getattr(text, "vocab_size", 0)) * int(getattr(text, "hidden_size", 0))
    if max(0, weights - ends) * count // layers + ends > _PROBED_WEIGHTS:
        return None
    small = with_layers(settings, count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(small)._from_config(small, dtype=dtype)
    unstack_experts(model)
    return find_packing(model, batches.at(0))
