"""Layers to test on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fp8pipe.numerics.grids import E4M3, quantize
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.layer import FalqonLinear


def _make_layer(out=48, into=32, rank=16, *, live=True, rule=ScaleRule.POWER_OF_TWO, seed=0, bias=False, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(out, into, generator=generator)
    stacked = torch.cat([weight, 0.01 * torch.randn(rank, into, generator=generator)])
    codes, scale = quantize(stacked, E4M3, rule)
    offset = torch.randn(out, generator=generator).to(torch.bfloat16) if bias else None
    layer = FalqonLinear(codes, scale, rank=rank, live=live, bias=offset, **options)
    layer.lora_B.data = 0.02 * torch.randn(out, rank, generator=generator)
    return layer


@pytest.fixture
def make_layer() -> Callable[..., FalqonLinear]:
    """`make_layer(out, into, rank, live=..., rule=...)`: a layer of Gaussian weights, adapter and B."""
    return _make_layer
