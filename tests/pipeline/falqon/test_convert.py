"""Conversion of real transformers models: what becomes FP8, what stays, what is refused, and what is shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.structure import structure_of
from fp8pipe.numerics.grids import E4M3
from pipeline.falqon.convert import convert_model, read_convertible
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.rules import Initialisation, update_rule


def load(path, dtype=torch.bfloat16):
    return import_transformers().AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def convert(model, rule="live", rank=8):
    return convert_model(model, update_rule(rule), rank=rank, initialisation=Initialisation.RANDOMIZED_SVD, seed=0)


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_left_out_by_its_role_tied_or_not(make_base, tied):
    model = load(make_base("llama", tie_word_embeddings=tied))
    _, records = convert(model)
    left_out = {r.name: r.reason for r in records if not r.converted}
    assert left_out == {"lm_head": "output head"}
    assert len(records) == 2 * 7 + 1
    assert isinstance(model.lm_head, nn.Linear)


def test_a_head_of_another_name_is_left_out_too(make_base):
    model = load(make_base("llama", tie_word_embeddings=False))
    model.readout = model.lm_head
    del model.lm_head
    model.get_output_embeddings = lambda: model.readout
    assert structure_of(model).left_out == {"readout": "output head"}


def test_a_linear_layer_tied_to_another_is_left_out(make_base):
    model = load(make_base("llama"))
    layers = model.model.layers
    layers[1].mlp.gate_proj.weight = layers[0].mlp.gate_proj.weight
    assert {name for name, reason in structure_of(model).left_out.items() if "tied" in reason} == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.mlp.gate_proj",
    }


def test_layers_of_one_input_share_scale_adapter_and_gemm(make_base):
    groups, _ = convert(load(make_base("llama")))
    members = [tuple(m.rpartition(".")[2] for m in g.members) for g in groups]
    assert members == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)] * 2


def test_released_shares_nothing(make_base):
    groups, _ = convert(load(make_base("llama")), rule="released")
    assert all(len(g.members) == 1 for g in groups)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_converted_model_computes_with_the_dequantized_weights(make_base, family):
    """Against the same transformers model holding the dequantized weights, activations cast by hooks: fp32."""
    path = make_base(family)
    model, plain = load(path, torch.float32), load(path, torch.float32)
    groups, _ = convert(model)
    for group in groups:
        weight = (group.layer.weight_codes.float() * group.layer.scale).split(group.layer.parts)
        for name, part, transposed in zip(group.members, weight, group.transposed, strict=True):
            module = plain.get_submodule(name)
            module.weight.data = part.t().contiguous() if transposed else part
            module.register_forward_pre_hook(_cast_rows)
    ids = torch.arange(24).view(2, 12) + 5
    with torch.no_grad():
        got, want = model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits
    # The wide GEMM adds in another order than the separate ones, and an activation near a rounding boundary may
    # then fall on the neighbouring code (6 %); on two random layers that moves logits of size 1 by some 1e-3.
    torch.testing.assert_close(got, want, rtol=0, atol=0.02)
    assert (got - want).abs().mean() < 1e-3


def _cast_rows(module, args):
    x = args[0]
    scale = torch.exp2(torch.floor(torch.log2(448.0 / x.abs().amax(-1, keepdim=True))))
    return (E4M3.cast(x.float() * scale).float() / scale,)


def test_only_b_trains_and_biases_are_kept(make_base):
    model = load(make_base("qwen2"))
    bias = model.model.layers[0].self_attn.k_proj.bias.detach().clone()
    groups, _ = convert(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(groups) == 8
    assert all(name.endswith("lora_B") for name in trained)
    first, second = groups[0].layer.parts[:2]
    assert torch.equal(groups[0].layer.bias[first : first + second], bias)


def test_parts_are_right_when_called_out_of_order_or_alone(make_base):
    model = load(make_base("llama"))
    convert(model)
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 4, 64).to(torch.bfloat16)
    v, q, k = attention.v_proj(x), attention.q_proj(x), attention.k_proj(x)
    assert torch.equal(attention.q_proj(x.clone()), q)
    assert torch.equal(attention.k_proj(x.clone()), k)
    assert torch.equal(attention.v_proj(x.clone()), v)
    attention.q_proj(x)  # k and v of this x now wait to be fetched
    x.add_(1.0)  # the same object with other contents: they must not be handed out
    assert torch.equal(attention.k_proj(x), attention.k_proj(x.clone()))


def test_shared_inputs_are_seen_not_guessed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three, self.four = (nn.Linear(16, 16) for _ in range(4))
            self.gate = nn.Linear(16, 1)

        def forward(self, input_ids):
            x = torch.ones(1, 16)
            changed = self.four(x)
            changed.view(16).mul_(2)  # of a part of a stacked output that would fail, so it is no part
            return self.gate(x) * (self.one(x) + self.two(x.clone()) + self.three(x) + changed)

    model = Odd()
    structure = structure_of(model).probed(model)
    assert structure.input_groups == (("one", "three"), ("two",), ("four",))
    assert structure.left_out == {"gate": "a side of 1 is too short for FP8 kernels and for an adapter"}
    assert read_convertible(model, 16).trainable == ("one", "two", "three", "four")  # the gate bounds no rank


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ConfigurationError, match="no linear layer") as error:
        read_convertible(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), 1)
    assert error.value.exit_code == 10


def test_a_rank_beyond_the_smallest_layer_is_refused_naming_it(make_base):
    with pytest.raises(ConfigurationError, match="rank 33") as error:
        convert(load(make_base("llama")), rank=33)  # k_proj is (32, 64)
    assert "k_proj" in error.value.why


def test_an_already_quantized_model_is_refused(make_base):
    model = load(make_base("llama"))
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ConfigurationError, match="already quantized"):
        read_convertible(model, 8)
    del model.config.quantization_config
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ConfigurationError, match=r"up_proj\.weight"):
        read_convertible(model, 8)


def test_layers_are_falqon_layers(make_base):
    model = load(make_base("gpt2"))
    groups, records = convert(model)
    assert sum(isinstance(m, FalqonLinear) for m in model.modules()) == len(groups) == 8
    assert all(all(g.transposed) for g in groups)
    assert {r.shape for r in records if r.name.endswith("c_fc")} == {(128, 32)}
