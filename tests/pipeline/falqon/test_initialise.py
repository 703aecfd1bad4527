"""A: optimal directions by SVD, the same energy by the randomized one, reproducible draws."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.initialise import adapter_directions, quantization_error
from pipeline.falqon.rules import Initialisation

RULE = ScaleRule.POWER_OF_TWO


def directions(weight, rank, how, seed=0):
    return adapter_directions(weight, rank, how, RULE, torch.Generator().manual_seed(seed))


def energy(error, a):
    """Share of the error's energy in the row space of A."""
    basis = torch.linalg.qr(a.double().t()).Q
    return float((error.double() @ basis).square().sum() / error.double().square().sum())


@pytest.fixture
def weight():
    return 0.02 * torch.randn(192, 160, generator=torch.Generator().manual_seed(0))


def test_svd_directions_capture_the_most_energy_any_rank_can(weight):
    error = quantization_error(weight, RULE)
    a = directions(weight, 16, Initialisation.SVD)
    singular = torch.linalg.svdvals(error.double())
    best = float(singular[:16].square().sum() / singular.square().sum())
    assert energy(error, a) == pytest.approx(best, rel=1e-5)
    # A^T A is S V V^T: its eigenvalues are the singular values themselves.
    torch.testing.assert_close((a @ a.t()).diagonal().double(), singular[:16], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("rank", [8, 32])
def test_randomized_svd_captures_as_much_energy(weight, rank):
    """The spectrum is nearly flat, so the subspaces differ; the energy must not (2 % relative, 3 power iterations)."""
    error = quantization_error(weight, RULE)
    exact = energy(error, directions(weight, rank, Initialisation.SVD))
    quick = energy(error, directions(weight, rank, Initialisation.RANDOMIZED_SVD))
    assert quick > 0.98 * exact
    assert exact < 0.7  # else the test would pass for any subspace


def test_random_directions_stay_in_the_weights_range(weight):
    a = directions(weight, 16, Initialisation.RANDOM)
    assert a.shape == (16, 160)
    assert a.min() >= weight.min()
    assert a.max() <= weight.max()


@pytest.mark.parametrize("how", [how for how in Initialisation if how is not Initialisation.GRADIENT])
def test_a_seed_fixes_the_directions(weight, how):
    assert torch.equal(directions(weight, 8, how, 3), directions(weight, 8, how, 3))
    if how is not Initialisation.SVD:
        assert not torch.equal(directions(weight, 8, how, 3), directions(weight, 8, how, 4))


def test_a_rank_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match="rank 161"):
        directions(weight, 161, Initialisation.SVD)
