"""The layer on NVFP4 weights against products of weights that an independent implementation decodes."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.numerics.nvfp4_weights import SEARCHED, global_scale, quantize_packed
from fp8pipe.numerics.plain_nvfp4 import dequantize_nvfp4
from pipeline.falqon.nvfp4_layer import Nvfp4Linear
from pipeline.falqon.stacked import StackedOutput

OUT, IN, RANK, TOKENS = 48, 64, 8, 24


def make_layer(dtype=torch.bfloat16, **options):
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(OUT, IN, generator=generator)
    scale = global_scale(float(weight.abs().max()))
    a = (0.1 * torch.randn(RANK, IN, generator=generator)).to(dtype)
    layer = Nvfp4Linear(*quantize_packed(weight, scale, SEARCHED), scale, a, **options)
    layer.lora_B.data = 0.1 * torch.randn(OUT, RANK, generator=generator)
    return layer


def plain_weight(layer):
    return dequantize_nvfp4(layer.packed, layer.blocks, 1 / layer.global_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weight_is_decoded_exactly(dtype):
    layer = make_layer(dtype)
    assert torch.equal(layer.weight(dtype).float(), plain_weight(layer).float())


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_lora_with_a_frozen_a(bias):
    offset = torch.linspace(-1, 1, OUT) if bias else None
    layer = make_layer(torch.float32, bias=offset)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS, IN, generator=generator).requires_grad_()
    grad = torch.randn(2, TOKENS, OUT, generator=generator)
    layer(x).backward(grad)
    double, b = x.detach().double().requires_grad_(), layer.lora_B.detach().double().requires_grad_()
    y = double @ (plain_weight(layer).double() + b @ layer.a.double()).T + (0 if offset is None else offset)
    y.backward(grad.double())
    for found, wanted in ((layer(x), y), (x.grad, double.grad), (layer.lora_B.grad, b.grad)):
        # fp32 sums of at most 64 products against fp64
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_in_bf16_only_the_products_are_rounded():
    layer = make_layer()
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = x.float() @ plain_weight(layer).float().T
    wanted += (x.float() @ layer.a.float().T).bfloat16().float() @ layer.lora_B.detach().bfloat16().float().T
    # Two roundings to bf16, each off by up to 2^-9 of the largest value that is rounded.
    assert float((layer(x).detach().float() - wanted).abs().max()) <= 2**-8 * float(wanted.abs().max())


def test_parts_of_a_stacked_layer_share_one_product_and_the_input_is_not_saved():
    layer, saved = make_layer(parts=(16, 32)), []
    x = torch.randn(TOKENS, IN, dtype=torch.bfloat16, requires_grad=True)
    output = StackedOutput(layer)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        first, second = output.part(x, 0), output.part(x, 1)
    assert torch.equal(torch.cat([first, second], 1), layer(x))
    assert saved == [(TOKENS, RANK), (OUT, RANK)]  # O and B
    with pytest.raises(ValueError, match="do not add up"):
        make_layer(parts=(16, 16))


def test_a_cast_of_the_module_leaves_codes_and_scales_as_they_are():
    layer = make_layer()
    before = plain_weight(layer)
    assert torch.equal(plain_weight(layer.to(torch.float32).to(torch.bfloat16)), before)
