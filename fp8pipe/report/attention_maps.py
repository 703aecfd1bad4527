"""Where the quantized model looks: the last attention of some images, laid over them.

Nothing is read from a live model but the artifact's own files; the map is computed when the report is written.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.core.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

    from fp8pipe.models.vision.structure import AttentionSite

__all__ = ["AttentionMap", "attention_maps", "read_image"]

_SIDE = 168
_TINT = (240, 84, 30)


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """One image and its map.

    Attributes:
        png: the image, and the image under its map, side by side.
        layer: the attention's name.
        heads: over which the mean is taken.
        of_class_token: whether it is the class token's attention; else the mean over all tokens'.
    """

    png: bytes
    layer: str
    heads: int
    of_class_token: bool


def attention_maps(root: Path, pixels: Tensor) -> list[AttentionMap]:
    """Maps of some images.

    Args:
        root: directory of a `vit` artifact.
        pixels: `(N, 3, H, W)` uint8, of the model's size.

    Returns:
        One an image; none where the model has no attention over the whole image (windows, pooling).

    Raises:
        BadArtifactError: no quantized model in it.
        MissingCapabilityError: the library that builds it is not installed.
    """
    import torch

    from fp8pipe.models.vision.quantized import load_quantized

    quantized = load_quantized(root)
    sites = [site for site in quantized.structure.attentions if site.windows == 1 and not site.pools]
    if not sites:
        return []
    site = sites[-1]
    with torch.no_grad():
        probs = quantized.taps(quantized.preprocessing.normalize(pixels))[site.name]["probs_in"]  # (N, H, T, T)
    maps = _of_patches(probs.mean(1), site)
    return [
        AttentionMap(_overlay(image, found), site.name, site.heads, site.prefix_tokens > 0)
        for image, found in zip(pixels, maps, strict=True)
    ]


def read_image(root: Path, path: Path) -> Tensor:
    """A picture as the model of an artifact sees it, `(1, 3, H, W)` uint8.

    Raises:
        ConfigurationError: it cannot be read.
    """
    from PIL import Image

    from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, Preprocessing, read_model_file

    preprocessing = read_model_file(Preprocessing, root / PREPROCESSING_FILE)
    try:
        with Image.open(path) as opened:
            return preprocessing.pixels(opened)[None]
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read as a picture", why=str(error), fix="give a PNG or JPEG file"
        ) from error


def _of_patches(probs: Tensor, site: AttentionSite) -> Tensor:
    """`(N, T, T)` probabilities to `(N, rows, columns)`, each map from 0 to 1."""
    rows, columns = site.grid
    queries = probs[:, 0] if site.prefix_tokens else probs.mean(1)
    maps = queries[:, site.prefix_tokens :]
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    return ((maps - low) / (high - low).clamp(min=1e-12)).reshape(-1, rows, columns)


def _overlay(image: Tensor, found: Tensor) -> bytes:
    from PIL import Image

    size = (_SIDE, _SIDE * image.shape[1] // image.shape[2])
    picture: Any = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize(size, Image.Resampling.BICUBIC)
    mask = Image.fromarray((found * 200).round().byte().numpy()).resize(size, Image.Resampling.BICUBIC)
    grey = picture.convert("L").convert("RGB")
    grey.paste(Image.new("RGB", size, _TINT), (0, 0), mask)
    both = Image.new("RGB", (2 * size[0], size[1]))
    both.paste(picture, (0, 0))
    both.paste(grey, (size[0], 0))
    stream = io.BytesIO()
    both.quantize(128).save(stream, "PNG", optimize=True)
    return stream.getvalue()
