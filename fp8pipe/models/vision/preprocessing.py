"""Image preprocessing, as a configuration that is stored with the weights.

An artifact without its preprocessing is incomplete: a different crop or mean costs more accuracy than 8-bit
quantization. It is therefore a small frozen configuration, written beside the weights and read by training,
evaluation, export and serving. `write_model_file` and `read_model_file` store it, and other configurations, as JSON.

Normalization is computed in float32 and in a fixed order, ``((code / 255) - mean) / std``, where a code is an 8-bit
pixel value. It is defined only here, for numpy and torch alike. torch is imported only by the methods that use tensors,
because a server uses numpy only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.vision.resampling import KERNELS, resample

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

T = TypeVar("T", bound=BaseModel)

PREPROCESSING_FILE: Final = "preprocessing.json"
_RARE: Final = frozenset(("ratio", "anchor", "padding", "resizer", "transparency"))

Side = Annotated[int, Field(ge=1, le=16384)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Deviation = Annotated[float, Field(gt=0, le=16, allow_inf_nan=False)]
Code = Annotated[int, Field(ge=0, le=255)]
Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


class Preprocessing(FrozenConfig):
    """How an image is resized, cropped and normalized.

    16-bit greyscale images are reduced to their 8 high bits. Rarely needed fields (`ratio`, `anchor`, `padding`,
    `resizer`, `transparency`) are written only if they differ from their defaults.
    """

    resize: Side | tuple[Side, Side] | None = Field(
        description="an int: shorter side in pixels, aspect ratio kept; (height, width): see `ratio`; null: no resize"
    )
    ratio: Literal["free", "cover", "fit"] = Field(
        default="free",
        description="how a resize to (height, width) treats the aspect ratio; free: it is changed to get exactly that "
        "size; cover and fit keep it: with cover both sides are at least that long, with fit at most",
    )
    crop: tuple[Side, Side] = Field(description="(height, width) in pixels; the model's input size")
    anchor: Literal["even", "down", "corner"] = Field(
        default="even",
        description="position of the crop; even, down: centred, with half a pixel rounded to even (torchvision, timm) "
        "or down (transformers); corner: the upper left corner",
    )
    padding: tuple[Code, Code, Code] | None = Field(
        default=None, description="RGB fill colour around an image smaller than the crop; null: none can be smaller"
    )
    interpolation: Filter = Field(default="bicubic", description="Pillow's name of the resampling filter (antialiased)")
    resizer: Literal["pillow", "torchvision"] = Field(
        default="pillow",
        description="arithmetic of the resize: Pillow's, or torchvision's on 8-bit tensors, as in most processors of "
        "transformers; between the two, about 1 % of the pixel values differ by one, and a few by two",
    )
    transparency: Literal["dropped", "white"] = Field(
        default="dropped",
        description="dropped: the alpha channel is ignored, as image folders are usually read; white: the image is "
        "blended onto white, as in processors of transformers that convert to RGB themselves",
    )
    mean: tuple[Fraction, Fraction, Fraction] = Field(description="per channel, of pixel values in [0, 1]")
    std: tuple[Deviation, Deviation, Deviation] = Field(description="per channel, of pixel values in [0, 1]")
    channels: Literal["rgb"] = Field(default="rgb", description="order of the channels")
    divisor: Literal[255] = Field(default=255, description="divisor of the 8-bit pixel values, before mean and std")

    @model_validator(mode="after")
    def _crop_fits(self) -> Preprocessing:
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize or 0, self.resize or 0)
        small = self.ratio == "fit" or self.crop[0] > sides[0] or self.crop[1] > sides[1]
        if small and self.padding is None:
            raise ValueError(
                f"the crop {self.crop} can be larger than the resized image ({self.resize}), so padding must be set"
            )
        if self.ratio != "free" and not isinstance(self.resize, tuple):
            raise ValueError(f"ratio {self.ratio!r} requires resize to be (height, width), not {self.resize}")
        if self.resizer == "torchvision" and self.interpolation not in KERNELS:
            raise ValueError(f"resizer 'torchvision' supports {', '.join(KERNELS)}, not {self.interpolation}")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omits rarely needed fields at their defaults, so that files written without them keep their checksums."""
        fields = type(self).model_fields
        return {k: v for k, v in handler(self).items() if k not in _RARE or getattr(self, k) != fields[k].default}

    def codes(self, image: Image) -> np.ndarray:
        """The resized and cropped image as 8-bit RGB.

        Args:
            image: any mode and size; the EXIF orientation is applied.

        Returns:
            (3, H, W) uint8, H and W as in `crop`.

        Raises:
            ConfigurationError: the image has floating-point pixels, whose range is unknown.
        """
        from PIL import ImageOps

        rgb = self._rgb(_eight_bits(ImageOps.exif_transpose(image)))
        size = self.resized(rgb.height, rgb.width)
        if (rgb.height, rgb.width) != size:
            rgb = self._resize(rgb, size)
        return np.ascontiguousarray(np.array(self._cropped(rgb)).transpose(2, 0, 1))

    def image_to_array(self, image: Image) -> np.ndarray:
        """The model's input: (3, H, W) float32, normalized. Raises the same errors as `codes`."""
        mean, std = (np.array(v, dtype=np.float32).reshape(3, 1, 1) for v in (self.mean, self.std))
        found: np.ndarray = _normalized(self.codes(image).astype(np.float32), self.divisor, mean, std)
        return found

    def pixels(self, image: Image) -> Tensor:
        """`codes` as a uint8 tensor."""
        import torch

        return torch.from_numpy(self.codes(image))

    def image_to_tensor(self, image: Image) -> Tensor:
        """`image_to_array` as a float32 tensor."""
        import torch

        return torch.from_numpy(self.image_to_array(image))

    def normalize(self, codes: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 -> float32, normalized."""
        found: Tensor = _normalized(codes.float(), self.divisor, *self._moments(codes))
        return found

    def to_uint8(self, normalized: Tensor) -> Tensor:
        """The inverse of `normalize`, rounded to the nearest code: (..., 3, H, W) float32, normalized -> uint8."""
        import torch

        mean, std = self._moments(normalized)
        codes = (normalized.to(torch.float32) * std + mean) * self.divisor
        return codes.round().clamp(0, self.divisor).to(torch.uint8)

    def valid_range(self) -> tuple[Tensor, Tensor]:
        """The normalized values of black and white, per channel: (low, high), each (3, 1, 1) float32."""
        import torch

        black = torch.zeros(3, 1, 1, dtype=torch.uint8)
        return self.normalize(black), self.normalize(black + self.divisor)

    def resized_to(self, crop: tuple[int, int]) -> Preprocessing:
        """The same preprocessing for another crop size; `resize` is scaled in proportion."""
        if crop == self.crop:
            return self
        factors = (crop[0] / self.crop[0], crop[1] / self.crop[1])
        resize: int | tuple[int, int] | None = None
        if isinstance(self.resize, tuple):
            resize = (round(self.resize[0] * factors[0]), round(self.resize[1] * factors[1]))
        elif self.resize is not None:
            resize = max(round(self.resize * max(crop) / max(self.crop)), *crop)
        return self.model_copy(update={"crop": crop, "resize": resize})

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        mean, std = (torch.tensor(v, dtype=torch.float32, device=like.device) for v in (self.mean, self.std))
        return mean.view(3, 1, 1), std.view(3, 1, 1)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of an image after the resize, before the crop."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            if self.ratio == "free":
                return self.resize
            shrink = (height / self.resize[0], width / self.resize[1])
            factor = min(shrink) if self.ratio == "cover" else max(shrink)
            return max(1, round(height / factor)), max(1, round(width / factor))
        # Integer arithmetic, rounded down as in torchvision, so that the longer side does not depend on float rounding.
        if height <= width:
            return self.resize, self.resize * width // height
        return self.resize * height // width, self.resize

    def _rgb(self, image: Image) -> Image:
        from PIL import Image as pil

        transparent = "A" in image.getbands() or image.info.get("transparency") is not None
        if self.transparency == "white" and transparent:
            image = image.convert("RGBA")
            image = pil.alpha_composite(pil.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")

    def _resize(self, rgb: Image, size: tuple[int, int]) -> Image:
        from PIL import Image as pil

        if self.resizer == "torchvision":
            return pil.fromarray(resample(np.asarray(rgb), size, self.interpolation))
        return rgb.resize((size[1], size[0]), pil.Resampling[self.interpolation.upper()])

    def _cropped(self, rgb: Image) -> Image:
        from PIL import Image as pil

        top, left = (self._start(*sides) for sides in zip((rgb.height, rgb.width), self.crop, strict=True))
        if top >= 0 and left >= 0 and top + self.crop[0] <= rgb.height and left + self.crop[1] <= rgb.width:
            return rgb.crop((left, top, left + self.crop[1], top + self.crop[0]))
        canvas = pil.new("RGB", (self.crop[1], self.crop[0]), self.padding or (0, 0, 0))
        canvas.paste(rgb, (-left, -top))
        return canvas

    def _start(self, size: int, crop: int) -> int:
        """Start of the crop along one axis; negative if the image is smaller than the crop."""
        if self.anchor == "corner":
            return 0
        if size < crop:
            return -((crop - size) // 2)
        return round((size - crop) / 2) if self.anchor == "even" else (size - crop) // 2


def _normalized(codes: Any, divisor: int, mean: Any, std: Any) -> Any:
    """Normalize float32 arrays or tensors."""
    return (codes / divisor - mean) / std


def _eight_bits(image: Image) -> Image:
    """An image with 8-bit channels; Pillow's own conversion would clip 16-bit greyscale images to white."""
    from PIL import Image as pil

    if image.mode == "F":
        raise ConfigurationError(
            "images with floating-point pixels are not supported",
            why="the range of the pixel values is unknown",
            fix="save it with 8 or 16 bits per channel",
        )
    if not image.mode.startswith("I"):
        return image
    # Pillow opens some 16-bit greyscale files in mode "I".
    values = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
    return pil.fromarray(values.astype(np.uint8))


def write_model_file(config: BaseModel, path: Path) -> None:
    """Write a pydantic model as JSON."""
    path.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_model_file(cls: type[T], path: Path) -> T:
    """Read a pydantic model of type `cls` from a JSON file.

    Raises:
        BadArtifactError: the file is missing, or not a valid `cls`.
    """
    try:
        return cls.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        why = (
            "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
            if isinstance(error, ValidationError)
            else f"{type(error).__name__}: {error}"
        )
        raise BadArtifactError(
            f"{path} is not a valid {cls.__name__}", why=why, fix="write the directory again"
        ) from error
