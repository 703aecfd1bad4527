"""Training attention on a CPU: against the formula in fp64, against transformers' fused kernel, and its limits."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.models.compat import import_transformers
from pipeline.finetune import attention
from pipeline.finetune.attention import NAME, attend, use_matmul_attention

BATCH, HEADS, GROUPS, LENGTH, WIDTH = 2, 6, 3, 16, 8


def _packed_mask() -> torch.Tensor:
    """Row 0: one sequence; row 1: two packed ones of 10 and 6 tokens. True where a key is seen, `(B, 1, L, L)`."""
    sequence = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    sequence[1, 10:] = 1
    same = sequence[:, :, None] == sequence[:, None, :]
    return (same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()).unsqueeze(1)


def _inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, heads, LENGTH, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def _grouped() -> torch.nn.Module:
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // GROUPS
    return module


def _formula(q, k, v, mask, scale):
    """Head by head and query by query, nothing shared with the product code."""
    out = torch.zeros(BATCH, LENGTH, HEADS, WIDTH, dtype=q.dtype)
    for b in range(BATCH):
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            for t in range(LENGTH):
                seen = mask[b, 0, t].nonzero().flatten()
                weight = torch.softmax(k[b, g, seen] @ q[b, h, t] * scale, 0)
                out[b, t, h] = weight @ v[b, g, seen]
    return out


@pytest.mark.parametrize("packed", [True, False])
def test_output_and_gradients_follow_the_formula(packed):
    mask = _packed_mask() if packed else torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)
    ours, plain = _inputs(torch.float64), _inputs(torch.float64)
    out, weights = attend(torch.nn.Module(), *ours, mask if packed else None, scaling=0.3)
    expected = _formula(*plain, mask, 0.3)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(grad)
    expected.backward(grad)
    assert weights is None
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)  # fp64 sums of 16 terms
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    mask = _packed_mask()
    assert torch.autograd.gradcheck(lambda *x: attend(torch.nn.Module(), *x, mask)[0], _inputs(torch.float64))


def test_queries_in_fp32_and_values_in_bf16_under_autocast_give_what_all_in_bf16_give():
    """As in a model in fp32, where the rotary embedding of what a projection gave in bf16 is in fp32."""
    mixed, plain = _inputs(torch.bfloat16), _inputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        query, key, value = mixed
        out, _ = attend(torch.nn.Module(), query.float(), key.float(), value, None)
        expected, _ = attend(torch.nn.Module(), *plain, None)
    assert torch.equal(out, expected)
    for result in (out, expected):
        result.sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mixed, plain, strict=True))


def test_a_model_gives_the_fused_kernels_logits_and_gradients(make_base):
    transformers = import_transformers()
    batch = torch.arange(2 * 24).reshape(2, 24) % 50
    positions = torch.cat([torch.arange(14), torch.arange(10)]).expand(2, -1)
    results = []
    for ours in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(make_base("llama"), dtype=torch.float32)
        if ours:
            assert use_matmul_attention(model)
            assert model.config._attn_implementation == NAME
        logits = model(input_ids=batch, position_ids=positions, use_cache=False).logits
        logits.square().mean().backward()
        results.append((logits.detach(), [p.grad for p in model.parameters()]))
    # Two orders of fp32 summation, through all layers: relative 1e-5 of the largest value.
    (fused, fused_grads), (own, own_grads) = results
    assert (own - fused).abs().max() <= 1e-5 * fused.abs().max()
    for a, b in zip(own_grads, fused_grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(float(b.abs().max()), 1e-3)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dropout": 0.1}, "dropout draws"),
        ({"sliding_window": 4}, "another formula"),
        ({"is_causal": False}, "no causal mask"),
    ],
)
def test_what_it_does_not_compute_goes_to_the_fused_kernel(changes, why, monkeypatch):
    monkeypatch.setattr(attention._Attention, "apply", lambda *a: pytest.fail(f"served in spite of: {why}"))
    out, _ = attend(_grouped(), *_inputs(torch.float32), None, **{"scaling": 0.3, **changes})
    assert out.shape == (BATCH, LENGTH, HEADS, WIDTH)


def test_a_mask_for_all_heads_is_served_and_one_of_each_head_is_not(monkeypatch):
    served, real = [], attention._Attention.apply
    monkeypatch.setattr(attention._Attention, "apply", lambda *a: served.append(1) or real(*a))
    attend(_grouped(), *_inputs(torch.float32), _packed_mask())
    assert served
    served.clear()
    for batch in (1, BATCH):
        parts = [part[:batch] for part in _inputs(torch.float32)]
        attend(_grouped(), *parts, _packed_mask()[:batch].expand(batch, HEADS, LENGTH, LENGTH))
    assert not served


def test_rows_too_long_go_to_the_fused_kernel(monkeypatch):
    monkeypatch.setattr(attention, "_MAX_SCORES", BATCH * HEADS * LENGTH * LENGTH - 1)
    monkeypatch.setattr(attention._Attention, "apply", lambda *a: pytest.fail("scores above the limit were formed"))
    out, _ = attend(_grouped(), *_inputs(torch.float32), _packed_mask())
    assert out.shape == (BATCH, LENGTH, HEADS, WIDTH)


def test_a_model_that_chose_another_attention_keeps_it(make_base):
    model = import_transformers().AutoModelForCausalLM.from_pretrained(make_base("llama"), attn_implementation="eager")
    assert not use_matmul_attention(model)
    assert model.config._attn_implementation == "eager"
