"""The deployed layer in NVFP4 against products of weights that an independent implementation decodes."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.numerics.nvfp4_merge import Packed
from fp8pipe.numerics.nvfp4_weights import SEARCHED, global_scale, quantize_packed
from fp8pipe.numerics.plain_nvfp4 import dequantize_nvfp4
from pipeline.falqon.nvfp4_layer import Nvfp4Linear

OUT, IN, TOKENS = 48, 64, 24


def make_layer(bias=None):
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(OUT, IN, generator=generator)
    scale = global_scale(float(weight.abs().max()))
    return Nvfp4Linear(Packed(*quantize_packed(weight, scale, SEARCHED)), scale, bias)


def plain_weight(layer):
    return dequantize_nvfp4(*layer.packed, 1 / layer.global_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weight_is_decoded_exactly(dtype):
    layer = make_layer()
    assert torch.equal(layer.weight_in(dtype).float(), plain_weight(layer).float())


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_is_that_of_a_linear_layer(bias):
    offset = torch.linspace(-1, 1, OUT) if bias else None
    layer = make_layer(offset)
    x = torch.randn(2, TOKENS, IN, generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ plain_weight(layer).double().T + (0 if offset is None else offset)
    assert torch.allclose(layer(x).double(), wanted, rtol=1e-4, atol=1e-5)  # fp32 sums of 64 products against fp64
    half = layer.to(torch.bfloat16)(x.bfloat16()).double()
    # Rounded to bf16: the input, the sum and the bias, each off by up to 2^-9 of the largest value.
    assert float((half - wanted).abs().max()) <= 3 * 2**-9 * float(wanted.abs().max())


def test_a_cast_of_the_module_leaves_codes_and_scales_as_they_are():
    layer = make_layer()
    before = plain_weight(layer)
    assert torch.equal(plain_weight(layer.to(torch.float32).to(torch.bfloat16)), before)
