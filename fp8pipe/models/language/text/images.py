"""Images in the content of messages: the forms in which data gives them, where their files are, how they are opened.

In a message's content each image is the character `IMAGE_PLACEHOLDER`, which Unicode has for an object embedded in
text, so that everything that works on texts keeps the images' places. An image is given by its source: the path of a
file, or a `data:` URI. Nothing is downloaded. Files are opened when their pixels are needed, one batch at a time.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text.conversation import ImagePart

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_PLACEHOLDER: Final = "\ufffc"
IMAGE_TYPES: Final = ("image", "image_url")
_KEYS: Final = ("image", "url", "path", "image_url")
NO_SOURCE: Final = f"an image part must name one file, as text, in {', '.join(map(repr, _KEYS))}"
_INLINE: Final = "data:"
_SHOWN: Final = 60  # characters of a source in messages: data URIs are long


def image_source(part: Mapping[str, Any]) -> str:
    """The source of a part of type `image` or `image_url`: a path as given, or a `data:` URI.

    It is empty if the part only marks the place of an image (`image_column`).

    Raises:
        ValueError: the part names several images, not as text, or one on a server; the message says what to do.
    """
    given = [part[key] for key in _KEYS if part.get(key) is not None]
    value = given[0].get("url") if len(given) == 1 and isinstance(given[0], Mapping) else given[0] if given else None
    if not given:
        return ""
    if len(given) != 1 or not isinstance(value, str) or not value.strip():
        raise ValueError(NO_SOURCE)
    scheme = value.partition(":")[0].lower() if "://" in value[:16] else ""
    if scheme == "file":
        return unquote(urlsplit(value).path)
    if scheme:
        raise ValueError(f"the image {value[:_SHOWN]!r} is on a server; download it and give the path of the file")
    return value


def unread_keys(part: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a part of type `image` or `image_url` that nothing reads, such as OpenAI's `detail`."""
    inside = [value for key in _KEYS if isinstance(value := part.get(key), Mapping)]
    keys = [key for key, value in part.items() if value is not None and key not in ("type", *_KEYS)]
    keys += [key for each in inside for key, value in each.items() if value is not None and key != "url"]
    return tuple(map(str, keys))


def located(source: str, folder: Path) -> str:
    """A source whose relative path is resolved against `folder`, the folder of the data file.

    Raises:
        ValueError: there is no such file.
    """
    if source[: len(_INLINE)].lower() == _INLINE:
        return _INLINE + source[len(_INLINE) :]
    try:
        path = (folder / Path(source).expanduser()).absolute()
        there = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, of an unknown user, with a NUL
        raise ValueError(f"{source[:_SHOWN]!r} is no path; base64 is given as data:image/png;base64,...") from error
    if not there:
        raise ValueError(f"there is no image file {path} (relative paths start at the folder of the data file)")
    return str(path)


def image_bytes(part: ImagePart) -> bytes:
    """The bytes of an image file or `data:` URI.

    Raises:
        ConfigurationError: the file is missing or unreadable, or the URI is not base64.
    """
    try:
        if part.source.startswith(_INLINE):
            return base64.b64decode(part.source.partition(",")[2], validate=True)
        return Path(part.source).read_bytes()
    except (OSError, binascii.Error) as error:
        raise _unusable(part, f"{type(error).__name__}: {error}") from error


def open_image(part: ImagePart, content: bytes) -> Image:
    """An image as it will be served: upright, in RGB, and on white where it is transparent.

    That is how vLLM opens images. (transformers' own loader drops the transparency, which shows the colours beneath.)

    Args:
        part: the image, for error messages.
        content: its `image_bytes`.

    Raises:
        ConfigurationError: the image is damaged, of a format that PIL does not read, or has several frames.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            # Cameras append previews to a JPEG, which PIL calls MPO; its first frame is the picture.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames == 1:
                upright = ImageOps.exif_transpose(image)
                if upright.mode == "RGB" or not upright.has_transparency_data:
                    return upright.convert("RGB")
                colours, white = upright.convert("RGBA"), Image.new("RGB", upright.size, "white")
                white.paste(colours, mask=colours.getchannel("A"))
                return white
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise any type
        raise _unusable(part, f"{type(error).__name__}: {error}") from error
    raise _unusable(part, f"it is animated: it has {frames} frames, and one would be chosen silently")


def _unusable(part: ImagePart, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"the image of {part.place} cannot be used: {part.source[:_SHOWN]}"
        f"{'...' if part.source.startswith(_INLINE) else part.source[_SHOWN:]}",
        why=why.replace("<_io.BytesIO object", "<the file")[:300],
        fix="give a still image that opens: PNG, JPEG, WebP and other formats of Pillow",
    )
