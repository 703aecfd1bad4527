"""Pixels: against torchvision's transforms, exact inverses, and every kind of picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_timm
from fp8pipe.models.vision.preprocessing import Preprocessing

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def recipe(**changes: object) -> Preprocessing:
    return build_config(Preprocessing, {"resize": 16, "crop": (12, 12)} | IMAGENET | changes)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(33, 20), (20, 33), (16, 16), (5, 9), (47, 61)])
@pytest.mark.parametrize(("resize", "crop"), [(16, (12, 12)), (17, (12, 15)), ((14, 20), (13, 20)), (16, (16, 16))])
def test_like_torchvision(interpolation, size, resize, crop):
    import_timm()  # declares what torchvision misses on a CPU build
    from torchvision import transforms

    mode = transforms.InterpolationMode(interpolation)
    oracle = transforms.Compose([
        transforms.Resize(resize if isinstance(resize, int) else list(resize), interpolation=mode),
        transforms.CenterCrop(crop), transforms.ToTensor(), transforms.Normalize(**IMAGENET),
    ])  # fmt: skip
    image = picture(*size)
    ours = recipe(resize=resize, crop=crop, interpolation=interpolation).image_to_tensor(image)
    # The same float32 operations in the same order: equal bit for bit.
    assert torch.equal(ours, oracle(image))


def test_the_arithmetic_is_the_documented_one():
    codes = torch.randint(0, 256, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    given = recipe().normalize(codes).numpy()
    mean, std = (np.array(IMAGENET[key], dtype=np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
    assert np.array_equal(given, (codes.numpy().astype(np.float32) / np.float32(255) - mean) / std)


@pytest.mark.parametrize("moments", [
    IMAGENET, {"mean": (0.5,) * 3, "std": (0.5,) * 3}, {"mean": (0.0,) * 3, "std": (1.0,) * 3},
    {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)},
])  # fmt: skip
def test_arrays_hold_the_bits_of_tensors(moments):
    """Every code in every channel: numpy's numbers, which serve, are torch's, which calibrated."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values, values[::-1], values.T], axis=2))
    one = recipe(resize=16, crop=(16, 16), **moments)
    assert one.codes(image).dtype == np.uint8
    assert torch.equal(torch.from_numpy(one.image_to_array(image)), one.normalize(one.pixels(image)))
    assert torch.equal(one.image_to_tensor(image), one.normalize(one.pixels(image)))


def test_codes_survive_the_way_there_and_back():
    codes = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    for one in (recipe(), recipe(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), recipe(mean=(0.5,) * 3, std=(0.5,) * 3)):
        assert torch.equal(one.to_uint8(one.normalize(codes)), codes)
        low, high = one.valid_range()
        assert torch.equal(torch.cat((low, high), dim=2), one.normalize(codes[:, :, [0, 255]]))
        assert torch.equal(one.to_uint8(torch.cat((low - 3, high + 3), dim=2)), codes[:, :, [0, 255]])


def test_rounding_goes_to_the_nearest_code():
    one = recipe(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert one.to_uint8(torch.full((3, 1, 1), 100.4 / 255)).flatten().tolist() == [100] * 3
    assert one.to_uint8(torch.full((3, 1, 1), 100.6 / 255)).flatten().tolist() == [101] * 3


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr", "HSV"])
def test_any_mode_becomes_rgb(mode: str):
    image = picture(16, 16, "RGB").convert(mode) if mode != "LA" else picture(16, 16, "L").convert("LA")
    assert torch.equal(recipe().pixels(image), recipe().pixels(image.convert("RGB")))


def test_16_bit_greys_keep_their_high_bits(tmp_path: Path):
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    plain = recipe(resize=16, crop=(16, 16))
    for image in (Image.open(tmp_path / "grey.png"), Image.fromarray(values.astype(np.int32))):
        assert torch.equal(plain.pixels(image)[1], torch.from_numpy((values >> 8).astype(np.uint8)))


def test_floating_point_pixels_are_refused():
    with pytest.raises(ConfigurationError, match="floating-point"):
        recipe().pixels(Image.fromarray(np.zeros((4, 4), dtype=np.float32)))


def test_the_orientation_in_a_photograph_is_applied(tmp_path: Path):
    image = picture(16, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    image.save(tmp_path / "rotated.png", exif=exif)
    whole = recipe(resize=(24, 16), crop=(24, 16))
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(whole.pixels(Image.open(tmp_path / "rotated.png")), whole.pixels(upright))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"resize": 8}, "larger than the resized"),
        ({"resize": (8, 20)}, "larger than the resized"),
        ({"crop": (0, 12)}, "crop"),
        ({"std": (0.0, 1.0, 1.0)}, "std"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"interpolation": "spline"}, "interpolation"),
        ({"ratio": "cover"}, "ratio"),
        ({"ratio": "fit", "resize": (16, 16)}, "larger than the resized"),
        ({"resize": None}, "larger than the resized"),
        ({"channels": "bgr"}, "channels"),
    ],
)
def test_recipes_that_cannot_be(changes: dict[str, object], word: str):
    with pytest.raises(ConfigurationError, match="the preprocessing settings have") as caught:
        recipe(**changes)
    assert word in caught.value.why


def test_another_image_size_keeps_the_ratio():
    one = recipe(resize=256, crop=(224, 224))
    assert one.resized_to((224, 224)) is one
    assert one.resized_to((112, 112)).resize == 128
    assert recipe(resize=(256, 512), crop=(224, 448)).resized_to((112, 224)).resize == (128, 256)
    assert recipe(resize=224, crop=(224, 224)).resized_to((98, 140)).resize == 140
