"""Compensated rounding against its definition on every grid, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.nvfp4 import BLOCK, choose_block_scales, e2m1_round
from fp8pipe.numerics.quantizers import compensated_round

OUT, IN = 12, 96
LANGUAGE = {"block": 128, "damping": 0.001}
VISION = {"block": 64, "damping": 0.01, "damping_floor": 1e-12, "fused": False}


def problem(seed=0):
    """A weight, and inputs whose channels are correlated and of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    mixing = torch.randn(IN, IN, generator=generator) * torch.linspace(0.1, 2, IN)
    inputs = torch.randn(400, IN, generator=generator) @ mixing
    return weight, inputs, inputs.T @ inputs / len(inputs)


def on_grid(name, weight):
    """The rounding of one column, as a function of the column and its index."""
    scales = choose_block_scales(weight).product
    step = weight.abs().amax(1) / 7
    return {
        "e4m3": lambda value, _: E4M3.cast(60 * value).double() / 60,
        "int4": lambda value, _: torch.round(value / step).clamp(-8, 7) * step,
        "nvfp4": lambda value, i: e2m1_round(value / scales[:, i // BLOCK]) * scales[:, i // BLOCK],
    }[name]


def by_definition(weight, moments, round_column, damping, floor):
    """Optimal Brain Surgeon, one column after another, inverting what is left anew each time; fp64."""
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    damped = moments[order][:, order].double()
    damped = damped + (damping * damped.diagonal().mean() + floor) * torch.eye(IN, dtype=torch.float64)
    work, found = weight.double()[:, order].clone(), torch.empty(weight.shape, dtype=torch.float64)
    for i, column in enumerate(order.tolist()):
        inverse = torch.linalg.inv(damped[i:, i:])
        found[:, column] = work[:, i]
        error = (work[:, i] - round_column(work[:, i], column)) / inverse[0, 0]
        work[:, i:] -= error[:, None] * inverse[0]
    return found


@pytest.mark.parametrize("grid", ["e4m3", "int4", "nvfp4"])
@pytest.mark.parametrize("options", [LANGUAGE, VISION], ids=["language", "vision"])
def test_it_is_optimal_brain_surgeon_and_halves_the_error_of_the_output(grid, options):
    weight, inputs, moments = problem()
    round_column = on_grid(grid, weight)
    found = compensated_round(weight, moments, round_column, **options)
    expected = by_definition(weight, moments, round_column, options["damping"], options.get("damping_floor", 0.0))
    # fp32 sums against fp64: a weight on the edge of two codes may fall either way, and all after it in its row differ.
    assert float(((found.before - expected).abs().amax(1) < 1e-3).float().mean()) >= 0.6
    nearest = torch.stack([round_column(weight[:, i], i) for i in range(IN)], 1).float()
    assert torch.equal(found.rounded, torch.stack([round_column(found.before[:, i], i) for i in range(IN)], 1).float())
    error = lambda rounded: float((inputs @ (rounded - weight).T).square().mean())  # noqa: E731
    assert error(found.rounded) < 0.6 * error(nearest)


@pytest.mark.parametrize("fused", [True, False])
def test_blocks_and_the_rounding_of_products_hardly_change_the_result(fused):
    weight, _, moments = problem()
    round_column = on_grid("e4m3", weight)
    whole = compensated_round(weight, moments, round_column, block=IN, damping=0.001).rounded
    parts = compensated_round(weight, moments, round_column, block=20, damping=0.001, fused=fused).rounded
    assert float((whole != parts).float().mean()) < 0.02


def test_weights_on_the_grid_and_independent_inputs_need_no_compensation():
    weight, _, moments = problem()
    round_column = on_grid("e4m3", weight)
    rounded = round_column(weight, 0).float()
    assert torch.equal(compensated_round(rounded, moments, round_column, **LANGUAGE).rounded, rounded)
    diagonal = torch.diag(torch.linspace(1, 2, IN))
    assert torch.equal(compensated_round(weight, diagonal, round_column, **VISION).before, weight)


@pytest.mark.parametrize("options", [LANGUAGE, VISION], ids=["language", "vision"])
def test_inputs_that_never_vary_are_survived(options):
    weight, inputs, _ = problem()
    round_column = on_grid("int4", weight)
    inputs[:, 10:20] = 0
    one = torch.zeros(IN, IN)
    one[0, 0] = 1e6  # one column alone was ever non-zero
    for moments in (inputs.T @ inputs, torch.zeros(IN, IN), one):
        assert torch.isfinite(torch.stack(compensated_round(weight, moments, round_column, **options))).all()
