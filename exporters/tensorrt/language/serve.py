"""The written graph in ONNX Runtime: whole sequences at once, or token by token with its cache."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporters.graph.runtime import open_session, run
from exporters.tensorrt.language.calibrate import Score, score_session
from exporters.tensorrt.language.graph import drop_quantizers
from exporters.tensorrt.language.trace import LOGITS, CacheShape, cache_names, present_names
from exporters.tensorrt.options import Base
from fp8pipe.artifact import Comparison, Gate
from fp8pipe.models.language.text import Encoded

# How much worse than the artifact's own model a served graph may predict held-out text.
PERPLEXITY_LIMIT = 0.01
_ERRORS = 2
# Largest difference of a logit decoded with the cache, over the largest logit.
CACHE_LIMIT = 1 / 30
# Sequences, and tokens of each, that are decoded one by one.
_DECODED, _TOKENS = 2, 24
_PROMPT = 4


class DecoderSession:
    """One graph, loaded; no settings but those of `open_session`.

    Args:
        graph: the file.
        cache: shape of its cache; none where it has none.
        base: type of the cache.
    """

    def __init__(self, graph: Path, cache: CacheShape | None, base: Base) -> None:
        self.session = open_session(graph)
        self.cache = cache
        self.dtype = np.float16 if base is Base.FP16 else np.float32

    def logits(self, ids: Tensor) -> Any:
        """Float32 logits `(batch, tokens, vocabulary)` of whole sequences `(batch, tokens)`."""
        return self._run(ids, self._empty(len(ids)), 0)[LOGITS]

    def decode(self, ids: Tensor, prompt: int) -> Any:
        """The same, the first `prompt` tokens at once and the others one by one, each reading the cache."""
        past, found = self._empty(len(ids)), []
        for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
            outputs = self._run(ids[:, start:end], past, start)
            found.append(outputs[LOGITS])
            layers = self.cache[0] if self.cache else 0
            past = {a: outputs[b] for a, b in zip(cache_names(layers), present_names(layers), strict=True)}
        return np.concatenate(found, 1)

    def _empty(self, batch: int) -> dict[str, Any]:
        if self.cache is None:
            return {}
        layers, heads, size = self.cache
        return {name: np.zeros((batch, heads, 0, size), self.dtype) for name in cache_names(layers)}

    def _run(self, ids: Tensor, past: dict[str, Any], start: int) -> dict[str, Any]:
        batch, count = ids.shape
        positions = np.arange(start, start + count, dtype=np.int64)[None].repeat(batch, 0)
        mask = np.ones((batch, start + count), np.int64)
        return run(self.session, {"input_ids": ids.numpy(), "attention_mask": mask, "position_ids": positions, **past})


def perplexity_gate(session: DecoderSession, text: list[Encoded], own: Score, *, required: bool) -> tuple[Gate, Score]:
    """Hold the graph to the artifact's own model on held-out answers.

    Quantizing is chaotic: two correct engines differ by some percent in a logit, and by one or two in a perplexity on
    little text. So what counts is the part of a worsening that is beyond two standard errors, taken token by token.

    `own` is the score of the artifact's model with dynamic scales; without `required` the gate is a figure.
    """
    found = score_session(session.logits, text)
    error = found.error_against(own)
    worse = math.exp(found.nats - own.nats - _ERRORS * error) - 1
    limit = PERPLEXITY_LIMIT if required else max(PERPLEXITY_LIMIT, worse)
    shown = f"{found.perplexity:.4f} against {own.perplexity:.4f} with dynamic scales, standard error {error:.2%}"
    gate = Gate(
        name="perplexity above the artifact's", value=worse, comparison=Comparison.AT_MOST, threshold=limit,
        detail=f"{shown}, {own.tokens} held-out answer tokens",
    )  # fmt: skip
    return gate, found


def unrounded_session(graph: Path, cache: CacheShape, base: Base) -> DecoderSession:
    """The written graph with its activation quantizers taken out, for `cache_gates`."""
    import onnx_ir as ir

    model = ir.load(graph)
    drop_quantizers(model)
    with tempfile.TemporaryDirectory(prefix="fp8pipe-graph-") as folder:
        path = Path(folder) / graph.name
        ir.save(model, path, external_data=f"{graph.name}.data")
        return DecoderSession(path, cache, base)


def cache_gates(session: DecoderSession, text: list[Encoded]) -> list[Gate]:
    """Decode token by token with the cache, and compare with the same sequences at once.

    Sums of one row and of many are made in different orders. Through the quantizers of a deep model such a last bit
    grows to percents of the logits, whatever the cache does; static scales round each number by itself, so a cache
    that is right without them is right with them. Hence the session to give is `unrounded_session`. What remains is the
    rounding of the base type; a thirtieth of the largest logit is far above it, and far below what a position, a mask
    or a layer's cache in the wrong place does.
    """
    worst, agreeing, tokens = 0.0, 0, 0
    for example in text[:_DECODED]:
        ids = torch.tensor([example.input_ids[:_TOKENS]])
        whole, steps = session.logits(ids), session.decode(ids, min(_PROMPT, ids.shape[1]))
        worst = max(worst, float(np.abs(whole - steps).max() / np.abs(whole).max()))
        agreeing += int((whole.argmax(-1) == steps.argmax(-1)).sum())
        tokens += ids.shape[1]
    same = f"{agreeing} of {tokens} tokens have the same best successor"
    detail = f"over the largest logit, activations not quantized; {same}"
    return [
        Gate(
            name="logits of the cache against none", value=worst, comparison=Comparison.AT_MOST, threshold=CACHE_LIMIT,
            detail=detail,
        )
    ]  # fmt: skip
