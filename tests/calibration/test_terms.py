"""Terms that are off by default: each against its definition, written out plainly, and gradients against float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from calibration.generator import Plateau
from calibration.losses import (
    deeper_half,
    draw_priors,
    informative,
    masked_difference,
    prior_distance,
    query_logits,
    received_attention,
    rounded,
    similarity_spread,
)
from calibration.views import cut, draw_choice, draw_regions, image_stream
from fp8pipe.models.vision.structure import AttentionSite


def site(heads: int = 3, grid: tuple[int, int] = (3, 4), prefix: int = 1) -> AttentionSite:
    tokens = grid[0] * grid[1] + prefix
    return AttentionSite("a", heads, 8, tokens, prefix, grid, 1, False, tokens)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streams(count: int, seed: int = 0) -> list[torch.Generator]:
    return [image_stream(seed, number, 0) for number in range(count)]


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_spread_is_the_gaussian_entropy_of_the_cosines_and_so_is_its_gradient(prefix):
    where = site(prefix=prefix)
    maps = random(2, 3, where.tokens, where.tokens)
    plain = maps.clone().requires_grad_()
    expected = []
    for image in plain[:, :, prefix:, prefix:]:
        rows = image.mean(0)
        cosines = [a @ b / (a.norm() * b.norm()) for a in rows for b in rows]
        mean = sum(cosines) / len(cosines)
        variance = sum((c - mean) ** 2 for c in cosines) / len(cosines)
        expected.append(-0.5 * torch.log(2 * math.pi * math.e * (variance + 1e-8)))
    torch.stack(expected).sum().backward()
    ours = maps.float().requires_grad_()
    found = similarity_spread(ours, where)
    found.sum().backward()
    # fp32 against fp64.
    assert (found.double() - torch.stack(expected)).abs().max() <= 1e-5
    assert (ours.grad.double() - plain.grad).abs().max() <= 1e-5


def test_rounded_values_lie_on_the_grid_and_gradients_pass():
    values = random(2, 3, 5, 8).float().requires_grad_()
    found = rounded(values, 4)
    step = values.detach().abs().amax((-2, -1), keepdim=True) / 7
    codes = found / step
    assert (codes - codes.round()).abs().max() <= 1e-5
    assert codes.abs().max() <= 7 + 1e-5
    assert (found - values).abs().max() <= step.max() / 2 + 1e-6
    found.sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_masked_difference_equals_its_definition(prefix):
    where = site(prefix=prefix)
    layers = [(random(2, 3, where.tokens, 8, seed=i).float(), random(2, 3, where.tokens, 8, seed=9 + i).float())
              for i in range(2)]  # fmt: skip
    answers = [query_logits(q, k, where, 4) for q, k in layers]
    draws = torch.rand(2, 12, generator=torch.Generator().manual_seed(3))
    found = masked_difference(answers, 0.0, draws)
    for image in range(2):
        both = []
        for q, k in layers:
            sides = []
            for cast in (lambda x: x, lambda x: rounded(x, 4)):
                a, b = cast(q)[image].double(), cast(k)[image].double()
                query = a[:, 0] if prefix else a.mean(1)
                sides.append(torch.stack([(query * b[:, prefix + p]).sum(-1).mean() for p in range(12)]))
            both.append(sides)
        importance = sum(sides[0] for sides in both) / 2
        chosen = sorted(range(12), key=lambda p: -float(importance[p]))[:6]
        kept = sorted(chosen, key=lambda p: -float(draws[image, p]))[:4]  # three in ten of six are left out
        expected = sum(float((s[0][p] - s[1][p]).abs()) for s in both for p in kept) / 2 / 4
        assert float(found[image]) == pytest.approx(expected, rel=1e-5)


def test_masks_narrow_from_half_to_a_tenth():
    answers, draws = random(1, 100).float(), torch.rand(1, 100)
    counts = [int(informative(answers, progress, draws).sum()) for progress in (0.0, 0.5, 1.0)]
    assert counts == [35, 21, 7]


def test_priors_are_drawn_from_the_image_s_own_stream():
    three, one = draw_priors(streams(3), 2, 3, (4, 5)), draw_priors(streams(3)[2:], 2, 3, (4, 5))
    assert three.shape == (3, 2, 3, 4, 5)
    assert torch.equal(three[2:], one)
    assert bool(((three >= 0) & (three <= 1)).all())
    assert not torch.equal(three[0], three[1])


def test_the_distance_from_priors_equals_its_definition():
    shares = random(2, 3, 12).softmax(-1).float().requires_grad_()
    prior = draw_priors(streams(2), 1, 3, (3, 4))[:, 0].flatten(2)
    wanted = prior / prior.sum(-1, keepdim=True)
    found = prior_distance(shares, prior)
    for image in range(2):
        gaps = (shares.detach() - wanted)[image]
        total = [12**2 * float(gaps[h, p]) ** 2 for h in range(3) for p in range(12)]
        assert float(found[image].detach()) == pytest.approx(sum(total) / 36, rel=1e-5)
    assert prior_distance(wanted, prior).max() <= 1e-6
    double = shares.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(partial(prior_distance, prior=prior.double()), (double,))


def test_deeper_layers_count_more():
    assert deeper_half(["a", "b", "c", "d"]) == {"c": 0.75, "d": 1.0}


@pytest.mark.parametrize("prefix", [0, 2])
def test_shares_of_received_attention_are_of_patches_alone(prefix):
    where = site(prefix=prefix)
    maps = random(2, 3, where.tokens, where.tokens).softmax(-1)
    found = received_attention(maps, where)
    assert (found.sum(-1) - 1).abs().max() <= 1e-6
    row = maps[:, :, 0, prefix:] if prefix else maps.mean(2)
    assert (found.double() - row / row.sum(-1, keepdim=True)).abs().max() <= 1e-6


def test_targets_name_the_label_and_the_quarters():
    targets = draw_regions(streams(4), torch.tensor([0, 3, 5, 9]), 10)
    assert (targets.sum(-1) - 1).abs().max() <= 1e-6
    assert torch.equal(targets[:, 1].argmax(-1), torch.tensor([0, 3, 5, 9]))  # the first quarter has the label
    for image in targets:
        quarters = {int(row.argmax()) for row in image[1:]}
        best = image[0].topk(len(quarters)).indices.tolist()
        assert set(best) == quarters


def test_quarters_are_cut_out_and_enlarged():
    picture = torch.zeros(1, 1, 8, 8)
    picture[..., :4, :4], picture[..., :4, 4:], picture[..., 4:, :4], picture[..., 4:, 4:] = 1, 2, 3, 4
    shown = cut(picture.expand(5, -1, -1, -1), torch.arange(5))
    assert torch.equal(shown[0], picture[0])
    for quarter in range(1, 5):
        assert shown[quarter, 0, 2:6, 2:6].unique().tolist() == [quarter]  # away from its edges


def test_the_share_of_quarters_is_the_one_asked_for():
    choices = torch.stack([draw_choice(streams(64, seed), 0.5) for seed in range(8)])
    assert 0.4 < float((choices > 0).float().mean()) < 0.6
    assert choices.unique().tolist() == [0, 1, 2, 3, 4]
    assert bool((draw_choice(streams(64), 0.0) == 0).all())


def test_an_image_leaves_when_its_loss_stops_falling():
    watch = Plateau(0.02, 3)
    going = [watch.going(torch.tensor([10.0 - step, 5.0, math.nan])).tolist() for step in range(6)]
    assert going == [[True] * 3] * 5 + [[True, False, True]]  # after two windows; the synthesizer starts NaN again
    assert watch.going(torch.tensor([3.9, math.nan])).shape == (2,)
    assert all(bool(Plateau(0.0, 1).going(torch.zeros(2)).all()) for _ in range(5))
