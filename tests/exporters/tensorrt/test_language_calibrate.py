"""Static scales, against plain loops over the values themselves."""

from __future__ import annotations

import math

import pytest
import torch
from static_inputs import static_inputs
from torch import nn

from exporters.tensorrt.language.calibrate import (
    InputCounts,
    count_inputs,
    dynamic_inputs,
    scales_by_layer,
    score_torch,
    static_scale,
)
from exporters.tensorrt.language.target import Calibration
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text import Encoded
from fp8pipe.numerics.grids import E4M3


@pytest.fixture
def values() -> torch.Tensor:
    """Numbers that bfloat16 holds, so that counting loses nothing; one outlier."""
    drawn = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).float()
    drawn[1, 7] = -3000.0
    return drawn.to(torch.bfloat16).float()


def counted(values: torch.Tensor) -> InputCounts:
    counts = InputCounts()
    for row in values:
        counts.add(row)
    return counts


def test_counts_answer_what_the_values_would(values):
    counts = counted(values)
    assert counts.total == values.numel()
    assert counts.amax == float(values.abs().max())
    for scale in (2.0**-9, 2.0**-3, 4.0):
        assert counts.clipped(scale) == float((values.abs() > 448 * scale).sum()) / values.numel()
        rounded = E4M3.cast(values.double() / scale).double() * scale
        assert counts.error(scale) == pytest.approx(float((values.double() - rounded).square().mean()), rel=1e-12)
    assert counts.quantile(0.01) == float(values.abs().flatten().sort().values[-31])


def test_amax_clips_nothing_and_is_the_smallest_such_power_of_two(values):
    found = static_scale(counted(values), Calibration.AMAX)
    assert math.log2(found.scale).is_integer()
    assert 448 * found.scale >= found.amax > 448 * found.scale / 2
    assert found.clipped == 0


def test_mse_is_the_best_of_all_powers_of_two(values):
    counts = counted(values)
    found = static_scale(counts, Calibration.MSE)
    assert counts.error(found.scale) == min(counts.error(2.0**k) for k in range(-20, 8))


def test_a_percentile_leaves_outliers_outside():
    many = torch.rand(400_000, generator=torch.Generator().manual_seed(0))
    many[5] = 5000.0
    counts = counted(many[None])
    found = static_scale(counts, Calibration.PERCENTILE)
    assert found.scale == 2.0**-8
    assert found.clipped == pytest.approx(1 / many.numel())


class _Branches(nn.Module):
    """Two linears on one tensor, and one on another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8)
        self.seen: list[torch.Tensor] = []

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        y = self.q(x) + self.k(x)
        self.seen.append(y.detach())
        self.logits = self.o(y)
        return self


def test_layers_that_read_one_tensor_share_one_scale():
    torch.manual_seed(0)
    model = _Branches().eval()
    text = [Encoded([1, 2, 3], [-100, 2, 3]), Encoded([4, 5], [-100, 5])]
    counts = count_inputs(model, ["q", "k", "o"], text)
    assert counts["q"] is counts["k"]
    assert counts["q"].total == 5 * 4
    assert counts["o"].amax == max(float(y.abs().max()) for y in model.seen)
    scales = scales_by_layer(counts, Calibration.AMAX)
    assert scales["q"] is scales["k"]


def test_an_input_that_is_not_finite_is_refused():
    model = _Branches().eval()
    model.embed.weight.data[3] = math.inf
    with pytest.raises(ConfigurationError, match="cannot be calibrated"):
        count_inputs(model, ["q", "o"], [Encoded([3], [3])])


def test_rounded_inputs_are_those_of_the_grid_and_only_for_a_while():
    torch.manual_seed(0)
    model = _Branches().eval()
    ids = torch.tensor([[1, 2, 3]])
    plain = model(ids).logits.detach().clone()
    weights = (model.q.weight + model.k.weight, model.q.bias + model.k.bias)
    x = model.embed(ids).detach()
    with static_inputs(model, {"q": 0.25, "k": 0.25}):
        model(ids)
    expected = E4M3.cast(x / 0.25).float() * 0.25 @ weights[0].T + weights[1]
    torch.testing.assert_close(model.seen[-1], expected.detach(), rtol=0, atol=1e-6)  # sums in another order
    with dynamic_inputs(model, ["q", "k"]):
        model(ids)
    scale = x.abs().amax(-1, keepdim=True) / 448
    expected = E4M3.cast(x / scale).float() * scale @ weights[0].T + weights[1]
    torch.testing.assert_close(model.seen[-1], expected.detach(), rtol=0, atol=1e-6)
    assert torch.equal(model(ids).logits, plain)


def test_a_score_counts_answers_alone():
    torch.manual_seed(0)
    model = _Branches().eval()
    score = score_torch(model, [Encoded([1, 2, 3, 4], [-100, -100, 3, 4]), Encoded([5, 6], [-100, -100])])
    log_probs = torch.log_softmax(model(torch.tensor([[1, 2, 3, 4]])).logits[0].detach(), -1)
    assert score.tokens == 2
    assert score.nats == pytest.approx(-float(log_probs[1, 3] + log_probs[2, 4]) / 2, rel=1e-6)
