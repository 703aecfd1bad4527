"""Keys and values as they enter the key/value cache: their largest magnitudes, and their rounding to FP8.

An engine with an FP8 key/value cache stores E4M3 codes, with one scale for the keys and one for the values of a layer.
What it rounds is what transformers hands to its cache: keys after the rotary embedding, and values, neither repeated
for the query heads. So a cache that records or rounds what it is given works for every architecture and for every
implementation of the attention.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.numerics.grids import E4M3

__all__ = ["KvRange", "cache_scale", "observe_ranges", "rounding_cache", "why_unsupported"]

_UNSCALED: Final = (1.0, 1.0)  # what vLLM uses for a layer without scales
_Change = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(slots=True)
class KvRange:
    """Largest magnitudes of one layer's keys and values.

    Attributes:
        layer: the layer's index in the cache.
        k, v: amax, exact in fp32.
    """

    layer: int
    k: float = 0.0
    v: float = 0.0


def cache_scale(amax: float) -> float:
    """The scale `amax / 448`, an fp32 number; dequantized = code * scale. 1 if all values seen were 0."""
    return float(torch.tensor(amax / E4M3.max, dtype=torch.float32)) or 1.0


def why_unsupported(settings: Any) -> str:
    """Why vLLM would not cache what transformers caches for this model; empty if it does.

    Args:
        settings: the model's configuration.
    """
    text = settings.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        return "its engines cache a compressed form of keys and values (multi-head latent attention)"
    if getattr(text, "num_kv_shared_layers", None):
        return "some of its layers read the keys and values of other layers"
    return ""


@torch.no_grad()
def observe_ranges(
    model: nn.Module, batches: Iterable[tuple[Mapping[str, Tensor], Sequence[int]]]
) -> dict[str, KvRange]:
    """Run text through a model in evaluation mode and record the range of every layer's keys and values.

    Args:
        model: a causal LM of transformers.
        batches: the model's inputs, `(B, L)`, padded on the right, and the number of tokens of each row.

    Returns:
        By path of the attention module, in the order of the layers.

    Raises:
        ConfigurationError: the model fills no key/value cache, or a value is not finite.
    """
    found: dict[str, KvRange] = {}
    with _running(model) as running:
        for inputs, lengths in batches:

            def record(
                layer: int, keys: Tensor, values: Tensor, lengths: Sequence[int] = lengths
            ) -> tuple[Tensor, Tensor]:
                seen = found.setdefault(running[-1] if running else "", KvRange(layer))
                seen.k, seen.v = _amax(keys, lengths, seen.k), _amax(values, lengths, seen.v)
                return keys, values

            body: Any = getattr(model, "base_model", model)  # the output head adds nothing to the cache
            body(**inputs, **cache_argument(body, _cache(model, record)), use_cache=True)
    if not found or "" in found:
        raise ConfigurationError("the model fills no key/value cache", why="no attention layer stored keys and values")
    broken = next((name for name, seen in found.items() if not math.isfinite(seen.k + seen.v)), None)
    if broken is not None:
        raise ConfigurationError("keys or values are not finite", why=f"the first are those of {broken}")
    return dict(sorted(found.items(), key=lambda item: item[1].layer))


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache as an argument of this model's `forward`: `cache` since transformers 5.24, `past_key_values` before.

    Models whose code comes with the checkpoint keep the older name under any version.
    """
    taken = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in taken else "past_key_values": cache}


def rounding_cache(model: nn.Module, scales: Mapping[int, tuple[float, float]], *, toward_zero: bool = False) -> Any:
    """An empty cache, for one forward pass, that rounds keys and values to E4M3 as an engine's FP8 cache does.

    Args:
        model: the model that will be given the cache, by `cache_argument`.
        scales: of keys and of values, by the layer's index in the cache; other layers have the scale 1.
        toward_zero: round toward zero, as vLLM's kernels for CPUs do, and not to the nearest number, as GPUs do.
    """

    def change(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        k, v = scales.get(layer, _UNSCALED)
        return _rounded(keys, k, toward_zero), _rounded(values, v, toward_zero)

    return _cache(model, change)


def _amax(states: Tensor, lengths: Sequence[int], least: float) -> float:
    """The larger of `least` and the largest magnitude of `(B, heads, L, d)` without padding; NaN if either is."""
    rows = [row[:, :length].abs().max() for row, length in zip(states, lengths, strict=True)]
    return float(torch.stack([*rows, torch.full_like(rows[0], least)]).max())


def _rounded(states: Tensor, scale: float, toward_zero: bool) -> Tensor:
    """Round to E4M3, saturating, and dequantize; keeps shape and dtype."""
    quotients = states.float() / scale
    codes = _truncated(quotients) if toward_zero else E4M3.cast(quotients).float()
    return (codes * scale).to(states.dtype)


def _truncated(quotients: Tensor) -> Tensor:
    """The E4M3 number next to each quotient that is not larger in magnitude, fp32."""
    within = quotients.clamp(-E4M3.max, E4M3.max)
    binade = within.frexp().exponent - 1  # of 1.0 it is 0
    step = torch.exp2((binade.clamp(min=-6) - 3).float())  # E4M3 has three bits after the leading one, from 2^-6 on
    return (within / step).trunc() * step


def _cache(model: Any, change: _Change) -> Any:
    """A cache that stores what `change` makes of a layer's new keys and values, `(B, heads, L, d)`."""
    dynamic: Any = import_transformers().DynamicCache

    class ChangingCache(dynamic):  # type: ignore[misc]
        """Passes keys and values through `change` before they are stored."""

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            changed = change(layer_idx, key_states, value_states)
            return super().update(*changed, layer_idx, *args, **kwargs)

    return ChangingCache(config=model.config)


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules with a layer index that are running, the innermost last."""
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
            handles.append(module.register_forward_hook(lambda *_: _drop(running)))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _drop(running: list[str]) -> None:
    running.pop()
