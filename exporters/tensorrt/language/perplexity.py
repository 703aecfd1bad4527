"""How well a model predicts held-out answers: in torch with the scales it was trained for, and in ONNX Runtime.

The artifact is served with one dynamic scale per token. Static scales are another function, so no comparison of codes
can prove that they serve; a perplexity on real text can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.tensorrt.language.calibrate import pre_hooks
from fp8pipe.models.language.text import IGNORED, Encoded
from fp8pipe.numerics.grids import E4M3, amax_scale

__all__ = ["BATCH", "Score", "dynamic_inputs", "score_session", "score_torch", "static_inputs"]

# Texts scored together: what a graph dequantizes, it dequantizes once for all of them.
BATCH = 8


@dataclass(frozen=True, slots=True)
class Score:
    """Negative log-likelihoods of answer tokens.

    Attributes:
        losses: `(tokens,)` fp32, nats; two scores of one text have the same order.
    """

    losses: Tensor

    @property
    def tokens(self) -> int:
        """Answer tokens."""
        return self.losses.numel()

    @property
    def nats(self) -> float:
        """Mean loss of a token."""
        return float(self.losses.double().mean())

    @property
    def perplexity(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)

    def error_against(self, other: Score) -> float:
        """Standard error of the difference of both means, nats, token by token."""
        difference = self.losses.double() - other.losses.double()
        return float(difference.std() / math.sqrt(self.tokens)) if self.tokens > 1 else math.inf


def score_torch(model: nn.Module, text: Sequence[Encoded]) -> Score:
    """Score a model of transformers."""
    with torch.no_grad():
        return _score(text, lambda ids: model(input_ids=ids, use_cache=False).logits)


def score_session(logits: Callable[[Tensor], Any], text: Sequence[Encoded]) -> Score:
    """Score anything that gives `(batch, tokens, vocabulary)` logits (numpy) for `(batch, tokens)` ids."""
    return _score(text, lambda ids: torch.from_numpy(np.asarray(logits(ids), np.float32)))


def _score(text: Sequence[Encoded], logits: Callable[[Tensor], Tensor]) -> Score:
    losses = []
    ordered = sorted(text, key=lambda example: len(example.input_ids))
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        longest = len(part[-1].input_ids)
        # What stands behind a text has no influence on it: no token sees a later one.
        ids = torch.tensor([[*x.input_ids, *[0] * (longest - len(x.input_ids))] for x in part])
        labels = torch.tensor([[*x.labels, *[IGNORED] * (longest - len(x.labels))] for x in part])[:, 1:]
        keep = labels != IGNORED
        found = logits(ids)[:, :-1][keep].float()
        losses.append(nn.functional.cross_entropy(found, labels[keep], reduction="none"))
    return Score(torch.cat(losses))


@contextmanager
def dynamic_inputs(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """While active, inputs of `layers` are rounded to E4M3 with one scale per token, `amax / 448`, as engines do."""

    def rounded(x: Tensor) -> Tensor:
        values = x.float()
        scale = amax_scale(values.abs().amax(-1, keepdim=True), E4M3)
        return (E4M3.cast(values / scale).float() * scale).to(x.dtype)

    with pre_hooks(model, {name: rounded for name in layers}):
        yield


@contextmanager
def static_inputs(model: nn.Module, scales: Mapping[str, float]) -> Iterator[None]:
    """While active, the inputs of the named layers are rounded to E4M3 with a fixed scale each."""

    def rounding(scale: float) -> Callable[[Tensor], Tensor]:
        return lambda x: (E4M3.cast(x.float() / scale).float() * scale).to(x.dtype)

    with pre_hooks(model, {name: rounding(scale) for name, scale in scales.items()}):
        yield
