"""Check that the device computes what the CPU does: scales, casts, layers, flushes, and training of a tiny model.

Codes must be bit-identical. Matrix multiplications on both devices must be within the error bound of `oracle.py` of an
fp64 multiplication of the same codes. Where sums are rounded to codes, another summation order may change a code, so
the share of differing codes is reported.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3, E5M2, FloatGrid, amax_scale, power_of_two_scale, quantize, same_bits
from fp8pipe.numerics.kinds import ScaleRule
from gpu_parts import tiny_llama
from gpu_parts.context import Context
from gpu_parts.layers import FORMS, Case, cases, codes_differing, exact_updates, make, moved
from gpu_parts.oracle import expected
from pipeline.falqon.flush import flush_rows, select_rows
from pipeline.falqon.rules import update_rule


def run(context: Context) -> None:
    """Emit the rows of this part."""
    context.row("scales", lambda: _scales(context.device))
    for grid in (E4M3, E5M2):
        for rule in ScaleRule:
            context.row(f"codes, {grid.name}, {rule}", partial(_codes, context.device, grid, rule))
    for case in cases(context.tiny):
        context.row(f"layer, {case.name}", partial(_layer, case, context))
    for name in ("accumulate", "accumulate-stochastic", "released"):
        context.row(f"flush, {name}", partial(_flush, name, context.device))
    steps = 4 if context.tiny else 20
    for name in ("live-both", "live", "live-nearest", "released"):
        find = partial(tiny_llama.compare, name, context.device, steps)
        context.row(f"training, {name}", find, needs=0.0 if context.tiny else 20.0)


def passed(found: bool) -> dict[str, Any]:
    """The entry of a row that says whether its check passed."""
    return {"passed": bool(found)}


def _scales(device: torch.device) -> dict[str, Any]:
    """Compare the scales of both rules for every non-negative bf16 number, infinity included, and many fp32 numbers."""
    every = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    random = torch.Generator().manual_seed(0)
    wide = torch.randn(1 << 18, generator=random).abs() * torch.exp2(60 * torch.randn(1 << 18, generator=random))
    amax = torch.cat([every[~every.isnan()], wide[wide.isfinite()]])
    differing = 0
    for grid in (E4M3, E5M2):
        for function in (power_of_two_scale, amax_scale):
            here, there = function(amax, grid), function(amax.to(device), grid).cpu()
            differing += int(((here != there) & ~(here.isnan() & there.isnan())).sum())
    return {"differing": differing, "of": 4 * len(amax), **passed(differing == 0)}


def difficult_rows(columns: int) -> Tensor:
    """bf16 test rows `(96, columns)` for casts.

    Gaussian rows of varying magnitude; also rows of zeros, of tiny and of huge values, and one with an outlier.
    """
    random = torch.Generator().manual_seed(columns)
    rows = torch.randn(96, columns, generator=random) * torch.exp2(16 * torch.randn(96, 1, generator=random))
    rows[0], rows[1], rows[2] = 0.0, 1e-38 * rows[1].sign(), 1e30 * rows[2].sign()
    rows[3, 0] = 1e6
    rows[4:8] *= torch.exp2(8 * torch.randn(4, columns, generator=random))  # subnormal and large codes in one row
    return rows.bfloat16()


def _codes(device: torch.device, grid: FloatGrid, rule: ScaleRule) -> dict[str, Any]:
    """Compare casts of a matrix at odd and aligned widths; per row with power-of-two scales, else with one scale."""
    differing, count = 0, 0
    for columns in (1, 37, 256, 1000):
        x = difficult_rows(columns)
        per_row = rule is ScaleRule.POWER_OF_TWO
        (codes, scale), (again, other) = (quantize(one, grid, rule, per_row=per_row) for one in (x, x.to(device)))
        differing += int((codes.view(torch.uint8) != again.cpu().view(torch.uint8)).sum())
        differing += 0 if same_bits(scale.value, other.value.cpu()) else 1
        count += codes.numel()
    return {"differing": differing, "of": count, **passed(differing == 0)}


def _layer(case: Case, context: Context) -> dict[str, Any]:
    """Compare forward and backward pass of a layer, on the CPU and on the device, each with the fp64 reference."""
    layer, x, grad = make(case)
    found: dict[str, Any] = {}
    for where, device in {"cpu": torch.device("cpu"), "device": context.device}.items():
        truth = expected(layer, x, grad, fp8_cores=device.type == "cuda")
        other = moved(layer, device)
        read = x.clone().to(device).requires_grad_()
        y = other(read)
        y.backward(grad.to(device))
        pairs = {"y": y.detach(), "dx": read.grad, "db": other.lora_B.grad}
        pairs |= {} if other.lora_A is None else {"da": other.lora_A.grad}
        found[where] = {name: truth[name].compare(value) for name, value in pairs.items() if value is not None}
    worst = max(one["of_bound"] for place in found.values() for one in place.values())
    rms = {f"{name}_rms": max(found[place][name]["rms"] for place in found) for name in found["device"]}
    return {"of_bound": worst, **rms, "by_device": found, **passed(worst <= 1.0)}


def _flush(name: str, device: torch.device) -> dict[str, Any]:
    """Compare flushes of 24 rows of B into the codes on the CPU and on the device.

    Updates that are exact in fp32 must give the same bits; for others, another summation order may change a code.
    """
    rule = update_rule(name)
    form = next(form for form in FORMS if form[2] is rule.scale and not form[1])
    found: dict[str, Any] = {}
    for kind in ("exact", "ordinary"):
        layer = make(Case(*form, 192, 256, 16, 8))[0]
        if kind == "exact":
            exact_updates(layer)
        else:
            layer.lora_B.data *= 20
        other = moved(layer, device)
        rows = select_rows(layer, 24)
        found[f"{kind}_rows_agree"] = torch.equal(select_rows(other, 24).cpu(), rows)
        for one in (layer, other):
            flush_rows(one, rows.to(one.codes.device), rule, torch.Generator().manual_seed(0))
        found[f"{kind}_differing"] = codes_differing(layer, other)
        found["b_agrees"] = found.get("b_agrees", True) and torch.equal(layer.lora_B.cpu(), other.lora_B.cpu())
    found["of"] = 24 * 256
    # At most one code in a thousand may differ: a sum is within 2^-20 of a rounding boundary far less often than that.
    agree = found["exact_differing"] == 0 and found["b_agrees"]
    return {**found, **passed(agree and found["ordinary_differing"] <= 1e-3 * found["of"])}
