"""Canvases against torch's own optimizer and interpolation, and the views that are shown of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from calibration.canvas import Pixels, Pyramid, layer_sizes, open_canvas
from calibration.config import SynthesisConfig
from calibration.views import image_stream, view
from fp8pipe.core.config import build_config

LIMITS = (torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_pixels_move_as_torch_s_adamw_moves_them():
    start = noise(2, 3, 8, 8)
    canvas = Pixels(start.clone(), None)
    oracle = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([oracle], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-6)
    for step in range(5):
        oracle.grad = noise(2, 3, 8, 8, seed=step + 1)
        optimizer.step()
        canvas.step((oracle.grad,), 0.1)
    # The same formula in another order of operations: a few roundings of numbers near 1.
    torch.testing.assert_close(canvas.pixels(), oracle, rtol=0, atol=2e-6)


def test_layers_halve_down_to_a_few_pixels():
    assert layer_sizes(112, 112) == [(4, 4), (7, 7), (14, 14), (28, 28), (56, 56), (112, 112)]
    assert layer_sizes(24, 40) == [(3, 5), (6, 10), (12, 20), (24, 40)]
    assert layer_sizes(3, 3) == [(3, 3)]


def test_a_pyramid_is_its_start_plus_enlarged_layers():
    start = 0.3 * noise(2, 3, 16, 16)
    canvas = Pyramid(start, LIMITS)
    torch.testing.assert_close(canvas.pixels(), start, rtol=0, atol=1e-7)
    with torch.no_grad():
        canvas.parameters[0][1, 0] = 0.5  # the coarsest layer's brightness of the second image
    found = canvas.pixels().detach()
    torch.testing.assert_close(found[0], start[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(found[1], start[1] + 0.5, rtol=0, atol=1e-6)
    with torch.no_grad():
        canvas.parameters[-1][0, 1] = noise(16, 16, seed=3)
    layer = functional.interpolate(
        noise(16, 16, seed=3)[None, None], size=(16, 16), mode="bicubic", align_corners=False
    )
    expected = start[0] + layer[0] * torch.tensor([0.25, 0.05, -0.25]).view(3, 1, 1)
    torch.testing.assert_close(canvas.pixels()[0], expected, rtol=0, atol=1e-6)


def test_pixels_out_of_range_are_held_back_and_can_return():
    canvas = Pyramid(torch.full((1, 3, 8, 8), 5.0), LIMITS)
    pixels = canvas.pixels()
    assert float(pixels.detach().max()) == pytest.approx(2 + 0.01 * 3)
    gradients = torch.autograd.grad(pixels.sum(), canvas.parameters)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)
    pinned = Pixels(torch.full((1, 3, 8, 8), 1.99), LIMITS)
    pinned.step((-torch.ones(1, 3, 8, 8),), 0.5)
    assert float(pinned.pixels().detach().max()) == 2.0


def test_the_configuration_chooses():
    start = noise(1, 3, 8, 8)
    assert isinstance(open_canvas(start, LIMITS, build_config(SynthesisConfig, {})), Pyramid)
    assert isinstance(open_canvas(start, LIMITS, build_config(SynthesisConfig, {"preset": "published"})), Pixels)


@pytest.mark.parametrize("views", ["camera", "shifts"])
def test_a_view_follows_from_the_image_s_own_stream(views):
    config = build_config(SynthesisConfig, {"views": views, "mirror": True})
    images = noise(3, 3, 16, 16)
    together = view(images, [image_stream(7, i) for i in range(3)], 5, config)
    alone = view(images[1:2], [image_stream(7, 1)], 5, config)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-6)
    assert together.shape == images.shape
    assert not torch.allclose(together, images)


def test_shifts_are_circular():
    config = build_config(SynthesisConfig, {"views": "shifts", "colour": False, "jitter": 3})
    images = noise(4, 3, 10, 10)
    shown = view(images, [image_stream(0, i) for i in range(4)], 0, config)
    for image, one in zip(images, shown, strict=True):
        assert any(torch.equal(image.roll((dy, dx), (1, 2)), one) for dy in range(-3, 4) for dx in range(-3, 4))


def test_the_camera_of_an_even_picture_changes_its_light_alone():
    config = build_config(SynthesisConfig, {"views": "camera"})
    shown = view(torch.full((2, 3, 12, 12), 0.5), [image_stream(0, i) for i in range(2)], 0, config)
    assert float((shown - shown.mean((2, 3), keepdim=True)).abs().max()) < 1e-5
