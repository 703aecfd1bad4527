"""Prepared models compute what they did before, from linears alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vit_families import randomize

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_timm, import_transformers
from fp8pipe.models.vision.prepare import ProjectedAttention, prepare_model

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}


def pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva_giant_patch14_224", "eva02_tiny_patch14_224"])
@torch.no_grad()
def test_biases_move_into_the_linear(name: str):
    size = 32 if "16" in name else 28
    model = import_timm().create_model(name, img_size=size, **SMALL).eval()
    randomize(model, 0)
    before = model(pixels(size))
    attention = model.blocks[0].attn
    q_bias = None if attention.q_bias is None else attention.q_bias.clone()
    prepare_model(model)
    assert torch.equal(model(pixels(size)), before)  # one addmm before and after
    if q_bias is not None:
        assert torch.equal(attention.qkv.bias[:32], q_bias)
        assert not attention.qkv.bias[32:64].any()
    assert not any(key.endswith(("q_bias", "v_bias")) for key in model.state_dict())


@torch.no_grad()
def test_multihead_attention_becomes_linears():
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    randomize(attention, 0)
    random = torch.Generator().manual_seed(1)
    query, tokens = torch.randn(2, 3, 16, generator=random), torch.randn(2, 7, 16, generator=random)
    expected, _ = attention(query, tokens, tokens)
    given, weights = ProjectedAttention(attention)(query, tokens, tokens)
    assert weights is None
    # float32, another order of the same sums.
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


def test_multihead_attentions_of_other_kinds_are_named():
    for options in ({"add_zero_attn": True}, {"dropout": 0.1}, {"kdim": 8, "vdim": 8}, {"batch_first": False}):
        model = nn.Sequential(nn.MultiheadAttention(16, 4, **({"batch_first": True} | options)))
        with pytest.raises(ConfigurationError, match="the attention 0 is an"):
            prepare_model(model)
    with pytest.raises(ConfigurationError, match="mask"):
        ProjectedAttention(nn.MultiheadAttention(4, 1, batch_first=True))(
            *(torch.ones(1, 2, 4) for _ in range(3)), key_padding_mask=torch.ones(1, 2, dtype=torch.bool)
        )


def test_prepared_twice_is_prepared_once():
    transformers = import_transformers()
    config = transformers.SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    model = prepare_model(transformers.SiglipVisionModel(config))
    names = list(model.state_dict())
    assert prepare_model(model) is model
    assert list(model.state_dict()) == names


def test_frozen_float32_in_eval_mode():
    model = import_timm().create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, **SMALL)
    prepare_model(model.to(torch.bfloat16).train())
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    swin = import_timm().create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
    assert not swin.layers[0].blocks[0].attn.fused_attn
    assert prepare_model(swin).layers[0].blocks[0].attn.fused_attn
