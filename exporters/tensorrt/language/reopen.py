"""Reads the written graph back and checks it: all numbers, every layer, and the predictions of the whole model.

Numbers are compared with the artifact, layers with exact sums. In ONNX Runtime the graph predicts held-out text, as
whole sequences or token by token with its cache.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters.graph.layers import ExportedLayer
from exporters.graph.parity import LayerParity, compare_layers, input_name
from exporters.graph.runtime import open_session, run
from exporters.tensorrt.language.calibrate import Score, pre_hooks, score
from exporters.tensorrt.language.graph import LOGITS, cache_names, drop_quantizers
from exporters.tensorrt.language.source import LanguageModel
from exporters.tensorrt.language.target import CacheFacts, InputScale
from exporters.tensorrt.parity import typed_gates
from exporters.tensorrt.target import Base
from fp8pipe.artifact import Gate, at_most, none_of
from fp8pipe.models.language.text import Encoded
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import ActivationQuantizer

_FLOATS: Final = ("FLOAT", "FLOAT16")
# Number of layers whose codes are compared in one session: the extracted part must fit into one protobuf message.
_AT_ONCE: Final = 32


def number_gates(
    layers: Sequence[ExportedLayer], graph: ir.Model, model: LanguageModel, scales: Mapping[str, InputScale]
) -> list[Gate]:
    """Compare a graph that was read from its file with the artifact, and its scales with the calibrated ones.

    The value of each gate is the number of differences; 0 passes.
    """
    by_name = {layer.name: layer for layer in layers}
    codes = weight_scales = inputs = 0
    for name, weight in model.weights.items():
        layer = by_name.get(name)
        stored = None if layer is None else layer.operands[1].weight
        if layer is None or stored is None or stored.codes.shape != weight.codes.shape:
            codes, weight_scales, inputs = codes + weight.codes.numel(), weight_scales + 1, inputs + 1
            continue
        codes += int((stored.codes.contiguous().view(torch.uint8) != weight.codes.view(torch.uint8)).sum())
        weight_scales += int(not torch.equal(stored.scale.float(), weight.scale))
        quantizer = layer.operands[0].quantizer
        plain = quantizer if isinstance(quantizer, ActivationQuantizer) else None
        wrong = plain is None or plain.kind is not Kind.E4M3 or plain.scale != scales[name].scale
        inputs += int(wrong or layer.operands[0].source is None)
    different, strays, compared = _float_tensors(graph, model)
    total = sum(weight.codes.numel() for weight in model.weights.values())
    return [
        none_of("weight codes differing", codes, f"of {total} in {len(model.weights)} layers"),
        none_of("weight scales differing", weight_scales, f"of {len(model.weights)} layers"),
        none_of("activation scales differing", inputs, f"of {len(model.weights)} layers, against the calibration"),
        none_of("float tensors differing", len(different), f"of {compared}{_first(different)}"),
        none_of("float matrices that are not the artifact's", len(strays), _first(strays).removeprefix("; ")),
    ]


def layer_gates(
    layers: Sequence[ExportedLayer], graph: ir.Model, reference: nn.Module, example: Encoded
) -> tuple[list[Gate], list[LayerParity]]:
    """Run every layer in ONNX Runtime on the input that it has in torch, and compare the output with exact sums.

    Nodes, codes and scales are those of the file; sums are in float64 (`exporters/tensorrt/parity.py`).

    `graph` is changed in place: its stored tensors become float32, like those of `reference`.
    """
    _widen(graph)
    inputs = _inputs(layers, reference, example)
    report: list[LayerParity] = []
    for start in range(0, len(layers), _AT_ONCE):
        part = layers[start : start + _AT_ONCE]
        names = dict.fromkeys(input_name(x.operands[0].source) for x in part if x.operands[0].source is not None)
        report += compare_layers(graph, part, {name: inputs[name] for name in names}, optimize=False)
    return typed_gates(report), report


def _inputs(layers: Sequence[ExportedLayer], reference: nn.Module, example: Encoded) -> dict[str, Any]:
    """The float inputs of all layers, by their names in the extracted graph."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x.detach()

    with pre_hooks(reference, {x.name: partial(keep, x.name) for x in layers}), torch.no_grad():
        reference(input_ids=torch.tensor([example.input_ids]), use_cache=False)
    sources = ((layer.name, layer.operands[0].source) for layer in layers)
    return {input_name(source): seen[name].contiguous().numpy() for name, source in sources if source is not None}


def _widen(graph: ir.Model) -> None:
    """Convert stored FP16 tensors to float32; the values do not change."""
    for value in graph.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=str(value.name))
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _float_tensors(graph: ir.Model, model: LanguageModel) -> tuple[list[str], list[str], int]:
    """Tensors of the artifact stored with different values; float matrices that the artifact lacks; number compared."""
    stored = {
        name: np.array(value.const_value.numpy())
        for name, value in graph.graph.initializers.items()
        if value.const_value is not None and value.dtype is not None and value.dtype.name in _FLOATS
    }
    known_as, aliases = model.plan.names, model.plan.structure.tied
    different, compared, known = [], 0, set()
    for name, tensor in model.floats.items():
        names = [known_as[name].name]
        names += [tied for tied, original in aliases.items() if original in names]  # the tracer may use either name
        found = next((n for n in names if n in stored), None)
        wanted = tensor.float().numpy()
        if found is not None:
            compared += 1
            known.add(found)
            different += [] if _rounded_once(stored[found], wanted) else [name]
        elif wanted.ndim > 1:  # a head is stored transposed, under a name chosen by the tracer
            compared += 1
            match = [n for n, array in stored.items() if array.ndim > 1 and _rounded_once(array, wanted.T)]
            known.update(match)
            different += [] if match else [name]
    return different, [n for n, array in stored.items() if array.ndim > 1 and n not in known], compared


