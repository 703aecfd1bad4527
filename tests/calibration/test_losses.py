"""Losses on attention: closed forms, a plain pairwise reference, invariances, gradients, memory."""

from __future__ import annotations

import math

import pytest
import torch

from calibration.losses import class_prior, head_similarity, patch_entropy, total_variation
from fp8pipe.models.vision.structure import AttentionSite


def site(heads: int, grid: tuple[int, int], prefix: int = 1, windows: int = 1) -> AttentionSite:
    tokens = grid[0] * grid[1] + prefix
    return AttentionSite("a", heads, 8, tokens, prefix, grid, windows, False, tokens)


def maps_of(images: int, where: AttentionSite, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (images * where.windows, where.heads, where.tokens, where.tokens)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def pairwise(maps: torch.Tensor, where: AttentionSite, absolute: bool) -> torch.Tensor:
    """Image by image, query by query, pair by pair: SSIM with global moments, as its definition reads."""
    c1, c2, p = 0.01**2, 0.03**2, where.prefix_tokens
    values = []
    for image in maps.double()[:, :, p:, p:]:
        total = []
        for query in range(image.shape[1]):
            heads = [(m - m.min()) / (m.max() - m.min() + 1e-8) for m in image[:, query]]
            for a in heads:
                for b in heads:
                    covariance = ((a - a.mean()) * (b - b.mean())).mean()
                    spread = a.var(unbiased=False) + b.var(unbiased=False)
                    top = (2 * a.mean() * b.mean() + c1) * (2 * covariance + c2)
                    ssim = top / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (spread + c2))
                    total.append(1 - (ssim.abs() if absolute else ssim**2))
        values.append(torch.stack(total).mean())
    return torch.stack(values).view(-1, where.windows).mean(1)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("where", [site(3, (3, 4)), site(4, (3, 3), 0), site(2, (2, 4), 2), site(3, (2, 2), 0, 4)])
def test_it_equals_the_pairwise_definition_and_so_does_its_gradient(where, absolute):
    maps = maps_of(2, where).requires_grad_()
    plain = maps.detach().double().requires_grad_()
    ours, expected = head_similarity(maps, where, absolute=absolute), pairwise(plain, where, absolute)
    ours.sum().backward()
    expected.sum().backward()
    # fp32 against fp64.
    assert (ours.double() - expected).abs().max() <= 1e-6
    assert (maps.grad.double() - plain.grad).abs().max() <= 1e-6


def test_identical_heads_cost_nothing():
    where = site(5, (4, 4))
    maps = maps_of(2, site(1, (4, 4))).expand(-1, 5, -1, -1)
    assert head_similarity(maps, where).abs().max() <= 1e-6


def test_heads_that_are_positive_affine_copies_cost_nothing():
    where = site(4, (4, 4))
    factors = torch.tensor([1.0, 0.1, 7.0, 30.0]).view(1, 4, 1, 1)
    offsets = torch.tensor([0.0, -3.0, 2.0, 11.0]).view(1, 4, 1, 1)
    maps = maps_of(2, site(1, (4, 4))) * factors + offsets
    # Scaling to [0, 1] divides by the range plus 1e-8, and fp32 loses a few units with the offset.
    assert head_similarity(maps, where).abs().max() <= 1e-4


def test_a_negated_head_is_nearly_as_good_as_a_copy():
    """The square does not see signs; the constants of SSIM leave a little."""
    where = site(2, (14, 14), 0)
    one = maps_of(1, site(1, (14, 14), 0))
    loss = float(head_similarity(torch.cat([one, -one], 1), where))
    assert 0 < loss < 0.15


@pytest.mark.parametrize("heads", [2, 3, 6])
def test_independent_heads_cost_about_the_share_of_other_heads(heads):
    loss = float(head_similarity(maps_of(1, site(heads, (14, 14))), site(heads, (14, 14))))
    # SSIM of independent maps is not 0 but of the order of 1/sqrt(196): its square is below 0.02.
    assert loss == pytest.approx((heads - 1) / heads, abs=0.02)


def test_the_order_of_heads_queries_and_keys_does_not_matter():
    where = site(4, (4, 4))
    maps, generator = maps_of(3, where), torch.Generator().manual_seed(5)
    plain = head_similarity(maps, where)
    heads = maps[:, torch.randperm(4, generator=generator)]
    tokens = 1 + torch.randperm(16, generator=generator)
    queries, keys = maps.clone(), maps.clone()
    queries[:, :, 1:] = maps[:, :, tokens]
    keys[:, :, :, 1:] = maps[:, :, :, tokens]
    for changed in (heads, queries, keys):
        assert (head_similarity(changed, where) - plain).abs().max() <= 1e-6  # fp32 in another order


def test_prefix_tokens_are_ignored():
    where = site(3, (3, 3), 2)
    maps = maps_of(2, where)
    changed = maps.clone()
    changed[:, :, :2], changed[:, :, :, :2] = 100.0, -100.0
    assert torch.equal(head_similarity(changed, where), head_similarity(maps, where))


def test_a_factor_on_the_logits_makes_no_difference():
    where = site(3, (4, 4))
    maps = maps_of(2, where)
    assert (head_similarity(maps * 0.125, where) - head_similarity(maps, where)).abs().max() <= 1e-5


def test_flat_maps_stay_finite():
    where = site(3, (3, 3))
    maps = torch.zeros(1, 3, 10, 10, requires_grad=True)
    loss = head_similarity(maps, where)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(maps.grad).all()


def test_an_image_does_not_depend_on_its_neighbours():
    where = site(3, (3, 4))
    maps = maps_of(4, where)
    alone = torch.cat([head_similarity(maps[i : i + 1], where) for i in range(4)])
    assert (head_similarity(maps, where) - alone).abs().max() <= 1e-6


def test_no_tensor_grows_with_the_pairs_of_heads():
    """Saved for the backward pass: at most a few times the maps themselves, whatever the number of heads."""
    saved = {}
    for heads in (2, 16):
        where, sizes = site(heads, (8, 8)), []
        maps = maps_of(1, where).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            head_similarity(maps, where)
        saved[heads] = max(sizes) / maps.numel()
    assert saved[16] <= 1.0  # the pairwise tensor would be 16 times the maps
    assert saved[16] <= saved[2] + 1e-9


def test_total_variation_of_one_bright_pixel():
    images = torch.zeros(2, 1, 5, 5)
    images[1, 0, 2, 2] = 3.0
    # Right and down: two differences of 3 each; both diagonals the same, divided by sqrt(2).
    expected = 2 * math.sqrt(2 * 9) + 2 * math.sqrt(2 * 9) / math.sqrt(2)
    assert total_variation(images).tolist() == pytest.approx([0.0, expected])


def test_the_class_prior_is_the_negative_log_probability():
    logits, labels = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 0])
    expected = [math.log(2), math.log(1 + math.exp(-2))]
    assert class_prior(logits, labels).tolist() == pytest.approx(expected)


def test_patches_that_are_all_alike_have_the_least_entropy():
    where = site(2, (6, 6))
    alike = torch.ones(1, 2, 37, 8)
    generator = torch.Generator().manual_seed(0)
    varied = torch.randn(1, 2, 37, 8, generator=generator)
    assert float(patch_entropy(varied, where)) < float(patch_entropy(alike, where))
