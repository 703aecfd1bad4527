"""Translates a checkpoint's own image preprocessing to a `Preprocessing` recipe, and verifies it pixel by pixel.

The recipe is derived from the settings of the image processor. Then the processor and the recipe are applied to the
same test images, and it is an error if their pixels differ. Processor classes that work in another way (in another
order, with another crop) are thus detected without knowing them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError, class_and_first_line, first_line
from fp8pipe.models.checkpoint.sidecars import read_config
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.resampling import KERNELS

if TYPE_CHECKING:
    from PIL.Image import Image

Own = Callable[["Image"], np.ndarray]

_FILTERS: Final = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Sizes (height, width) of the test images: wide, tall, and larger than most models' input.
_PICTURES: Final = ((90, 161), (161, 90), (431, 560))
# Largest accepted difference, in 8-bit steps. Results of torchvision's bilinear filter can differ by one step between
# CPUs: without SIMD, it rounds only once, after both passes.
_TOLERANCE: Final = 1.02
_CHANNELS: Final = 3


def processor_recipe(folder: Path, size: tuple[int, int]) -> tuple[Preprocessing, tuple[str, ...]]:
    """The recipe of the image processor in a transformers directory, with notes for the user.

    Args:
        folder: contains the processor's settings and the model's config.json.
        size: (height, width) from the model's configuration, for processors that do not set a size.

    Raises:
        ConfigurationError: the processor cannot be loaded, or no recipe reproduces its pixels.
        MissingCapabilityError: a package that the processor needs is not installed.
    """
    processor, notes = _load(folder)
    pictures: tuple[tuple[int, int], ...] = _PICTURES
    if not processor.do_resize and not processor.do_center_crop:
        pictures = (size,)
        notes += (f"the image processor does not resize: pictures that are not {_shown(size)} are resized to it",)
    recipe = _recipe(processor, size)

    def own(image: Image) -> np.ndarray:
        return np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0])

    check_pixels(own, recipe, type(processor).__name__, pictures)
    return _with_transparency(own, recipe, pictures[0]), notes


def timm_recipe(config: dict[str, Any], size: tuple[int, int]) -> Preprocessing:
    """The recipe of timm's evaluation transform.

    The image is resized to the final size divided by `crop_pct`, rounded down for each side separately, and cropped.

    Args:
        config: timm's data configuration of the model.
        size: (height, width) of the final images, in pixels.

    Raises:
        ConfigurationError: no recipe reproduces the transform's pixels.
    """
    from timm.data.transforms_factory import create_transform

    fraction, mode = float(config["crop_pct"]), config["crop_mode"]
    sides = (math.floor(size[0] / fraction), math.floor(size[1] / fraction))
    values = {"resize": sides, "crop": size} | {key: config[key] for key in ("interpolation", "mean", "std")}
    if mode == "border":
        values |= {"ratio": "fit", "padding": tuple(round(255 * value) for value in config["mean"])}
    elif mode != "squash" and sides[0] == sides[1]:
        values["resize"] = sides[0]
    elif mode != "squash":
        values["ratio"] = "cover"
    if mode != "border" and (sides[0] < size[0] or sides[1] < size[1]):
        values["padding"] = (0, 0, 0)
    _check_channels(config["mean"], config["std"])
    recipe = build_config(Preprocessing, values)
    transform = create_transform(**{**config, "input_size": (_CHANNELS, *size)}, is_training=False)
    check_pixels(lambda image: np.asarray(transform(image)), recipe, f"timm's transform with crop mode {mode}")
    return recipe


def check_pixels(own: Own, recipe: Preprocessing, name: str, pictures: tuple[tuple[int, int], ...] = _PICTURES) -> None:
    """Compare a recipe with a checkpoint's own preprocessing on test images.

    Args:
        own: the checkpoint's preprocessing; returns a normalized image (3, H, W) float32.
        recipe: the recipe to check.
        name: name of the checkpoint's preprocessing in error messages.
        pictures: (height, width) of each test image.

    Raises:
        ConfigurationError: `own` fails, or pixels differ by more than one 8-bit code.
    """
    for size in pictures:
        image = probe_picture(size)
        try:
            theirs, why = own(image), ""
        except Exception as error:  # third-party code, which may raise any type
            theirs, why = np.zeros(0), f"{name} fails: {class_and_first_line(error)}"
        ours = recipe.image_to_array(image)
        if not why and theirs.shape != ours.shape:
            why = f"{name} makes {theirs.shape} of a picture of {_shown(size)} pixels, expected {ours.shape}"
        elif not why:
            apart = _apart(recipe, ours, theirs)
            if not apart <= _TOLERANCE:
                done = f"resizing ({recipe.resize}, {recipe.interpolation}) and cropping {_shown(recipe.crop)}"
                why = f"{name} differs from {done} by {apart:.1f} of 255 in a picture of {_shown(size)} pixels"
        if why:
            raise _unsupported(why)


def _apart(recipe: Preprocessing, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference between two normalized images, in 8-bit steps; NaN if a value is NaN."""
    return float(np.max(np.abs(theirs - ours) * np.array(recipe.std).reshape(-1, 1, 1) * recipe.divisor))


def _with_transparency(own: Own, recipe: Preprocessing, size: tuple[int, int]) -> Preprocessing:
    """The recipe, changed to make transparent areas white if the processor does so for a test image of `size`.

    Whether it does depends on the processor and on the version of transformers.
    """
    from PIL import Image

    image = probe_picture(size)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    try:
        theirs = own(image)
    except Exception:  # the processor accepts only RGB images, so transparency does not matter
        return recipe
    white = recipe.model_copy(update={"transparency": "white"})
    ours = white.image_to_array(image)
    return white if theirs.shape == ours.shape and _apart(white, ours, theirs) <= _TOLERANCE else recipe


