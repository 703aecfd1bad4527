"""Images that a record holds in a field beside its messages, which only mark their places.

Data sets for transformers and TRL mark a place by a part `{"type": "image"}` that names no file, those for LLaVA and
LLaMA-Factory by `<image>` in the text. The images belong to these places in order.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from fp8pipe.models.language.text.conversation import ImagePart, Message
from fp8pipe.models.language.text.images import IMAGE_PLACEHOLDER, NO_SOURCE, image_source

_FIELDS: Final = ("images", "image")
_MARK: Final = "<image>"
_PLACES: Final = re.compile(f"{IMAGE_PLACEHOLDER}|{_MARK}")


def with_images(messages: Sequence[Message], row: Mapping[str, Any]) -> tuple[list[Message], str]:
    """The messages with the images of the record's field in the places for them, and the name of the field.

    A field `image` is left alone if the messages have no place for it: text may be data about images, too.

    Args:
        messages: of the record; images that name no file have an empty source.
        row: the record.

    Returns:
        The messages, and the name of the field whose images they hold; an empty name if there is none.

    Raises:
        ValueError: the numbers of images and of places differ, an image is not given in a known form, or an image part
            names no file and there is no field with images.
    """
    field = next((name for name in _FIELDS if row.get(name) not in (None, "", [], {})), "")
    bare = next((part for message in messages for part in message.images if not part.source), None)
    if not field and bare is not None:
        raise ValueError(f"{bare.place}: {NO_SOURCE}, or the record must have a field 'images'")
    marked = any(message.role != "assistant" and _MARK in message.content for message in messages)
    if not field or (field == "image" and bare is None and not marked):
        return list(messages), ""
    images = [ImagePart(source, f"{field}[{number}]") for number, source in enumerate(_sources(field, row[field]))]
    found, taken = [], 0
    for message in messages:
        parts = _parts(message)
        places = parts.count(None)
        given = iter(images[taken : taken + places])
        taken += places
        content = message.content if message.role == "assistant" else message.content.replace(_MARK, IMAGE_PLACEHOLDER)
        filled = tuple(part or next(given, None) for part in parts)
        found.append(replace(message, content=content, images=tuple(part for part in filled if part is not None)))
    if taken != len(images):
        raise ValueError(
            f"{field!r} holds {len(images)} image(s), and its messages have {taken} place(s) for them: give each image "
            f'a part {{"type": "image"}} or {_MARK} in the text, or leave the field out'
        )
    return found, field


def _parts(message: Message) -> list[ImagePart | None]:
    """The images of a message in order; None for those of the record's field."""
    if message.role == "assistant":
        return [*message.images]
    own = iter(message.images)
    found: list[ImagePart | None] = []
    for match in _PLACES.findall(message.content):
        part = None if match == _MARK else next(own, None)
        if match == _MARK or part is not None:  # else the character is text, which the caller refuses
            found.append(part if part is not None and part.source else None)
    return found


def _sources(field: str, value: Any) -> list[str]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{field!r} is text that is not valid JSON: {error}") from error
    items = value if isinstance(value, list) else [value]
    return [_source(item, f"{field}[{number}]") for number, item in enumerate(items)]


def _source(item: Any, place: str) -> str:
    """The source of one image: the path of a file, a `data:` URI, or bytes, as such or as the package datasets has."""
    if isinstance(item, Mapping):
        item = next((item[key] for key in ("bytes", "path", "url") if item.get(key)), None)
    if isinstance(item, bytes):
        return f"data:;base64,{base64.b64encode(item).decode()}"
    try:
        source = image_source({"image": item})
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not source:
        raise ValueError(f"{place}: an image is the path of a file, a data: URI, or an object with bytes or a path")
    return source
