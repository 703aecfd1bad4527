"""Pixels are those of every family's own image processor, and timm's transform, for pictures of any shape and mode."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_timm, import_transformers
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.processors import check_pixels, processor_recipe, timm_recipe

# Model type (which processor transformers takes where none is named) and settings, as checkpoints have them.
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 48}}),
    "vit, old": ("vit", {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2}),
    "deit": ("deit", {"image_processor_type": "DeiTImageProcessor", "size": 37, "crop_size": 32, "resample": 3}),
    "deit, fast": ("deit", {"image_processor_type": "DeiTImageProcessorFast", "size": 41, "crop_size": 32}),
    "beit": ("beit", {"image_processor_type": "BeitImageProcessor", "size": 37, "do_center_crop": True,
                      "crop_size": {"height": 32, "width": 33}}),
    "clip": ("clip_vision_model", {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 33},
                                   "crop_size": 32}),
    "clip, padded": ("clip_vision_model", {"image_processor_type": "CLIPImageProcessor", "size": 29, "crop_size": 32}),
    "siglip": ("siglip_vision_model", {"image_processor_type": "SiglipImageProcessor",
                                       "size": {"height": 32, "width": 32}}),
    "dinov2": ("dinov2", {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 64},
                          "crop_size": {"height": 57, "width": 56}}),
    "dinov3": ("dinov3_vit", {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": 32}),
    "swin": ("swin", {"size": 32, "resample": 1}),
    "not normalized": ("vit", {"size": 32, "do_normalize": False}),
    "rescaled": ("vit", {"size": 32, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
    "codes": ("vit", {"size": 32, "do_rescale": False, "image_mean": [123.675, 116.28, 103.53],
                      "image_std": [58.395, 57.12, 57.375]}),
    "cropped alone": ("deit", {"do_resize": False, "crop_size": 32}),
    "of no class": ("siglip_vision_model", {"size": {"height": 33, "width": 32}, "resample": 3}),
    "padded": ("vit", {"size": {"height": 24, "width": 32}, "do_pad": True, "pad_size": 40}),
}  # fmt: skip
# DINOv3 has one backend, and Pillow's puts odd margins on the other side than the default one.
WITHOUT_PILLOW = {"dinov3", "clip, padded", "cropped alone"}
SHAPES = ((64, 64), (90, 161), (161, 90), (32, 32), (33, 31), (1, 1), (3, 200), (200, 3), (7, 5), (45, 45), (31, 47),
          (300, 451))  # fmt: skip


def picture(shape: tuple[int, int]) -> Image.Image:
    """Noise in all codes, so that filters overshoot at both ends."""
    random = np.random.default_rng(shape[0] * 1000 + shape[1])
    return Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8))


def difference(recipe: Preprocessing, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest, in 8-bit codes."""
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs) * np.array(recipe.std).reshape(3, 1, 1) * 255))


def folder_of(path: Path, name: str) -> Path:
    kind, settings = PROCESSORS[name]
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_pixels_are_those_of_the_processor(name: str, tmp_path: Path):
    folder = folder_of(tmp_path, name)
    recipe, notes = processor_recipe(folder, (32, 32))
    assert bool(notes) == (name == "of no class")
    transformers = import_transformers()
    auto = transformers.ViTImageProcessor if notes else transformers.AutoImageProcessor
    assert recipe.resizer == ("pillow" if name == "cropped alone" else "torchvision")
    for backend in ("torchvision", "pil"):
        if backend == "pil" and (notes or name in WITHOUT_PILLOW):
            continue
        processor = auto.from_pretrained(folder, **({} if notes else {"backend": backend}))
        one = recipe if backend == "torchvision" else recipe.model_copy(update={"resizer": "pillow"})
        for shape in SHAPES:
            image = picture(shape)
            theirs = processor(images=image, return_tensors="np")["pixel_values"][0]
            # The codes are equal; half of one is the colour of a padding, which is a mean. DINOv3 resizes floats, and
            # never rounds: two roundings, whose errors a bilinear filter does not enlarge, are one code.
            assert difference(one, one.image_to_array(image), theirs) <= (1.01 if name == "dinov3" else 0.51), (
                backend, shape,
            )  # fmt: skip


TRANSFORMS: dict[str, dict[str, Any]] = {
    "centre": {"crop_pct": 0.875}, "centre, odd": {"crop_pct": 0.9, "interpolation": "bilinear"},
    "whole": {"crop_pct": 1.0}, "squash": {"crop_pct": 0.9, "crop_mode": "squash"},
    "border": {"crop_pct": 0.95, "crop_mode": "border"}, "lanczos": {"interpolation": "lanczos", "crop_pct": 0.9},
    "box": {"interpolation": "box", "crop_pct": 1.0}, "larger": {"crop_pct": 1.2},
}  # fmt: skip