def probe_picture(size: tuple[int, int]) -> Image:
    """A test image of (height, width), identical in every run.

    Its waves and noise cover all 8-bit values, so that resampling filters overshoot at both ends of the range.
    """
    from PIL import Image

    rows, columns = np.mgrid[: size[0], : size[1]]
    waves = np.stack([np.sin(rows / 9 + phase) + np.cos(columns / 7 - phase) for phase in (0, 1, 2)], axis=2)
    noise = np.random.default_rng(0).uniform(-60, 60, waves.shape)
    return Image.fromarray((128 + 64 * waves + noise).clip(0, 255).astype(np.uint8))


def _load(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """Load the image processor of a directory; returns it with notes for the user."""
    transformers = import_transformers()
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        try:
            return transformers.AutoImageProcessor.from_pretrained(folder, **local), ()
        except ValueError:
            if _names_a_class(folder):
                raise
            # transformers has no default processor class for the vision towers of some larger models.
            note = "no class of image processors is named: its settings are read as ViTImageProcessor's"
            return transformers.ViTImageProcessor.from_pretrained(folder, **local), (note,)
    except ImportError as error:
        raise MissingCapabilityError(
            f"the image processor of {folder} needs another package",
            why=first_line(error),
            fix="pip install 'fp8pipe[vit]'",
        ) from error
    except Exception as error:  # third-party code, which may raise any type
        why = f"transformers cannot load it: {class_and_first_line(error)}"
        raise _unsupported(why[:300]) from error


def _names_a_class(folder: Path) -> bool:
    path = folder / "preprocessor_config.json"
    written = read_config(path) if path.is_file() else {}
    return any(written.get(key) for key in ("image_processor_type", "feature_extractor_type", "auto_map"))


def _recipe(processor: Any, size: tuple[int, int]) -> Preprocessing:
    filter_code = 2 if processor.resample is None else int(processor.resample)
    if filter_code not in _FILTERS:
        raise _unsupported(f"resample {filter_code}")
    values = {**_places(processor, size), "interpolation": _FILTERS[filter_code], **_moments(processor)}
    by_torchvision = processor.do_resize and getattr(processor, "backend", "") == "torchvision"
    if by_torchvision and values["interpolation"] in KERNELS:
        values["resizer"] = "torchvision"
    return build_config(Preprocessing, values)


def _places(processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """The fields of the recipe for the geometry: resizing, cropping and padding."""
    resize: int | tuple[int, int] | None = _size(processor.size) if processor.do_resize else None
    found: dict[str, Any] = {}
    if processor.do_center_crop:
        crop = _size(processor.crop_size)
    else:
        crop = size if resize is None else resize
        resize = crop
    if isinstance(crop, int):
        raise _unsupported("it resizes the shorter side and crops nothing: pictures of different sizes come out")
    if resize != crop:
        found["anchor"] = "down"
    sides = resize if isinstance(resize, tuple) else (resize or 0,) * 2
    if sides[0] < crop[0] or sides[1] < crop[1]:
        found["padding"] = (0, 0, 0)
    padded = getattr(processor, "pad_size", None)
    if getattr(processor, "do_pad", None) and padded and (whole := _size(padded)) != crop:
        if found:
            raise _unsupported("it pads after a crop")
        # The processor pads with zeros after normalization, which equals padding with the mean colour before it.
        mean = _triple(processor.image_mean if processor.do_normalize else 0.0)
        found = {"anchor": "corner", "padding": tuple(round(255 * value) for value in mean)}
        crop = whole
    return {"resize": resize, "crop": crop, **found}


def _size(size: Any) -> int | tuple[int, int]:
    """A size in a processor's settings, as an int for the shorter side or as (height, width)."""
    given = dict(size or {})
    if set(given) == {"height", "width"}:
        return int(given["height"]), int(given["width"])
    if set(given) == {"shortest_edge"}:
        return int(given["shortest_edge"])
    raise _unsupported(f"a size of {given or 'nothing'}; height and width, or shortest_edge, can be read")


def _moments(processor: Any) -> dict[str, Any]:
    """Mean and standard deviation for pixels from 0 to 1, adjusted for a rescale factor other than 1/255."""
    given = (processor.image_mean or 0.0, processor.image_std or 1.0)
    mean, std = given if processor.do_normalize else (0.0, 1.0)
    _check_channels(mean, std)
    factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
    whole = 1.0 if abs(factor * 255 - 1) <= 1e-6 else factor * 255
    return {"mean": tuple(v / whole for v in _triple(mean)), "std": tuple(v / whole for v in _triple(std))}


def _check_channels(mean: Any, std: Any) -> None:
    for name, values in (("mean", mean), ("deviation", std)):
        if len(_triple(values)) != _CHANNELS:
            raise _unsupported(f"a {name} of {len(values)} channels, and images have three: red, green, blue")


def _triple(values: Any) -> tuple[float, ...]:
    try:
        return (float(values),) * _CHANNELS if isinstance(values, int | float) else tuple(float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise _unsupported(f"mean or deviation is {values!r}, not one number per channel") from error


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _unsupported(why: str) -> ConfigurationError:
    return ConfigurationError(
        "this model's preprocessing is not supported",
        why=why,
        fix="save a processor that resizes, crops the centre, rescales and normalizes three channels, and nothing else",
    )
