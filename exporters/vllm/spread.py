"""Refuses to divide a model over a number of devices that does not fit its layers, before vLLM starts.

vLLM refuses the same itself, but only once it has started its processes; those of several nodes must all be there
first, and one that fails leaves the others waiting. Sizes are read from the checkpoint's config.json; what it does not
state is left to vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from exporters.vllm.form import ServingForm
from fp8pipe.core.errors import ConfigurationError

__all__ = ["require_fit"]

_HEADS: Final = ("num_attention_heads", "n_head")
_GROUPS: Final = ("num_key_value_heads", "num_kv_heads")
_LAYERS: Final = ("num_hidden_layers", "n_layer")
_INNER: Final = ("intermediate_size", "moe_intermediate_size", "n_inner")


def require_fit(model: Path, form: ServingForm) -> None:
    """Check that the layers of the checkpoint in `model` can be divided as `form` asks.

    Raises:
        ConfigurationError: they cannot; all reasons are given, with the sizes.
    """
    if form.devices == 1:
        return
    config = json.loads((model / "config.json").read_bytes())
    found = [*_misfits(config, form.tensor_parallel_size or 1, form.pipeline_parallel_size or 1)]
    if found:
        raise ConfigurationError(
            f"{model} cannot be divided over {form.devices} devices", why="; ".join(found),
            fix="give a --tensor-parallel-size that divides these sizes, and at most one pipeline stage per layer",
        )  # fmt: skip


def _misfits(config: Mapping[str, Any], parts: int, stages: int) -> Iterator[str]:
    text = _text(config)
    heads, groups, layers = (_size(text, names) for names in (_HEADS, _GROUPS, _LAYERS))
    if layers is not None and layers < stages:
        yield f"the model has {layers} layers, fewer than {stages} pipeline stages"
    if heads is not None and heads % parts:
        yield f"{heads} attention heads cannot be divided by {parts}"
    # With fewer heads than devices, each head of K and V is repeated on the same number of devices.
    if groups and groups % parts and parts % groups:
        yield f"{groups} heads of K and V can neither be divided by {parts} nor be repeated on {parts} devices alike"
    inner = {name: text[name] for name in _INNER if isinstance(text.get(name), int)}
    for name, size in inner.items():
        if size % parts:
            yield f"{name} is {size}, which cannot be divided by {parts}"
    yield from _cut_blocks(config, inner, heads, groups, parts)


def _cut_blocks(
    config: Mapping[str, Any], inner: Mapping[str, int], heads: int | None, groups: int | None, parts: int
) -> Iterator[str]:
    # Sizes of which a device would get a part of a block, so that its scale would belong to two devices.
    text = _text(config)
    block, group = _quantized(config, "block_structure"), _quantized(config, "group_size")
    step = block or group
    if parts == 1 or step is None:
        return
    width = text.get("head_dim") or (text["hidden_size"] // heads if heads and "hidden_size" in text else None)
    sizes = dict(inner)
    if heads and width:
        sizes["the width of Q"] = heads * width
        if block:  # groups are along inputs only, and K and V are divided along their outputs
            sizes["the width of K and V"] = max(groups or heads, parts) * width
    for name, size in sizes.items():
        # The export leaves a layer whose inputs are no whole groups as it is, so it may be divided anywhere.
        whole = size % group == 0 if group else True
        if whole and size % parts == 0 and size // parts % step:
            what = f"blocks of {block}" if block else f"groups of {group}"
            yield f"{name} is {size}, of which each device has {size // parts}: not whole {what}"


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config["text_config"] if isinstance(config.get("text_config"), dict) else config


def _size(text: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((text[name] for name in names if isinstance(text.get(name), int)), None)


def _quantized(config: Mapping[str, Any], key: str) -> int | None:
    """Size of the blocks (`block_structure`) or of the groups of inputs (`group_size`) that have a scale each, or None.

    There are none where scales are per row or per tensor. Blocks are square.
    """
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    for group in groups.values():
        if found := (group.get("weights") or {}).get(key):
            return int(found[0] if isinstance(found, list) else found)
    return None
