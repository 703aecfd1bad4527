"""The branches for CUDA under every check of torch's operators, without a GPU: see `support/fake_cuda.py`."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import fake_cuda

from fp8pipe.numerics import cuda
from fp8pipe.numerics.grids import E4M3, E5M2
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.flush import flush_rows, select_rows
from pipeline.falqon.rules import RULES, update_rule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("out", "into", "rank"), [(64, 48, 16), (50, 36, 7)], ids=["aligned", "odd"])
@pytest.mark.parametrize(("live", "rule"), [(True, "power-of-two"), (False, "power-of-two"), (False, "exact")])
def test_a_layer_runs_forward_and_backward(make_layer, live, rule, out, into, rank, dtype):
    for tokens in (1, 13, 64):
        with fake_cuda() as counter:
            form = {"live": live, "rule": ScaleRule(rule), "bias": True, "parts": (out - 20, 20)}
            layer = make_layer(out, into, rank, **form).cuda()
            layer.bias = layer.bias.to(dtype)
            x = torch.randn(1, tokens, into, device="cuda", dtype=dtype, requires_grad=True)
            first, second = layer.forward_parts(x, layer.parts)
            (first.sum() + second.sum()).backward()
            for tensor, shape in ((first, (1, tokens, out - 20)), (second, (1, tokens, 20)), (x.grad, x.shape)):
                assert (tensor.shape, tensor.dtype, tensor.is_cuda) == (shape, dtype, True)
            b = layer.lora_B.grad
            assert (b.shape, b.dtype, b.is_cuda) == ((out, rank), torch.float32, True)
        assert counter.kernels["_scaled_mm"] == 2  # Y | O_A, and dX
        assert not counter.syncs


def test_products_are_refused_as_a_gpu_refuses_them(make_layer, monkeypatch):
    monkeypatch.setattr(cuda, "_pad", lambda codes, dim: codes)
    with fake_cuda():
        layer = make_layer(50, 36, 7).cuda()
        with pytest.raises(RuntimeError, match="divisible by 16"):
            layer(torch.randn(4, 36, device="cuda", dtype=torch.bfloat16))


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
    assert counter.kernels.total() == 7
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
