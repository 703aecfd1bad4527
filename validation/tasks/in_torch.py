"""Scores texts with the transformers model in fp32, on the CPU, with one part of its weights in memory at a time.

Weights are those that are stored, dequantized if they are FP8 codes, and no activation is rounded: the model that a
validation compares engines with. Texts are computed one by one, so that a score depends on no other text. That takes
long for a large model; the engine is the one to use there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from exporters.vllm.target import KIND
from fp8pipe.artifact import Artifact, installed_versions
from fp8pipe.core.progress import track
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.checkpoint.tensors import read_tensor
from fp8pipe.models.language.parts import PART_BYTES, PartedModel, StoredWeights
from fp8pipe.numerics.bf16 import widen_bf16_products
from validation.tasks.scoring import Continuation, Score
from validation.vllm.expected import ExpectedWeights

# Texts in turn with each other for each part of the weights: of each, the hidden states are kept.
_AT_ONCE: Final = 256


def stored_weights(root: Path, artifact: Artifact | None) -> StoredWeights:
    """The weights of an export for vLLM, or, without one, of a model's checkpoint; fp32 where they are floats."""
    if artifact is not None and artifact.kind == KIND:
        return ExpectedWeights(artifact, None).stored
    entries = read_base(root).entries

    def blocks(name: str) -> list[Tensor]:
        tensor = read_tensor(entries[name])
        return [tensor.float() if tensor.is_floating_point() else tensor]

    return StoredWeights(entries, blocks)


class TorchScorer:
    """A `Scorer`.

    Args:
        root: directory of the model.
        artifact: its manifest, if it is an export.
        part_bytes: as `PartedModel`.
    """

    def __init__(self, root: Path, artifact: Artifact | None, part_bytes: int = PART_BYTES) -> None:
        widen_bf16_products()
        self._parted = PartedModel(root, stored_weights(root, artifact), part_bytes)
        self.versions = installed_versions(("torch", "transformers"))

    def score(self, texts: Sequence[Continuation]) -> list[Score]:
        """See `Scorer`."""
        found: list[Score] = []
        with track(len(texts), "scoring") as progress:
            for first in range(0, len(texts), _AT_ONCE):
                some = texts[first : first + _AT_ONCE]
                tables = self._parted.run([partial(self._score, text) for text in some])
                found += [Score(float(logprob), bool(greedy)) for logprob, greedy in tables]
                progress.advance(len(some))
        return found

    @torch.inference_mode()
    def _score(self, text: Continuation) -> Tensor:
        logits = self._parted.model(input_ids=torch.tensor([text.ids])).logits[0, text.start - 1 : -1]
        table = torch.log_softmax(logits.float(), dim=-1)  # (scored tokens, vocabulary)
        targets = torch.tensor(text.ids[text.start :])
        logprob = table.gather(1, targets[:, None]).double().sum()
        return torch.stack([logprob, (table.argmax(dim=-1) == targets).all().double()])
