"""CUDA's way on a CPU, its product as specified: the same values enter the same products on every device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp8pipe.numerics import backends, cuda
from fp8pipe.numerics.backends import backend
from fp8pipe.numerics.grids import E4M3, E5M2, Scale, quantize, same_bits
from fp8pipe.numerics.kinds import ScaleRule
from fp8pipe.numerics.reference import Backend

CPU = backend(torch.empty(0))
SHAPES = pytest.mark.parametrize(
    ("rows", "rank", "cols", "tokens"), [(64, 16, 48, 32), (50, 7, 36, 13)], ids=["even", "odd"]
)


@pytest.fixture
def device(monkeypatch):
    """`device(capability)`: the operations for such a GPU, on CPU tensors."""
    monkeypatch.setattr(torch, "_scaled_mm", _scaled_mm)

    def choose(capability):
        monkeypatch.setattr(cuda, "capability", lambda index: capability)
        return backends._CUDA

    return choose


def _scaled_mm(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
    """What `torch._scaled_mm` is specified to compute, and what it demands."""
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert a.shape[1] % 16 == b.shape[1] % 16 == 0
    assert scale_a.is_contiguous()
    assert scale_b.is_contiguous()
    assert (scale_a.numel(), scale_b.numel()) == (1, 1) or (scale_a.shape, scale_b.shape) == (
        (a.shape[0], 1),
        (1, b.shape[1]),
    )
    return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)


class Operands(TorchDispatchMode):
    """What enters matrix products, in their order: pairs of fp32 tensors."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in {"mm", "addmm", "addmm_"}:
            self.found.append(tuple(operand.float() for operand in args[-2:]))
        return func(*args, **(kwargs or {}))


