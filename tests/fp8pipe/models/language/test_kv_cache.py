"""Ranges and rounding of keys and values, against transformers' own cache and against ml_dtypes' numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from tiny_decoders import DECODERS
from torch import nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.kv_cache import (
    cache_argument,
    cache_scale,
    observe_ranges,
    rounding_cache,
    why_unsupported,
)

GRID = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
GRID = np.unique(GRID[np.isfinite(GRID)])


def tiny(family: str, seed: int = 0):
    torch.manual_seed(seed)
    return import_transformers().AutoModelForCausalLM.from_config(DECODERS[family]()).eval()


def stored(model, ids, cache=None):
    """Keys and values of every layer, `(B, heads, L, d)`, from the cache that transformers returns."""
    with torch.no_grad():
        layers = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values.layers
    return [(layer.keys, layer.values) for layer in layers]


@pytest.mark.parametrize(("family", "first"), [("llama", "model.layers.0.self_attn"), ("gpt2", "transformer.h.0.attn")])
def test_ranges_are_those_of_transformers_cache_and_leave_out_padding(family, first):
    model, ids = tiny(family), torch.randint(2, 272, (2, 12))
    lengths = (5, 9)
    ranges = observe_ranges(model, [({"input_ids": ids}, lengths)])
    alone = [stored(model, ids[row : row + 1, :length]) for row, length in enumerate(lengths)]
    assert next(iter(ranges)) == first
    for layer, seen in enumerate(ranges.values()):
        assert seen.layer == layer
        for which, found in enumerate((seen.k, seen.v)):
            expected = max(float(states[layer][which].abs().max()) for states in alone)
            assert found == pytest.approx(expected, rel=1e-5)  # sums of another batch size, in fp32


def test_the_range_of_several_batches_is_the_largest_and_nan_is_not_lost():
    model, ids = tiny("llama"), torch.randint(2, 272, (3, 8))
    parts = [observe_ranges(model, [({"input_ids": row[None]}, (8,))]) for row in ids]
    whole = observe_ranges(model, [({"input_ids": row[None]}, (8,)) for row in ids])
    for name, seen in whole.items():
        assert (seen.k, seen.v) == (max(p[name].k for p in parts), max(p[name].v for p in parts))
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ConfigurationError, match=r"not finite[\s\S]*layers\.1"):
        observe_ranges(model, [({"input_ids": row[None]}, (8,)) for row in ids])


def test_a_model_of_whose_keys_nothing_was_seen_has_no_ranges():
    with pytest.raises(ConfigurationError, match="fills no key/value cache"):
        observe_ranges(tiny("llama"), [])


@pytest.mark.parametrize("toward_zero", [False, True])
def test_rounded_keys_and_values_are_numbers_of_the_grid_times_the_scale(toward_zero):
    """In the first layer, whose keys and values depend on nothing that was rounded before."""
    model, ids = tiny("llama"), torch.randint(2, 272, (1, 40))
    (keys, values), scales = stored(model, ids)[0], (0.0037, 0.00011)  # the second one saturates
    rounded = stored(model, ids, rounding_cache(model, {0: scales}, toward_zero=toward_zero))[0]
    assert float(values.abs().max()) > 448 * scales[1]
    for exact, found, scale in zip((keys, values), rounded, scales, strict=True):
        quotients = (exact / scale).numpy()
        if toward_zero:
            behind = np.searchsorted(GRID, np.abs(quotients).clip(max=448), side="right") - 1
            expected = np.copysign(GRID[behind], quotients)
        else:
            expected = quotients.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(found.numpy(), expected * np.float32(scale))


def test_a_layer_without_a_scale_has_the_scale_1():
    model, ids = tiny("llama"), torch.randint(2, 272, (1, 16))
    without, unity = (rounding_cache(model, scales) for scales in ({}, {0: (1.0, 1.0), 1: (1.0, 1.0)}))
    for one, other in zip(stored(model, ids, without), stored(model, ids, unity), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("amax", [448.0, 17.375, 1e-30, 3.4e38])
def test_a_scale_is_amax_over_448_rounded_once(amax):
    assert cache_scale(amax) == float(np.float32(np.float32(amax) / np.float32(448)))


def test_a_range_of_zeros_has_a_scale_that_divides():
    assert cache_scale(0.0) == 1.0


def test_models_whose_engines_cache_something_else_are_told_apart():
    transformers = import_transformers()
    assert not why_unsupported(DECODERS["llama"]())
    assert "latent" in why_unsupported(transformers.DeepseekV3Config())
    assert "other layers" in why_unsupported(transformers.Gemma3nTextConfig())


def test_the_cache_is_given_under_the_name_that_the_model_takes():
    """transformers 5.24 renamed it; the older name then warns, and ends in a later version."""

    class Renamed(nn.Module):
        def forward(self, input_ids, cache=None):
            return cache

    class Older(nn.Module):
        def forward(self, input_ids, past_key_values=None):
            return past_key_values

    given = object()
    for model in (Renamed(), Older()):
        assert model(None, **cache_argument(model, given)) is given
