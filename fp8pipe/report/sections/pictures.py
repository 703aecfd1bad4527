"""The images that calibrated a vision transformer, and where the quantized model looks in them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp8pipe.artifact.kinds import VIT_KIND, VitDetails
from fp8pipe.core.errors import Fp8PipeError
from fp8pipe.report.attention_maps import AttentionMap, attention_maps, read_image
from fp8pipe.report.blocks import Block, Missing, Picture, Pictures, Section, Text
from fp8pipe.report.figures import Form
from fp8pipe.report.subject import Item, Subject

__all__ = ["section"]

SHEET = "calibration/contact_sheet.png"
IMAGES = "calibration/images.safetensors"
_SHOWN = 4
_WIDEST, _LARGEST = 900, 300_000


def section(subject: Subject) -> Section:
    """The section."""
    blocks: list[Block] = []
    for item in subject.of_kind(VIT_KIND):
        blocks += list(_pictures(subject, item))
    if not blocks:
        text = "Nothing here was calibrated with images: they are part of quantizing a vision transformer."
        blocks.append(Missing(text, "fp8pipe quantize-vit"))
    return Section("images", "Calibration images", "What the low-bit model was fitted to.", blocks)


def _pictures(subject: Subject, item: Item) -> Iterator[Block]:
    documents = subject.documents
    count = documents.figure(item.manifest, "details", "images", form=Form.COUNT)
    seconds = documents.figure(item.manifest, "details", "seconds_per_image")
    method = item.artifact.manifest.details_of(VitDetails).image_method
    parts: list[Any] = [count or "No", f" images, method: {_METHODS.get(method, method)}."]
    if seconds is not None and seconds.value:
        parts += [" Seconds an image: ", seconds, "."]
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
    given = None if subject.image is None else read_image(root, subject.image)
    try:
        made = attention_maps(root, load_file(root / IMAGES)["images"][: _SHOWN - (given is not None)])
        real = [] if given is None else attention_maps(root, given)
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
    yield Pictures(shown, f"{where} The stronger the colour, the more is read there.")
    if subject.image is None:
        yield Missing("No real image stands beside them.", f"fp8pipe report {subject.path} --image PICTURE")


def _picture(found: AttentionMap, what: str, source: str) -> Picture:
    return Picture(_url(found.png, "png"), f"{what}, and attention over it", what, source)


def _sheet(path: Path) -> tuple[str, bool]:
    """The sheet as it is where it is small; else a JPEG of at most 900 pixels' width."""
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


_METHODS = {
    "images": "real pictures from a folder",
    "synthetic": "synthetic, made from the model alone",
    "gaussian": "Gaussian noise",
    "patch-similarity": "synthetic, by patch similarity",
}
