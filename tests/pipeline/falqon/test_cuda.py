"""The CUDA path: `torch._scaled_mm` against the CPU's exact emulation, odd shapes, in-place flush, torch.compile."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.numerics import cuda, fused
from fp8pipe.numerics.backends import backend
from fp8pipe.numerics.grids import E4M3, E5M2, quantize, same_bits
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.flush import flush_rows, select_rows
from pipeline.falqon.rules import update_rule
from pipeline.finetune.compiled import OPTIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("grid", [E4M3, E5M2], ids=lambda g: g.name)
def test_casts_on_cuda_have_the_cpus_values(grid):
    x = (torch.randn(64, 96) * torch.exp(3 * torch.randn(64, 96))).to(torch.bfloat16)
    for rule in ScaleRule:
        on_cuda = backend(x.cuda()).cast(x.cuda(), grid, rule)
        assert torch.equal(on_cuda.cpu(), backend(x).cast(x, grid, rule))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("grid", [E4M3, E5M2], ids=lambda g: g.name)
def test_codes_on_cuda_are_those_of_quantize(grid, compiled):
    x = (torch.randn(64, 96) * torch.exp(3 * torch.randn(64, 96))).to(torch.bfloat16)
    cast = torch.compile(cuda.cast_rows, fullgraph=True, options=OPTIONS) if compiled else cuda.cast_rows
    codes, scale = cast(x.cuda(), grid)
    expected, rows = quantize(x, grid, ScaleRule.POWER_OF_TWO, per_row=True)
    assert same_bits(codes.cpu(), expected)
    assert same_bits(scale.cpu(), rows.value)
    if not compiled:
        codes, whole = cuda.cast_whole(x.cuda(), grid)
        expected, one = quantize(x, grid, ScaleRule.EXACT)
        assert same_bits(codes.cpu(), expected)
        assert torch.equal(whole.inverse_scale.cpu(), one.inverse_scale)


@pytest.mark.parametrize(
    ("live", "rule", "trains_a"),
    [(True, "power-of-two", False), (True, "power-of-two", True), (False, "power-of-two", False),
     (False, "exact", False)],
)  # fmt: skip
@pytest.mark.parametrize(("out", "into", "rank", "tokens"), [(64, 48, 16, 32), (50, 36, 7, 13)], ids=["aligned", "odd"])
def test_layer_agrees_with_the_cpu(make_layer, live, rule, trains_a, out, into, rank, tokens):
    """fp32 sums in another order, and on Hopper with 14-bit partial sums: two bf16 units in the forward pass."""
    how = {"live": live, "rule": ScaleRule(rule), "trains_a": trains_a}
    layers = [make_layer(out, into, rank, **how) for _ in range(2)]
    layers[1].cuda()
    x, grad = torch.randn(tokens, into).to(torch.bfloat16), torch.randn(tokens, out).to(torch.bfloat16)
    results = []
    for layer, device in zip(layers, ("cpu", "cuda"), strict=True):
        own = x.to(device).requires_grad_()
        y = layer(own)
        y.backward(grad.to(device))
        results.append([t.float().cpu() for t in (y, own.grad, *(one.grad for one in layer.trained.values()))])
    for on_cpu, on_cuda in zip(*results, strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, rtol=2**-6, atol=2**-6 * float(on_cpu.abs().max()))


def test_flush_on_cuda_writes_the_same_codes_in_place(make_layer):
    on_cpu, on_cuda = make_layer(live=False), make_layer(live=False).cuda()
    place = on_cuda.codes.data_ptr()
    for layer in (on_cpu, on_cuda):
        layer.lora_B.data *= 20
        flush_rows(layer, select_rows(layer, 8), update_rule("accumulate"))
    assert on_cuda.codes.data_ptr() == place
    differing = (on_cuda.codes.cpu().view(torch.uint8) != on_cpu.codes.view(torch.uint8)).float().mean()
    assert differing < 1e-3  # B A in fp32, summed in another order, meets a rounding boundary now and then


def test_triton_kernels_are_right_on_this_device():
    kernels = pytest.importorskip("fp8pipe.numerics.triton_kernels", exc_type=ImportError)
    assert fused.first_difference(kernels, torch.device("cuda")) is None
    assert fused.ready(torch.device("cuda"))


def test_layer_compiles_without_graph_breaks(make_layer):
    layer = make_layer().cuda()
    x = torch.randn(32, 32, device="cuda", dtype=torch.bfloat16)
    torch.compiler.assume_constant_result(cuda.capability)
    compiled = torch.compile(layer, fullgraph=True, options=OPTIONS)
    torch.testing.assert_close(compiled(x), layer(x), rtol=2**-6, atol=1e-2)
