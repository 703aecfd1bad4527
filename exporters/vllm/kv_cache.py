"""The scales of an FP8 key/value cache in a checkpoint for vLLM.

They follow from the ranges that `finetune` measured on the training text: `scale = amax / 448`, one for the keys and
one for the values of a layer. A checkpoint holds them as `LAYER.k_scale` and `LAYER.v_scale`, where LAYER is the
attention module, or in ModelOpt's layout as `LAYER.k_proj.k_scale` and `LAYER.v_proj.v_scale`. vLLM uses 1 for a scale
that is missing and says nothing, so every scale is a tensor of the plan, is compared after writing, and is read back
from the engine.

What the cache costs was measured with the ranges: the loss on held-out text with keys and values rounded, against the
loss without. An export is refused if that text shows a change of more than half a percent, which is less than the
standard deviation between seeds of the training (0.8 %). A thousand tokens tell such a change to about a quarter of a
percent, so two standard errors are granted: otherwise chance would refuse models that lose nothing.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping
from typing import Final

import torch

from exporters.vllm.target import KvScale
from fp8pipe.artifact import Gate
from fp8pipe.artifact.gate import at_most, none_of
from fp8pipe.artifact.kinds import KvCacheFacts
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.tensors import TensorEntry, read_tensor
from fp8pipe.models.language.kv_cache import cache_scale

__all__ = ["COST_LIMIT", "check_projections", "cost_gate", "is_kv_scale", "kv_scales", "scale_tensors", "scales_gate"]

COST_LIMIT: Final = 0.005
_SUFFIXES: Final = {"k": ".k_scale", "v": ".v_scale"}


def is_kv_scale(name: str) -> bool:
    """Whether a tensor of a checkpoint is a scale of the key/value cache."""
    return name.endswith(tuple(_SUFFIXES.values()))


def kv_scales(facts: KvCacheFacts | None, source: str) -> dict[str, KvScale]:
    """The scales by attention layer.

    Args:
        facts: what `finetune` measured.
        source: what the error message calls the model.

    Raises:
        ConfigurationError: nothing was measured.
    """
    if facts is None:
        raise ConfigurationError(
            f"{source} has no ranges of keys and values, so it cannot be exported with --kv-cache fp8",
            why="scales of an FP8 key/value cache follow from text, which `fp8pipe finetune` measures in the end; this "
            "is a plain model, was tuned by an earlier version, or keeps no such cache (see the manifest's warnings)",
            fix="tune the model with this version, or export without --kv-cache",
        )
    return {
        name: KvScale(layer=seen.layer, k=cache_scale(seen.k), v=cache_scale(seen.v))
        for name, seen in facts.amax.items()
    }


def scale_tensors(scales: Mapping[str, KvScale], *, beside_projections: bool = False) -> dict[str, float]:
    """The checkpoint's tensors, fp32, by name.

    Args:
        scales: scales by attention layer.
        beside_projections: whether they are named after the projections of keys and values, as in ModelOpt's layout.
    """
    place = ".{which}_proj" if beside_projections else ""
    return {
        f"{layer}{place.format(which=which)}{suffix}": getattr(s, which)
        for layer, s in scales.items() for which, suffix in _SUFFIXES.items()
    }  # fmt: skip


def check_projections(scales: Mapping[str, KvScale], tensors: Collection[str], source: str) -> None:
    """Refuse layers without the projections that ModelOpt's layout names the scales of the key/value cache after.

    Args:
        scales: scales by attention layer.
        tensors: names of the source's tensors.
        source: what the error message calls the model.

    Raises:
        ConfigurationError: there are such layers.
    """
    for layer in scales:
        for which in _SUFFIXES:
            if f"{layer}.{which}_proj.weight" not in tensors:
                raise ConfigurationError(
                    f"{source} cannot be exported with an FP8 key/value cache in ModelOpt's layout",
                    why=f"{layer} has no {which}_proj, beside whose weight readers look for the scale",
                    fix="export without --kv-cache, or with --target vllm in the layout of compressed-tensors",
                )


def scales_gate(expected: Mapping[str, float], written: Mapping[str, TensorEntry], shape: tuple[int, ...]) -> Gate:
    """Compare the stored scales, of this shape, with the expected ones, bit for bit; names those that differ."""
    wrong = []
    for name, scale in expected.items():
        entry = written.get(name)
        stored = None if entry is None or entry.dtype != "F32" or entry.shape != shape else read_tensor(entry)
        if stored is None or stored.view(torch.uint8).numpy().tobytes() != struct.pack("<f", scale):
            wrong.append(name if stored is None else f"{name} ({float(stored):g}, expected {scale:g})")
    detail = f"{len(expected)} scale(s) of the key/value cache, bit for bit"
    named = f"; differing: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}" if wrong else ""
    return none_of("kv-cache-scales", len(wrong), detail + named)


def cost_gate(facts: KvCacheFacts) -> Gate:
    """A gate on what rounding keys and values to FP8 does to the loss on held-out text, as far as that text tells."""
    change, error = abs(facts.fp8_loss - facts.loss), facts.error
    sure = max(0.0, change - 2 * (error or 0.0)) if math.isfinite(change) else math.nan
    known = f" +- {error / facts.loss:.2%}" if error is not None and facts.loss > 0 else ""
    detail = (
        f"of the held-out loss, less two standard errors; {facts.loss:.4f} nats per answer token, {facts.fp8_loss:.4f} "
        f"with keys and values in FP8 ({change / max(facts.loss, 1e-9):.2%}{known}), {facts.heldout_tokens} tokens"
    )
    return at_most("kv-cache-loss", sure / max(facts.loss, 1e-9), COST_LIMIT, detail)
