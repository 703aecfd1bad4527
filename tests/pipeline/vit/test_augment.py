"""Augmentation against plain references: a flip, a known Gaussian, and grey pictures that stay grey."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8pipe.core.config import build_config
from pipeline.vit.augment import augment, blur, changed, crop, draw, first_views, relight
from pipeline.vit.config import DistillConfig


def pictures(count: int = 3, side: int = 24) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_without_cropping_it_only_mirrors():
    pixels = pictures(2)
    draws = torch.tensor([[0.3, 0.2, 0.5, 0.5], [0.3, 0.7, 0.5, 0.5]])
    shown = crop(pixels, draws, 1.0)
    torch.testing.assert_close(shown[0], pixels[0].flip(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(shown[1], pixels[1], atol=1e-5, rtol=0)


def test_a_crop_shows_the_place_that_was_drawn():
    """A ramp across the picture: a half-size crop at the right edge shows its right half."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    shown = crop(ramp, torch.tensor([[0.0, 0.9, 1.0, 0.5]]), 0.5)
    assert float(shown.min()) == pytest.approx(0.0, abs=0.03)
    assert float(shown.max()) == pytest.approx(1.0, abs=0.03)


def test_a_point_becomes_a_gaussian_of_the_deviation_asked():
    point = torch.zeros(2, 3, 41, 41)
    point[:, :, 20, 20] = 1
    deviations = torch.tensor([1.0, 3.0])
    shown = blur(point, deviations)
    at = torch.arange(41) - 20.0
    for image, deviation in zip(shown, deviations.tolist(), strict=True):
        assert float(image[0].sum()) == pytest.approx(1, abs=1e-5)
        # Sampled and cut at 3 deviations of the widest: the narrow one is whole, the wide one loses 0.3 %.
        assert float((image[1].sum(0) * at**2).sum()) ** 0.5 == pytest.approx(deviation, rel=0.02)


def test_blurring_by_nothing_changes_nothing():
    pixels = pictures()
    torch.testing.assert_close(blur(pixels, torch.tensor([0.0, 0.0, 1.0]))[:2], pixels[:2], atol=1e-6, rtol=0)
    assert blur(pixels, torch.zeros(3)) is pixels


def test_relighting_by_nothing_changes_nothing_and_grey_stays_grey():
    pixels = pictures()
    torch.testing.assert_close(relight(pixels, torch.zeros(3, 3)), pixels, atol=1e-6, rtol=0)
    grey = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    shown = relight(grey, torch.full((3, 3), 0.4))
    torch.testing.assert_close(shown[:, 0], shown[:, 2])
    assert float(shown.std()) == pytest.approx(1.4 * float(grey.std()), rel=0.02)


def test_the_same_draws_give_the_same_pictures_and_each_picture_its_own():
    config = build_config(DistillConfig, {})
    pixels = pictures(1).expand(4, -1, -1, -1)
    first, again = (augment(pixels, torch.Generator().manual_seed(5), config) for _ in range(2))
    assert torch.equal(first, again)
    assert len({float(image.sum()) for image in first}) == 4
    assert first.shape == pixels.shape


def test_first_views_are_views_of_the_run_and_the_images_themselves_without_augmentation():
    pixels = pictures()
    config = build_config(DistillConfig, {})
    shown = first_views(pixels, config, 1)
    assert shown.shape == pixels.shape
    assert not torch.equal(shown, pixels)
    assert torch.equal(shown, first_views(pixels, config, 1))
    assert not torch.equal(shown, first_views(pixels, config, 2))
    assert first_views(pixels, build_config(DistillConfig, {"augment": False}), 1) is pixels


def test_a_part_of_the_images_gets_the_views_that_all_of_them_get():
    """What a GPU sees, a few images at a time: the same crop, blur (as wide a kernel) and light; sums may round."""
    pixels, config = pictures(), build_config(DistillConfig, {})
    draws = draw(pixels.shape, torch.Generator().manual_seed(2), config)
    whole = changed(pixels, draws)
    parts = [changed(pixels[i : i + 1], draws.part(i, i + 1)) for i in range(len(pixels))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
