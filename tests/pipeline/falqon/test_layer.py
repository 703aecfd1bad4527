"""The layer against a slow, cast-faithful fp32 reference; gradients in fp64 without casts; what is saved."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.numerics import backends
from fp8pipe.numerics.grids import E4M3, E5M2, Scale, quantize
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.layer import FalqonLinear


def on_grid(x, grid):
    """Row-wise power-of-two cast in plain fp32, without our casts module."""
    amax = x.float().abs().amax(1, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(grid.max / amax)))
    return (x.float() * scale).clamp(-grid.max, grid.max).to(grid.dtype).float() / scale


def reference(layer, x, grad):
    """Y, dX, dB, dA in fp32 with exactly the casts that the text names, each product rounded to bf16 once."""
    w = layer.weight_codes.float() * layer.scale
    a = layer.adapter_codes.float() * layer.scale
    half = lambda t: t.to(torch.bfloat16).float()  # noqa: E731
    x_grid, b = on_grid(x, E4M3), half(layer.lora_B.detach())
    o = half(x_grid @ a.t())
    base = half(x_grid @ w.t())
    g, g_grid = grad.float(), on_grid(grad, E5M2)
    if layer.live:
        y = half(base + o @ b.t())
        dx = half(torch.cat([g_grid, half(g @ b)], 1) @ torch.cat([w, a]))
    else:
        y, dx = base, half(g_grid @ w)
    return y, dx, half(g.t() @ o), half(half(g @ b).t() @ x_grid)


def small_integers(shape, seed, low=-3, high=4):
    """bf16 values whose products sum exactly in fp32 in any order: the GEMM library may then add as it likes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(torch.bfloat16)


def exact_layer(live, seed=0, out=48, into=32, rank=16, trains_a=False):
    """A layer of small integer codes and small dyadic B, so that every sum in it is exact in fp32."""
    codes = small_integers((out + rank, into), seed).to(torch.float8_e4m3fn)
    layer = FalqonLinear(codes, Scale(torch.tensor(1.0)), rank=rank, live=live, trains_a=trains_a)
    layer.lora_B.data = small_integers((out, rank), seed + 1).float() / 4
    return layer


MODES = pytest.mark.parametrize(
    ("live", "trains_a"), [(True, False), (False, False), (True, True)], ids=["live", "merged", "both"]
)


@MODES
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_layer_equals_the_reference_with_difference_zero(live, trains_a, tokens):
    for seed in range(5):
        layer = exact_layer(live, seed, trains_a=trains_a)
        x, grad = small_integers((tokens, 32), seed + 2).requires_grad_(), small_integers((tokens, 48), seed + 3)
        y = layer(x)
        y.backward(grad)
        expected = reference(layer, x.detach(), grad)
        for got, want in zip((y, x.grad, *(p.grad for p in layer.trained.values())), expected, strict=False):
            assert torch.equal(got.float(), want)
        assert len(layer.trained) == 1 + trains_a


@MODES
def test_layer_follows_the_reference_on_random_values(live, trains_a, make_layer):
    """Random sums are rounded in fp32 in the GEMM library's own order: a last bf16 bit may flip, rarely.

    An fp32 sum of K terms is off by about K 2^-24 relative, a bf16 rounding boundary is met with that
    probability times 2^8: below 1e-3 for K = 32. A wrong cast would change a third of all values.
    """
    layer = make_layer(live=live, trains_a=trains_a)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(256, 32, generator=generator).to(torch.bfloat16).requires_grad_()
    grad = torch.randn(256, 48, generator=generator).to(torch.bfloat16)
    y = layer(x)
    y.backward(grad)
    results = y, x.grad, *(parameter.grad for parameter in layer.trained.values())
    for got, want in zip(results, reference(layer, x.detach(), grad), strict=False):
        assert (got.float() != want).float().mean() < 2e-3
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=1e-3)


def identity_layer(live):
    """The autograd formulas alone: fp64 products, no casts."""

    class Exact(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, b, w, a):
            o = x @ a.t()
            ctx.save_for_backward(o, b, w, a)
            return x @ w.t() + (o @ b.t() if live else 0 * (o @ b.t()))

        @staticmethod
        def backward(ctx, grad):
            o, b, w, a = ctx.saved_tensors
            return grad @ w + (grad @ b @ a if live else 0), grad.t() @ o, None, None

    return Exact.apply


def test_gradients_without_casts_are_those_of_a_lora_with_frozen_a():
    """fp64 gradcheck of the formulas that the layer implements (Y = X W^T + X A^T B^T)."""
    generator = torch.Generator().manual_seed(0)
    w, a = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (6, 3))
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: identity_layer(True)(x, b, w, a), (x, b))
    zero = torch.zeros(6, 3, dtype=torch.float64)
    y = x @ (w + zero.requires_grad_() @ a).t()
    grad = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    y.backward(grad)
    merged = grad.t() @ (x.detach() @ a.t())
    torch.testing.assert_close(zero.grad, merged)


@pytest.mark.parametrize("live", [True, False], ids=["live", "merged"])
def test_layer_gradients_point_where_autograd_of_the_dequantized_weights_points(live, make_layer):
    layer = make_layer(live=live)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 32, generator=generator)
    grad = torch.randn(64, 48, generator=generator)
    w = layer.weight_codes.float() * layer.scale
    a = layer.adapter_codes.float() * layer.scale
    plain_x, b = x.clone().requires_grad_(), layer.lora_B.detach().clone().requires_grad_()
    (plain_x @ (w + b @ a).t() if live else plain_x @ (w + (b - b.detach()) @ a).t()).backward(grad)
    cast_x = x.to(torch.bfloat16).requires_grad_()
    layer(cast_x).backward(grad.to(torch.bfloat16))
    cosine = torch.nn.functional.cosine_similarity
    # E5M2 keeps two mantissa bits (error about 6 % of the norm), so the cosine is about 0.998.
    assert cosine(cast_x.grad.float().flatten(), plain_x.grad.flatten(), 0) > 0.99
    assert cosine(layer.lora_B.grad.flatten(), b.grad.flatten(), 0) > 0.99