def _rounded_once(found: Any, wanted: Any) -> bool:
    return found.shape == wanted.shape and np.array_equal(found, wanted.astype(found.dtype))


def _first(names: Sequence[str]) -> str:
    return f"; the first: {names[0]}" if names else ""


# How much worse an exported graph may predict held-out text than the artifact's own model.
PERPLEXITY_LIMIT = 0.01
_ERRORS = 2
# Largest difference of a logit decoded with the cache, relative to the largest logit.
CACHE_LIMIT = 1 / 30
# Number of sequences, and of tokens in each, that are decoded one by one.
_DECODED, _TOKENS = 2, 24
_PROMPT = 4


class DecoderSession:
    """A loaded graph, with the default settings of `open_session`.

    `cache` is the shape of its cache, None if it has none, and `base` the dtype of the cache.
    """

    def __init__(self, graph: Path, cache: CacheFacts | None, base: Base) -> None:
        self.session = open_session(graph)
        self.cache = cache
        self.dtype = np.float16 if base is Base.FP16 else np.float32

    def logits(self, ids: Tensor) -> Any:
        """Float32 logits `(batch, tokens, vocabulary)` for whole sequences `(batch, tokens)`."""
        return self._run(ids, self._empty(len(ids)), 0)[LOGITS]

    def decode(self, ids: Tensor, prompt: int) -> Any:
        """The same logits, with the first `prompt` tokens at once and the others one by one, each reading the cache."""
        past, found = self._empty(len(ids)), []
        for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
            outputs = self._run(ids[:, start:end], past, start)
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
        batch, count = ids.shape
        positions = np.arange(start, start + count, dtype=np.int64)[None].repeat(batch, 0)
        mask = np.ones((batch, start + count), np.int64)
        return run(self.session, {"input_ids": ids.numpy(), "attention_mask": mask, "position_ids": positions, **past})


def perplexity_gate(session: DecoderSession, text: list[Encoded], own: Score, *, required: bool) -> tuple[Gate, Score]:
    """Compare the graph's perplexity on held-out answers with that of the artifact's own model.

    Quantization is chaotic: two correct engines differ by a few percent in a logit, and by one or two percent in
    perplexity on a short text. So only the part of an increase beyond two standard errors of the per-token differences
    counts.

    `own` is the score of the artifact's model with dynamic scales; without `required` the gate is informational.
    """
    found = score(text, lambda ids: torch.from_numpy(np.asarray(session.logits(ids), np.float32)))
    error = found.error_against(own)
    worse = math.exp(found.nats - own.nats - _ERRORS * error) - 1
    limit = PERPLEXITY_LIMIT if required else max(PERPLEXITY_LIMIT, worse)
    shown = f"{found.perplexity:.4f} against {own.perplexity:.4f} with dynamic scales, standard error {error:.2%}"
    detail = f"{shown}, {own.tokens} held-out answer tokens"
    return at_most("perplexity above the artifact's", worse, limit, detail), found


def unrounded_session(graph: Path, cache: CacheFacts, base: Base) -> DecoderSession:
    """The written graph without its activation quantizers, for `cache_gates`."""
    model = ir.load(graph)
    drop_quantizers(model)
    with tempfile.TemporaryDirectory(prefix="fp8pipe-graph-") as folder:
        path = Path(folder) / graph.name
        ir.save(model, path, external_data=f"{graph.name}.data")
        return DecoderSession(path, cache, base)


def cache_gates(session: DecoderSession, text: list[Encoded]) -> list[Gate]:
    """Decode token by token with the cache, and compare with the same sequences run at once.

    Sums over one row and over many rows are computed in different orders. The quantizers of a deep model amplify such a
    difference in the last bit to percents of the logits, even if the cache is correct. Static scales quantize each
    number independently, so a cache that is correct without quantizers is correct with them. Hence `unrounded_session`
    is the session to pass. What remains is the rounding of the base type; a thirtieth of the largest logit is far above
    it, and far below the effect of a wrong position, mask or cache entry.
    """
    worst, agreeing, tokens = 0.0, 0, 0
    for example in text[:_DECODED]:
        ids = torch.tensor([example.input_ids[:_TOKENS]])
        whole, steps = session.logits(ids), session.decode(ids, min(_PROMPT, ids.shape[1]))
        worst = float(np.maximum(worst, np.abs(whole - steps).max() / np.abs(whole).max()))  # NaN stays NaN
        agreeing += int((whole.argmax(-1) == steps.argmax(-1)).sum())
        tokens += ids.shape[1]
    detail = "largest difference relative to the largest logit, activations not quantized; "
    detail += f"{agreeing} of {tokens} tokens have the same most likely successor"
    return [at_most("logits of the cache against none", worst, CACHE_LIMIT, detail)]