@pytest.mark.parametrize("size", [(32, 32), (96, 32), (33, 47)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_pixels_are_those_of_timm(name: str, size: tuple[int, int]):
    timm = import_timm()
    config = timm.data.resolve_data_config(pretrained_cfg=TRANSFORMS[name])
    recipe = timm_recipe(config, size)
    transform = timm.data.create_transform(**{**config, "input_size": (3, *size)}, is_training=False)
    for shape in SHAPES:
        if TRANSFORMS[name].get("crop_mode") == "border" and max(shape) > 50 * min(shape):
            continue  # a side of no pixel, at which timm fails
        image = picture(shape)
        theirs = transform(image).numpy()
        assert difference(recipe, recipe.image_to_array(image), theirs) <= 1e-3, shape  # both are Pillow's filters


def encoded(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The picture as a reader of its file gets it."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def files(image: Image.Image) -> dict[str, tuple[Image.Image, Image.Image]]:
    """The picture in files of every kind of pixels: what a reader gets, and what a processor is handed."""
    clear, grey = image.copy(), image.convert("L")
    alpha = np.random.default_rng(0).integers(0, 256, (image.height, image.width), dtype=np.uint8)
    clear.putalpha(Image.fromarray(alpha))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated
    sixteen = Image.fromarray((np.asarray(grey).astype(np.uint16) << 8) + 7)
    read = {
        "L": encoded(grey, "PNG"), "1": encoded(image.convert("1"), "PNG"), "P": encoded(image.convert("P"), "PNG"),
        "RGBA": encoded(clear, "PNG"), "LA": encoded(clear.convert("LA"), "PNG"),
        "P, transparent": encoded(image.convert("P"), "PNG", transparency=bytes(range(256))),
        "CMYK": encoded(image.convert("CMYK"), "TIFF"), "JPEG, CMYK": encoded(image.convert("CMYK"), "JPEG"),
    }  # fmt: skip
    handed = {name: (given, given) for name, given in read.items()}
    rotated = image.transpose(Image.Transpose.ROTATE_270)
    return handed | {"rotated": (encoded(image, "PNG", exif=exif), rotated), "I;16": (encoded(sixteen, "PNG"), grey)}


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "vit"])
def test_pictures_of_every_mode(name: str, tmp_path: Path):
    """As the processor gives them; where it takes RGB alone, as for the picture in RGB, which pipelines hand it."""
    folder = folder_of(tmp_path, name)
    recipe, _ = processor_recipe(folder, (32, 32))
    assert recipe.transparency == ("dropped" if name == "vit" else "white")
    processor = import_transformers().AutoImageProcessor.from_pretrained(folder)
    for shape in SHAPES:
        for kind, (given, handed) in files(picture(shape)).items():
            image = handed.convert("RGB") if name == "vit" else handed
            theirs = processor(images=image, return_tensors="np")["pixel_values"][0]
            assert difference(recipe, recipe.image_to_array(given), theirs) <= 0.01, (shape, kind)


def test_a_processor_that_leaves_sizes_alone_is_said(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_resize": False}))
    recipe, notes = processor_recipe(tmp_path, (32, 48))
    assert recipe.resize == recipe.crop == (32, 48)
    assert "pictures that are not 32x48 are resized" in notes[0]


def test_floats_that_no_code_holds_are_refused(tmp_path: Path):
    """DINOv3's class resizes floats: what a bicubic filter overshoots is not clipped."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov3_vit"}))
    settings = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": 32, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigurationError, match="not supported") as caught:
        processor_recipe(tmp_path, (32, 32))
    assert "differs from resizing ((32, 32), bicubic)" in caught.value.why


def test_other_pixels_are_refused():
    recipe = Preprocessing(resize=(8, 8), crop=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    check_pixels(recipe.image_to_array, recipe, "itself")
    darker = recipe.model_copy(update={"mean": (0.5, 0.5, 0.495)})
    sharper = recipe.model_copy(update={"interpolation": "lanczos"})
    for other in (darker, sharper):
        with pytest.raises(ConfigurationError, match="not supported") as caught:
            check_pixels(other.image_to_array, recipe, "the other")
        assert "the other differs" in caught.value.why
    with pytest.raises(ConfigurationError, match="not supported") as caught:
        check_pixels(lambda image: np.full((3, 8, 8), np.nan, np.float32), recipe, "the other")
    assert "nan of 255" in caught.value.why