@pytest.mark.parametrize("live", [True, False], ids=["live", "merged"])
def test_x_is_never_saved(live, make_layer):
    layer, saved = make_layer(live=live), []
    x = torch.randn(64, 32).to(torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    shapes = {tuple(t.shape) for t in saved}
    assert shapes == {(64, 16), (48, 16)}  # O_A and B
    assert all(t.untyped_storage().nbytes() <= 64 * 16 * 4 for t in saved)


def test_nothing_but_b_gets_a_gradient_and_the_first_layer_computes_no_dx(make_layer):
    layer = make_layer(bias=True)
    x = torch.randn(8, 32).to(torch.bfloat16)
    layer(x).sum().backward()
    assert layer.lora_B.grad is not None
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["lora_B"]
    assert layer.code_bytes.grad is None
    assert x.grad is None


def test_a_trained_a_costs_the_rounded_input_and_nothing_else(make_layer):
    layer, saved = make_layer(trains_a=True), []
    x = torch.randn(64, 32).to(torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sorted(tuple(t.shape) for t in saved) == [(48, 16), (64, 16), (64, 32)]  # B, O_A and X
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["lora_B", "lora_A"]


def test_a_trained_a_is_rounded_to_its_codes_and_kept_within_their_range(make_layer):
    layer = make_layer(trains_a=True)
    before, weights = layer.adapter_codes.clone(), layer.weight_codes.clone()
    assert torch.equal(layer.lora_A, before.float() * layer.scale)
    layer.refresh()
    assert torch.equal(layer.adapter_codes.float(), before.float())
    layer.lora_A.data.mul_(1.1)
    layer.lora_A.data[0, :2] = torch.tensor([1e4, -1e4]) * layer.scale
    layer.refresh()
    assert torch.equal(layer.adapter_codes.float()[0, :2], torch.tensor([448.0, -448.0]))
    assert torch.equal(layer.lora_A[0, :2], torch.tensor([448.0, -448.0]) * layer.scale)
    units = layer.lora_A.detach() / layer.scale
    nearest = units.to(torch.float8_e4m3fn).float()
    assert torch.equal(layer.adapter_codes.float(), nearest)
    assert not torch.equal(layer.adapter_codes.float(), before.float())
    assert torch.equal(layer.weight_codes.float(), weights.float())


def test_a_is_not_trained_where_b_takes_no_part():
    codes, scale = quantize(torch.randn(8, 8), E4M3, ScaleRule.POWER_OF_TWO)
    with pytest.raises(ValueError, match="no gradient"):
        FalqonLinear(codes, scale, rank=2, live=False, trains_a=True)


def test_shapes_bias_and_parts(make_layer):
    layer = make_layer(bias=True, parts=(32, 16))
    x = torch.randn(2, 5, 32).to(torch.bfloat16)
    whole = layer(x)
    first, second = layer.forward_parts(x, layer.parts)
    assert whole.shape == (2, 5, 48)
    assert torch.equal(torch.cat([first, second], -1), whole)
    bias, layer.bias = layer.bias, None
    assert torch.equal(whole, layer(x) + bias)


def test_gradient_of_parts_equals_gradient_of_the_whole(make_layer):
    layer = make_layer(parts=(32, 16))
    grad = torch.randn(9, 48).to(torch.bfloat16)
    results = []
    for split in (False, True):
        layer.zero_grad()
        x = torch.arange(9 * 32).view(9, 32).to(torch.bfloat16).requires_grad_()
        y = torch.cat(layer.forward_parts(x, layer.parts), 1) if split else layer(x)
        y.backward(grad)
        results.append((x.grad, layer.lora_B.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_model_may_change_a_part_in_place(make_layer):
    layer, found = make_layer(parts=(32, 16)), []
    for clip in (torch.clamp, torch.clamp_):
        layer.zero_grad()
        x = (torch.arange(9 * 32).view(9, 32) / 100).to(torch.bfloat16).requires_grad_()
        first, second = layer.forward_parts(x, layer.parts)
        (clip(first, -0.5, 0.5).sum() + clip(second, -0.5, 0.5).square().sum()).backward()
        found.append((x.grad, layer.lora_B.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_contradictory_layers_are_refused():
    codes, scale = quantize(torch.randn(8, 8), E4M3, ScaleRule.EXACT)
    with pytest.raises(ValueError, match="add up"):
        FalqonLinear(codes, scale, rank=2, live=False, parts=(3, 2))
    with pytest.raises(ValueError, match="power-of-two"):
        FalqonLinear(codes, scale, rank=2, live=True)


@pytest.mark.parametrize("trains_a", [False, True], ids=["live", "both"])
def test_layer_compiles_without_graph_breaks_and_computes_the_same_bits(trains_a, make_layer, monkeypatch):
    """The torch casts alone, as on CUDA: the compiled CPU kernels are opaque to the tracer."""
    monkeypatch.setattr(backends, "library", lambda: None)
    layer, x = make_layer(trains_a=trains_a), torch.randn(16, 32).to(torch.bfloat16).requires_grad_()
    plain = layer(x)
    plain.sum().backward()
    dx, gradients = x.grad.clone(), [parameter.grad.clone() for parameter in layer.trained.values()]
    x.grad = None
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    compiled.sum().backward()
    assert torch.equal(compiled, plain)
    assert torch.equal(x.grad, dx)
    for parameter, gradient in zip(layer.trained.values(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
