"""The branches for CUDA under every check of torch's operators, without a GPU: see `support/fake_cuda.py`."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import fake_cuda

from fp8pipe.numerics import cuda, fused
from fp8pipe.numerics.grids import E4M3, E5M2, quantize
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.flush import flush_rows, select_rows
from pipeline.falqon.rules import RULES, update_rule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("out", "into", "rank"), [(64, 48, 16), (50, 36, 7)], ids=["aligned", "odd"])
@pytest.mark.parametrize(
    ("live", "rule", "trains_a"),
    [(True, "power-of-two", False), (True, "power-of-two", True), (False, "power-of-two", False),
     (False, "exact", False)],
)  # fmt: skip
def test_a_layer_runs_forward_and_backward(make_layer, live, rule, trains_a, out, into, rank, dtype):
    for tokens in (1, 13, 64):
        with fake_cuda() as counter:
            form = {"live": live, "rule": ScaleRule(rule), "bias": True, "parts": (out - 20, 20), "trains_a": trains_a}
            layer = make_layer(out, into, rank, **form).cuda()
            layer.bias = layer.bias.to(dtype)
            x = torch.randn(1, tokens, into, device="cuda", dtype=dtype, requires_grad=True)
            first, second = layer.forward_parts(x, layer.parts)
            (first.sum() + second.sum()).backward()
            for tensor, shape in ((first, (1, tokens, out - 20)), (second, (1, tokens, 20)), (x.grad, x.shape)):
                assert (tensor.shape, tensor.dtype, tensor.is_cuda) == (shape, dtype, True)
            b = layer.lora_B.grad
            assert (b.shape, b.dtype, b.is_cuda) == ((out, rank), torch.float32, True)
            if trains_a:
                a = layer.lora_A.grad
                assert (a.shape, a.dtype, a.is_cuda) == ((rank, into), torch.float32, True)
                layer.refresh()
        assert counter.kernels["_scaled_mm"] == 2  # Y | O_A, and dX
        assert not counter.syncs


def test_products_are_refused_as_a_gpu_refuses_them(make_layer, monkeypatch):
    monkeypatch.setattr(cuda, "_pad", lambda codes, dim: codes)
    with fake_cuda():
        layer = make_layer(50, 36, 7).cuda()
        with pytest.raises(RuntimeError, match="divisible by 16"):
            layer(torch.randn(4, 36, device="cuda", dtype=torch.bfloat16))


@pytest.mark.parametrize("compiling", [False, True])
def test_a_layer_uses_the_fused_kernels_but_where_it_is_compiled(make_layer, compiling, monkeypatch):
    used = []

    def quantize_rows(x, grid):
        used.append(f"{grid.name} {tuple(x.shape)}")
        codes, scale = quantize(x, grid, ScaleRule.POWER_OF_TWO, per_row=True)
        return codes, scale.value

    def transpose_bytes(codes):
        used.append(f"transpose {tuple(codes.shape)}")
        return codes.t().contiguous()

    monkeypatch.setattr(fused, "ready", lambda device: True)
    kernels = SimpleNamespace(quantize_rows=quantize_rows, transpose_bytes=transpose_bytes)
    monkeypatch.setattr(fused, "_kernels", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with fake_cuda():
        layer = make_layer(64, 48, 16).cuda()
        x = torch.randn(8, 48, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
        too_wide = torch.empty(2, fused.WIDEST + 1, device="cuda", dtype=torch.bfloat16)
        for other in (x.float(), too_wide, x.t(), x[:0]):
            assert fused.quantize_rows(other, E4M3) is None
    assert used == ([] if compiling else ["e4m3 (8, 48)", "e5m2 (8, 64)", "transpose (64, 48)"])


@pytest.mark.parametrize("name", RULES)
def test_every_rule_flushes(make_layer, name):
    rule = update_rule(name)
    for measure in (False, True):
        with fake_cuda():
            layer = make_layer(live=rule.live, rule=rule.scale).cuda()
            rows = select_rows(layer, 8)
            assert rows.is_cuda
            flush_rows(layer, rows, rule, torch.Generator().manual_seed(0), measure=measure)


@pytest.mark.parametrize("grid", [E4M3, E5M2], ids=lambda g: g.name)
def test_a_cast_is_two_passes_and_never_waits(grid):
    with fake_cuda() as counter:
        x = torch.empty(64, 96, device="cuda", dtype=torch.bfloat16)
        counter.clear()
        cuda.cast_rows(x, grid)
    passes = 64 * 96 * (2 + 2 + 1)  # read for the largest magnitudes, read, written
    assert passes <= counter.traffic <= passes + 64 * 60  # and scales
    assert counter.kernels.total() == 6
    assert not counter.syncs


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)], ids=lambda c: ".".join(map(str, c)))
def test_a_layer_runs_on_every_generation(make_layer, capability):
    with fake_cuda(capability) as counter:
        layer = make_layer().cuda()
        x = torch.randn(16, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == x.shape
    assert counter.kernels["_scaled_mm"] == (2 if capability >= (8, 9) else 0)  # without FP8 cores: bf16 products
    assert not counter.syncs


def test_nothing_is_left_behind():
    with fake_cuda() as counter:
        x = torch.ones(4, device="cuda")
        y = x + x
        assert float(y.sum()) == 1.0
        assert counter.syncs == {"_local_scalar_dense": 1}
        assert counter.kernels == {"ones": 1, "add": 1, "sum": 1}
        assert counter.traffic == 16 + (16 + 16) + (16 + 4)
        assert counter.peak == 16 + 16 + 4
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(4, device="cuda")
    x = torch.ones(2, requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]
