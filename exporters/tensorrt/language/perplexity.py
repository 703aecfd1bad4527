"""How well a model predicts held-out answers: in torch with the scales it was trained for, and in ONNX Runtime.

The artifact is served with one dynamic scale a token. Static scales are another function, so no comparison of codes can
prove that they serve; a perplexity on real text can.
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

from fp8pipe.grids import AMAX_FLOOR, E4M3
from fp8pipe.text import IGNORED, Encoded

__all__ = ["Score", "dynamic_inputs", "score_session", "score_torch", "static_inputs"]


@dataclass(frozen=True, slots=True)
class Score:
    """Mean negative log-likelihood.

    Attributes:
        nats: of an answer token.
        tokens: answer tokens.
    """

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)


def score_torch(model: nn.Module, text: Sequence[Encoded]) -> Score:
    """Score a model of transformers, one sequence at a time."""
    with torch.no_grad():
        return _score(text, lambda ids: model(input_ids=ids, use_cache=False).logits)


def score_session(logits: Callable[[Tensor], Any], text: Sequence[Encoded]) -> Score:
    """Score anything that gives `(1, tokens, vocabulary)` logits (numpy) for `(1, tokens)` ids."""
    return _score(text, lambda ids: torch.from_numpy(np.asarray(logits(ids), np.float32)))


def _score(text: Sequence[Encoded], logits: Callable[[Tensor], Tensor]) -> Score:
    total, count = 0.0, 0
    for example in text:
        labels = torch.tensor(example.labels)[1:]
        keep = labels != IGNORED
        found = logits(torch.tensor([example.input_ids]))[0, :-1][keep].float()
        loss = nn.functional.cross_entropy(found, labels[keep], reduction="sum")
        total, count = total + float(loss), count + int(keep.sum())
    return Score(total / max(1, count), count)


@contextmanager
def dynamic_inputs(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """While active, the inputs of `layers` are rounded to E4M3 with one scale a token, `amax / 448`, as engines do."""

    def rounded(x: Tensor) -> Tensor:
        values = x.float()
        scale = (values.abs().amax(-1, keepdim=True).double().clamp(min=AMAX_FLOOR) / E4M3.max).float()
        return (E4M3.cast(values / scale).float() * scale).to(x.dtype)

    with _replaced(model, {name: rounded for name in layers}):
        yield


@contextmanager
def static_inputs(model: nn.Module, scales: Mapping[str, float]) -> Iterator[None]:
    """While active, the inputs of the named layers are rounded to E4M3 with a fixed scale each."""

    def rounding(scale: float) -> Callable[[Tensor], Tensor]:
        return lambda x: (E4M3.cast(x.float() / scale).float() * scale).to(x.dtype)

    with _replaced(model, {name: rounding(scale) for name, scale in scales.items()}):
        yield


@contextmanager
def _replaced(model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    def hook(change: Callable[[Tensor], Tensor]) -> Any:
        return lambda module, args: (change(args[0]), *args[1:])

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(change)) for n, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
