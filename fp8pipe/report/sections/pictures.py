"""The calibration images of a vision transformer, and the quantized model's attention on them.

Only the artifact's own files are read; no other model is loaded. Attention maps (the last attention layer, overlaid on
an image) are computed when the report is written.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.artifact.kinds import VIT_KIND, VitDetails
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError, word
from fp8pipe.report.blocks import Block, Missing, Picture, Pictures, Text
from fp8pipe.report.figures import Form
from fp8pipe.report.subject import Item, Subject

if TYPE_CHECKING:
    from torch import Tensor

    from fp8pipe.models.vision.structure import AttentionSite

SHEET = "calibration/contact_sheet.png"
IMAGES = "calibration/images.safetensors"
_SHOWN = 4
_WIDEST, _LARGEST = 900, 300_000
_SIDE = 168
_TINT = (240, 84, 30)
_METHODS = {
    "images": "real pictures from a folder",
    "synthetic": "synthetic, made from the model alone",
    "gaussian": "Gaussian noise",
    "patch-similarity": "synthetic, by patch similarity",
}


def pictures(subject: Subject) -> Iterator[Block]:
    """The images, and attention maps for some of them."""
    for item in subject.of_kind(VIT_KIND):
        yield from _pictures(subject, item)


def _pictures(subject: Subject, item: Item) -> Iterator[Block]:
    documents = subject.documents
    count = documents.figure(item.manifest, "details", "images", form=Form.COUNT)
    seconds = documents.figure(item.manifest, "details", "seconds_per_image")
    method = item.artifact.manifest.details_of(VitDetails).image_method
    parts: list[Any] = [count or "No", f" images, method: {_METHODS.get(method, method)}."]
    if seconds is not None and seconds.value:
        parts += [" Seconds per image: ", seconds, "."]
    yield Text(parts, item.name)
    if item.has(SHEET):
        sheet, smaller = _sheet(item.artifact.root / SHEET)
        caption = f"Contact sheet of the first images{', reduced here' if smaller else ''}."
        yield Pictures([Picture(sheet, f"Contact sheet of {item.name}", caption, item.file(SHEET), wide=True)])
    else:
        yield Missing(f"{item.name} holds no contact sheet.", "fp8pipe quantize-vit")
    yield from _attention(subject, item)


def _attention(subject: Subject, item: Item) -> Iterator[Block]:
    if not item.has(IMAGES):
        yield Missing(f"{item.name} holds no calibration images to look at.", "fp8pipe quantize-vit")
        return
    from safetensors.torch import load_file

    root = item.artifact.root
    given = None if subject.image is None else _read_image(root, subject.image)
    try:
        made = _attention_maps(root, load_file(root / IMAGES)["images"][: _SHOWN - (given is not None)])
        real = [] if given is None else _attention_maps(root, given)
    except Fp8PipeError as error:
        yield Missing(f"Attention could not be computed: {error.what}. {error.why}.", error.fix)
        return
    if not made:
        yield Text(["This model attends within windows or pools: there is no map over the whole image."])
        return
    shown = [_picture(found, f"calibration image {i}", item.file(IMAGES)) for i, found in enumerate(made)]
    shown += [_picture(found, "the picture that was given", str(subject.image)) for found in real]
    token = "of the class token" if made[0].of_class_token else "of all tokens, their mean"
    where = f"Attention {token} in {made[0].layer}, mean of its heads; computed from the artifact's codes."
    yield Pictures(shown, f"{where} The stronger the colour, the higher the attention.")
    if subject.image is None:
        yield Missing("No real image is shown for comparison.", f"fp8pipe report {word(subject.path)} --image PICTURE")


def _picture(found: _AttentionMap, what: str, source: str) -> Picture:
    return Picture(_url(found.png, "png"), f"{what}, and attention over it", what, source)


def _sheet(path: Path) -> tuple[str, bool]:
    """The contact sheet as a data URL, and whether it was reduced.

    A file of at most 300,000 bytes is used unchanged, a larger one as a JPEG at most 900 pixels wide.
    """
    stored = path.read_bytes()
    if len(stored) <= _LARGEST:
        return _url(stored, "png"), False
    from PIL import Image

    with Image.open(path) as opened:
        sheet = opened.convert("RGB")
    if sheet.width > _WIDEST:
        sheet = sheet.resize((_WIDEST, sheet.height * _WIDEST // sheet.width), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    sheet.save(stream, "JPEG", quality=82, optimize=True)
    return _url(stream.getvalue(), "jpeg"), True


def _url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True, slots=True)
class _AttentionMap:
    """One image and its attention map."""

    png: bytes  # the image, and the image with its map overlaid, side by side
    layer: str  # name of the attention layer
    of_class_token: bool  # True: attention of the class token; False: mean over all tokens


def _attention_maps(root: Path, pixels: Tensor) -> list[_AttentionMap]:
    """Attention maps of images `(N, 3, H, W)` uint8, at the input size of the model in a `vit` artifact's directory.

    Returns:
        One per image; none if the model has no global attention (windows, pooling).

    Raises:
        BadArtifactError: the directory contains no quantized model.
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
        _AttentionMap(_overlay(image, found), site.name, site.prefix_tokens > 0)
        for image, found in zip(pixels, maps, strict=True)
    ]


def _read_image(root: Path, path: Path) -> Tensor:
    """Read an image and apply the artifact's preprocessing, without normalization; `(1, 3, H, W)` uint8.

    Raises:
        ConfigurationError: the image cannot be read.
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
    """Attention over the image patches, `(N, rows, columns)`, each map scaled to the range 0 to 1.

    Args:
        probs: attention probabilities, mean over the heads, `(N, T, T)` (query, key).
        site: the attention layer, which defines the patch grid and the number of prefix tokens.
    """
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
