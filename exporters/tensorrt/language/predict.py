"""Predicts held-out text with a written graph in ONNX Runtime, as whole sequences or token by token with its cache."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.graph.runtime import open_session, run
from exporters.tensorrt.half import dequantize_graph
from exporters.tensorrt.language.calibrate import Score, score
from exporters.tensorrt.language.chain import Chain, Step, in_steps
from exporters.tensorrt.language.graph import LOGITS, cache_names
from exporters.tensorrt.language.passes import drop_quantizers
from exporters.tensorrt.language.target import CacheFacts
from exporters.tensorrt.target import Base
from fp8pipe.artifact import Gate, at_most
from fp8pipe.models.language.text import Encoded

# Largest allowed relative increase of the perplexity on held-out text over that of the artifact's own model.
PERPLEXITY_LIMIT = 0.01
_ERRORS = 2  # number of standard errors by which the increase is reduced before it is compared with the limit
# Largest allowed difference of a logit with and without the cache, relative to the largest logit.
CACHE_LIMIT = 1 / 30
_DECODED, _TOKENS = 2, 24  # number of sequences to decode with the cache, and of tokens in each
PROMPT = 4  # number of tokens processed at once at the beginning of a sequence


class DecoderSession:
    """A decoder graph loaded in ONNX Runtime, with the default settings of `open_session`.

    Args:
        graph: the ONNX file.
        cache: the shape of its key/value cache; None for a graph without one.
        base: the dtype of the cache.
    """

    def __init__(self, graph: Path, cache: CacheFacts | None, base: Base) -> None:
        self.session = open_session(graph)
        self.cache = cache
        self.dtype = np.float16 if base is Base.FP16 else np.float32

    def logits(self, ids: Tensor) -> Any:
        """Float32 logits `(batch, tokens, vocabulary)` for whole sequences of token ids `(batch, tokens)`."""
        return self._run(ids, self._empty(len(ids)), 0)[LOGITS]

    def run(self, texts: Sequence[Tensor]) -> Iterator[Tensor]:
        """`logits` of several ids, as tensors."""
        for ids in texts:
            yield torch.from_numpy(np.asarray(self.logits(ids), np.float32))

    def decode(self, ids: Tensor, prompt: int) -> Any:
        """The same logits as `logits`, computed with the cache: the first `prompt` tokens at once, then one by one."""
        past, found = self._empty(len(ids)), []
        for step in in_steps(ids, prompt):
            outputs = self._run(step.ids, past, step.start)
            found.append(outputs[LOGITS])
            layers = self.cache.layers if self.cache else 0
            past = {a: outputs[b] for a, b in zip(cache_names(layers), cache_names(layers, "present"), strict=True)}
        return np.concatenate(found, 1)

    def _empty(self, batch: int) -> dict[str, Any]:
        if self.cache is None:
            return {}
        shape = batch, self.cache.heads, 0, self.cache.size
        return {name: np.zeros(shape, self.dtype) for name in cache_names(self.cache.layers)}

    def _run(self, ids: Tensor, past: dict[str, Any], start: int) -> dict[str, Any]:
        return run(self.session, {**Step(ids, start).inputs, **past})


def perplexity_gate(
    session: DecoderSession | Chain, text: Sequence[Encoded], own: Score, *, required: bool
) -> tuple[Gate, Score]:
    """Compare the graph's perplexity on held-out answers with that of the artifact's own model.

    Rounding amplifies tiny differences: two correct engines differ by a few percent in a logit, and by one or two
    percent in perplexity on a short text. So an increase counts only as far as it exceeds two standard errors, computed
    from per-token differences.

    Args:
        session: the graph.
        text: held-out text.
        own: the score of the artifact's model, with inputs quantized as in training, on the same text.
        required: whether the gate can fail; otherwise its limit is raised so that it always passes.

    Returns:
        The gate, and the score of the graph.
    """
    found = score(text, session.run)
    error = found.error_against(own)
    worse = math.exp(found.nats - own.nats - _ERRORS * error) - 1
    limit = PERPLEXITY_LIMIT if required else max(PERPLEXITY_LIMIT, worse)
    shown = f"{found.perplexity:.4f} against {own.perplexity:.4f} of its own model, standard error {error:.2%}"
    detail = f"{shown}, {own.tokens} held-out answer tokens"
    return at_most("perplexity above the artifact's", worse, limit, detail), found


def decoder_session(graph: Path, cache: CacheFacts | None, base: Base) -> DecoderSession:
    """Load a written graph; weights in NVFP4, for which ONNX Runtime has no kernels, are dequantized before."""
    blocks = _holds_blocks(ir.load(graph))
    return unrounded_session(graph, cache, base) if blocks else DecoderSession(graph, cache, base)


def _holds_blocks(model: ir.Model) -> bool:
    return any(value.dtype == ir.DataType.FLOAT4E2M1 for value in model.graph.initializers.values())


def unrounded_session(graph: Path, cache: CacheFacts | None, base: Base) -> DecoderSession:
    """Load a written graph without its activation quantizers, and with weights in NVFP4 dequantized."""
    model = ir.load(graph)
    drop_quantizers(model)
    if _holds_blocks(model):
        dequantize_graph(model)
    with tempfile.TemporaryDirectory(prefix="fp8pipe-graph-") as folder:
        path = Path(folder) / graph.name
        ir.save(model, path, external_data=f"{graph.name}.data")
        return DecoderSession(path, cache, base)


def cache_gates(session: DecoderSession, text: list[Encoded]) -> list[Gate]:
    """Compare logits from decoding token by token with the cache to logits of the same sequences run at once.

    Sums over one row and over many rows are computed in different orders, so results differ in the last bit. The
    quantizers of a deep model amplify such a difference to a few percent of the logits even if the cache is correct, so
    the comparison is made without quantizers. This is sufficient: static scales quantize each number independently, so
    a cache that is correct without quantizers is correct with them. The remaining difference is the rounding of the
    base dtype. The limit, a thirtieth of the largest logit, is far above that, and far below the effect of a wrong
    position, mask or cache entry.

    Args:
        session: the graph without activation quantizers (`unrounded_session`).
        text: held-out text, of which the beginnings of a few sequences are used.
    """
    pairs = []
    for ids in decoded(text):
        pairs.append((session.logits(ids), session.decode(ids, PROMPT)))
    return [decode_gate(pairs)]


def decoded(text: Sequence[Encoded]) -> list[Tensor]:
    """The sequences that are decoded token by token, `(1, tokens)` each."""
    return [torch.tensor([example.input_ids[:_TOKENS]]) for example in text[:_DECODED]]


def decode_gate(pairs: Sequence[tuple[Any, Any]]) -> Gate:
    """The gate on logits of whole sequences, and of the same sequences decoded token by token."""
    worst, agreeing, tokens = 0.0, 0, 0
    for whole, steps in pairs:
        worst = float(np.maximum(worst, np.abs(whole - steps).max() / np.abs(whole).max()))  # NaN stays NaN
        agreeing += int((whole.argmax(-1) == steps.argmax(-1)).sum())
        tokens += whole.shape[1]
    detail = "largest difference relative to the largest logit, activations not quantized; "
    detail += f"{agreeing} of {tokens} tokens have the same most likely successor"
    return at_most("logits of the cache against none", worst, CACHE_LIMIT, detail)
