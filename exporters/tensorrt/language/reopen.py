"""Read the written graph back and check its stored numbers, the output of each layer, and the whole model.

Stored numbers are compared with those of the artifact, and the outputs of layers with float64 sums. The whole graph is
run in ONNX Runtime on held-out text, both on whole sequences and token by token with its cache.
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
# Number of layers that are compared in one session, whose part of the graph must fit into one protobuf message.
_AT_ONCE: Final = 32


def number_gates(
    layers: Sequence[ExportedLayer], graph: ir.Model, model: LanguageModel, scales: Mapping[str, InputScale]
) -> list[Gate]:
    """Compare the stored tensors of a graph with the artifact, and its activation scales with the calibrated ones.

    Args:
        layers: the quantized layers found in the graph.
        graph: the graph, as read from its file.
        model: the artifact.
        scales: calibrated activation scales by layer.

    Returns:
        Gates whose value is a number of differences; 0 passes.
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
    """Run every quantized layer in ONNX Runtime on its input in torch, and compare the outputs with float64 sums.

    Args:
        layers: the quantized layers found in the graph.
        graph: the graph, as read from its file. It is changed in place: stored FP16 tensors become float32, like those
            of `reference`.
        reference: the torch model, from which the inputs of the layers are taken.
        example: the text to run.

    Returns:
        The gates (see `exporters/tensorrt/parity.py`), and the comparison of each layer.
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
    """The float inputs of all layers in torch, by the names of these inputs in the extracted part of the graph."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x.detach()

    with pre_hooks(reference, {x.name: partial(keep, x.name) for x in layers}), torch.no_grad():
        reference(input_ids=torch.tensor([example.input_ids]), use_cache=False)
    sources = ((layer.name, layer.operands[0].source) for layer in layers)
    return {input_name(source): seen[name].contiguous().numpy() for name, source in sources if source is not None}


def _widen(graph: ir.Model) -> None:
    """Convert stored FP16 tensors to float32, in place, without changing their values."""
    for value in graph.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=str(value.name))
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _float_tensors(graph: ir.Model, model: LanguageModel) -> tuple[list[str], list[str], int]:
    """Compare the float tensors of a graph with those of the artifact.

    Returns:
        Names of the artifact's tensors whose values in the graph differ or are missing; names of float matrices in the
        graph that are not in the artifact; the number of compared tensors.
    """
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
        elif wanted.ndim > 1:  # an output head, which is stored transposed, under a name chosen by the tracer
            compared += 1
            match = [n for n, array in stored.items() if array.ndim > 1 and _rounded_once(array, wanted.T)]
            known.update(match)
            different += [] if match else [name]
    return different, [n for n, array in stored.items() if array.ndim > 1 and n not in known], compared


def _rounded_once(found: Any, wanted: Any) -> bool:
    return found.shape == wanted.shape and np.array_equal(found, wanted.astype(found.dtype))


def _first(names: Sequence[str]) -> str:
    return f"; the first: {names[0]}" if names else ""


# Largest allowed relative increase of the perplexity on held-out text over that of the artifact's own model.
PERPLEXITY_LIMIT = 0.01
_ERRORS = 2  # number of standard errors by which the increase is reduced before it is compared with the limit
# Largest allowed difference of a logit with and without the cache, relative to the largest logit.
CACHE_LIMIT = 1 / 30
_DECODED, _TOKENS = 2, 24  # number of sequences to decode with the cache, and of tokens in each
_PROMPT = 4  # number of tokens processed at once at the beginning of a sequence


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

    def decode(self, ids: Tensor, prompt: int) -> Any:
        """The same logits as `logits`, computed with the cache: the first `prompt` tokens at once, then one by one."""
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

    Rounding amplifies tiny differences: two correct engines differ by a few percent in a logit, and by one or two
    percent in perplexity on a short text. So an increase counts only as far as it exceeds two standard errors, computed
    from per-token differences.

    Args:
        session: the graph.
        text: held-out text.
        own: the score of the artifact's model, with dynamic scales, on the same text.
        required: whether the gate can fail; otherwise its limit is raised so that it always passes.

    Returns:
        The gate, and the score of the graph.
    """
    found = score(text, lambda ids: torch.from_numpy(np.asarray(session.logits(ids), np.float32)))
    error = found.error_against(own)
    worse = math.exp(found.nats - own.nats - _ERRORS * error) - 1
    limit = PERPLEXITY_LIMIT if required else max(PERPLEXITY_LIMIT, worse)
    shown = f"{found.perplexity:.4f} against {own.perplexity:.4f} with dynamic scales, standard error {error:.2%}"
    detail = f"{shown}, {own.tokens} held-out answer tokens"
    return at_most("perplexity above the artifact's", worse, limit, detail), found


def unrounded_session(graph: Path, cache: CacheFacts, base: Base) -> DecoderSession:
    """Load a written graph without its activation quantizers, for `cache_gates`."""
    model = ir.load(graph)
    drop_quantizers(model)
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