def _case(rule, rows, rank, cols, tokens, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    codes, scale = quantize(torch.randn(rows + rank, cols, generator=generator), E4M3, rule)
    if rule is ScaleRule.POWER_OF_TWO:
        scale = Scale(scale.value, columns=scale.value.expand(max(codes.shape) + 15).contiguous())
    spread = torch.exp(2 * torch.randn(tokens, 1, generator=generator))
    x, grad, o = ((spread * torch.randn(tokens, n, generator=generator)).to(dtype) for n in (cols, rows, rank))
    b = 0.1 * torch.randn(rows, rank, generator=generator)
    return x, grad, o, codes, scale, b


@SHAPES
@pytest.mark.parametrize("live", [True, False], ids=["live", "merged"])
def test_the_same_values_enter_the_products_on_every_device(live, rows, rank, cols, tokens, device):
    x, grad, o, codes, scale, b = _case(ScaleRule.POWER_OF_TWO, rows, rank, cols, tokens)
    b = b if live else None
    seen = []
    for one in (Backend(), CPU, device((9, 0))):
        with Operands() as operands:
            one.forward(x, codes, scale, rank, b)
            one.backward(grad, o, codes, scale, b)
        seen.append(operands.found)
    for operands in seen[1:]:
        _compare(seen[0], operands, scale.value, rows, rank, cols, live)


def _compare(expected, found, scale, rows, rank, cols, live):
    (x, into), *thin = expected[: 1 + live]
    (found_x, found_into), *found_thin = found[: 1 + live]
    _equal(x, found_x)  # activations on E4M3's grid
    _equal(into, found_into)  # [W; A]
    for one, other in zip(thin, found_thin, strict=True):  # O and B, in bf16
        _equal(one[0], other[0])
        _equal(one[1], other[1])
    expected, found = expected[1 + live :], found[1 + live :]
    _equal(expected[-1][0], found[-1][0])  # G and O, in bf16
    _equal(expected[-1][1], found[-1][1])
    if len(found) == len(expected):  # the same products
        for one, other in zip(expected, found, strict=True):
            _equal(one[0], other[0])
            _equal(one[1], other[1])
        return
    # [G | G B] [W; A] as two products; A's scale, a power of two, has moved into G B.
    (g, b), (both, stacked), _ = expected
    (found_g, found_b), (only, weight), (beside, units), _ = found
    _equal(g, found_g)
    _equal(b * scale, found_b)
    _equal(both[:, :rows], only)
    _equal(stacked[:rows], weight)
    _equal(both[:, rows:] * scale, beside)
    _equal(stacked[rows:], units * scale)


@SHAPES
def test_the_same_values_enter_the_product_of_a_s_gradient(rows, rank, cols, tokens, device):
    """On CUDA the scales of A and of X's rows, powers of two, have moved into G B."""
    x, grad, o, codes, scale, b = _case(ScaleRule.POWER_OF_TWO, rows, rank, cols, tokens)
    seen = []
    for one in (Backend(), CPU, device((9, 0))):
        kept = one.forward_keeping(x, codes, scale, rank, b)[2]
        with Operands() as operands:
            one.backward_both(grad, o, kept, codes, scale, b)
        seen.append(operands.found[-1])
    found, factor = quantize(x, E4M3, ScaleRule.POWER_OF_TWO, per_row=True)
    beside = (grad @ b.to(grad.dtype)).float()
    for thin, values in seen[:2]:
        assert torch.equal(thin, beside.t())
        assert torch.equal(values, found.float() * factor.value)
    thin, values = seen[2]
    assert torch.equal(thin, (beside * factor.value).t() * scale.value)
    assert torch.equal(values, found.float())


def _equal(expected, found):
    """Where CUDA pads, with zeros."""
    assert not found[expected.shape[0] :].any()
    assert not found[:, expected.shape[1] :].any()
    assert torch.equal(expected, found[: expected.shape[0], : expected.shape[1]])


@SHAPES
@pytest.mark.parametrize("rule", ScaleRule)
def test_every_device_computes_the_same_results(rule, rows, rank, cols, tokens, device):
    """fp32 sums in another order; where G B's product is added, two roundings to bf16 in place of one."""
    x, grad, o, codes, scale, b = _case(rule, rows, rank, cols, tokens)
    forms = [None] if rule is ScaleRule.EXACT else [None, b]
    found = []
    for one in (Backend(), CPU, device((9, 0))):
        results = [t for form in forms for t in one.forward(x, codes, scale, rank, form)]
        results += [t for form in forms for t in one.backward(grad, o, codes, scale, form)]
        if rule is ScaleRule.POWER_OF_TWO:
            y, own, kept = one.forward_keeping(x, codes, scale, rank, b)
            results += [y, own, *one.backward_both(grad, o, kept, codes, scale, b)]
            assert one.backward_both(grad, o, kept, codes, scale, b, wants_input=False)[0] is None
        found.append(results)
        assert one.backward(grad, o, codes, scale, wants_input=False)[0] is None
    for other in found[1:]:
        for expected, result in zip(found[0], other, strict=True):
            assert expected.dtype == result.dtype
            atol = 2**-8 * float(expected.abs().max())
            torch.testing.assert_close(result, expected, rtol=2**-7, atol=atol)


@SHAPES
@pytest.mark.parametrize("live", [True, False], ids=["live", "merged"])
def test_row_scales_applied_afterwards_change_no_bit(live, rows, rank, cols, tokens, device, monkeypatch):
    x, grad, o, codes, scale, b = _case(ScaleRule.POWER_OF_TWO, rows, rank, cols, tokens)
    x[2], grad[3] = 0, 0
    found = []
    for capability, compiling in (((9, 0), False), ((8, 9), False), ((12, 0), False), ((9, 0), True), ((8, 9), True)):
        one = device(capability)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        assert cuda.scales_rows(-1, x.dtype) == (capability == (9, 0))
        form = b if live else None
        found.append([*one.forward(x, codes, scale, rank, form), *one.backward(grad, o, codes, scale, form)])
        if live:
            kept = one.forward_keeping(x, codes, scale, rank, b)[2]
            found[-1] += one.backward_both(grad, o, kept, codes, scale, b)
    for other in found[1:]:
        assert all(torch.equal(expected, result) for expected, result in zip(found[0], other, strict=True))


def test_fp32_is_not_asked_of_the_product_with_row_scales(device):
    x, grad, o, codes, scale, b = _case(ScaleRule.POWER_OF_TWO, 64, 16, 48, 32, torch.float32)
    one = device((9, 0))
    assert not cuda.scales_rows(-1, torch.float32)
    for expected, result in zip(
        [*Backend().forward(x, codes, scale, 16, b), *Backend().backward(grad, o, codes, scale, b)],
        [*one.forward(x, codes, scale, 16, b), *one.backward(grad, o, codes, scale, b)], strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("compiling", [True, False])
@pytest.mark.parametrize("grid", [E4M3, E5M2], ids=lambda g: g.name)
def test_casts_of_every_bf16_value_are_those_of_quantize(grid, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    rows = torch.cat([values, torch.zeros(1, 256, dtype=torch.bfloat16), values.flip(1) * 2.0**-100])
    codes, scale = cuda.cast_rows(rows, grid)
    expected, rule = quantize(rows, grid, ScaleRule.POWER_OF_TWO, per_row=True)
    assert torch.equal(scale.isnan(), rule.value.isnan())
    sound = ~scale.isnan().squeeze(1)
    assert same_bits(scale[sound], rule.value[sound])
    assert same_bits(codes[sound], expected[sound])
    assert codes[~sound].float().isnan().all()  # and whatever they are multiplied by


@pytest.mark.parametrize("grid", [E4M3, E5M2], ids=lambda g: g.name)
def test_casts_on_one_exact_scale_are_those_of_quantize(grid):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    # Each magnitude is the largest once: the multiplier is then rounded up or down.
    for largest in every[(every > 1e-12) & (every < 1e30)][::97].tolist():
        x = every[every.abs() <= largest].view(1, -1)
        codes, scale = cuda.cast_whole(x, grid)
        expected, rule = quantize(x, grid, ScaleRule.EXACT)
        assert torch.equal(scale.inverse_scale, rule.inverse_scale)
        assert same_bits(codes, expected)
    for poison in (torch.nan, torch.inf):
        x = torch.tensor([[1.0, poison]], dtype=torch.bfloat16)
        assert cuda.cast_whole(x, grid)[0].float().isnan().any()
