"""The artifact's own model in torch, with which an export is compared: layer by layer where it can run so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from exporters.tensorrt.language.calibrate import InputCounts, Score, count_inputs, dynamic_inputs, run_whole, score
from exporters.tensorrt.language.source import LanguageModel
from exporters.tensorrt.language.stream import LayerStream, NotLayered, open_stream
from fp8pipe.models.language.text import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Reference:
    """A model in float32."""

    source: LanguageModel
    model: PreTrainedModel
    stream: LayerStream | None  # None if all weights have to be in memory

    @classmethod
    def of(cls, source: LanguageModel) -> Reference:
        """The model of an artifact; it is loaded as a whole only if its layers cannot run one by one."""
        try:
            stream = open_stream(source, torch.float32)
        except NotLayered:
            return cls(source, source.torch_model(torch.float32), None)
        return cls(source, stream.model, stream)

    def whole(self) -> PreTrainedModel:
        """The model with all its weights."""
        return self.model if self.stream is None else self.source.torch_model(torch.float32)

    def count(self, text: Sequence[Encoded]) -> dict[str, InputCounts]:
        """The inputs of all quantized linears; see `count_inputs`."""
        stream = self.stream
        run = run_whole(self.model) if stream is None else (lambda texts: stream.run(texts, head=False))
        return count_inputs(self.model, list(self.source.weights), text, run)

    def score(self, text: Sequence[Encoded]) -> Score:
        """How it predicts text, with activations quantized as in training; those of weights in NVFP4 are not."""
        run = run_whole(self.model) if self.stream is None else self.stream.run
        if self.source.packed:
            return score(text, run)
        with dynamic_inputs(self.model, list(self.source.weights)):
            return score(text, run)
