"""Request bodies and their OpenAPI schemas: images as multipart, raw bytes or base64 in JSON, optionally compressed.

Requests and responses may be compressed with gzip or deflate, as Triton's client does. The decompressed size is limited
while decompressing, since a few kilobytes can expand to gigabytes. A body must be exactly one compressed stream; bytes
after its end are rejected.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import zlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Final

from fastapi import Request
from pydantic_core import from_json
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from fp8pipe.core.errors import first_line
from serving.http.problems import Problem, too_many_images

_FILE_FIELDS: Final = frozenset(("image", "images", "file", "files"))
_IN_MEMORY_BYTES: Final = 1 << 40
# zlib's `wbits` values, which select the format: gzip, and deflate in the sense of HTTP (a zlib stream).
_WINDOWS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}


@dataclass(frozen=True, slots=True)
class ImagesRequest:
    """The parsed body of an image request."""

    images: list[bytes]  # the bytes of each image file
    top_k: Any = None  # number of classes to return; None if the body does not say


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the complete body, and decompress it to at most `max_bytes`; the limits of the middleware apply too.

    Raises:
        Problem: the body is too large, too slow, damaged, truncated, or has an unsupported encoding.
    """
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise Problem(400, "disconnected", "the connection ended before the body did") from error
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    body = await asyncio.get_running_loop().run_in_executor(None, decompress, body, encoding, max_bytes)
    request.scope["state"]["body_account"].take(len(body))
    return body


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decompress a body; `encoding` is the value of Content-Encoding.

    Raises:
        Problem: 415, unsupported encoding; 413, larger than `max_bytes`; 400, damaged or truncated.
    """
    window = _WINDOWS.get(encoding)
    if window is None:
        what = f"bodies in the encoding {encoding[:40]!a} are not read"
        raise Problem(415, "unsupported_encoding", what, "use gzip, deflate, or none")
    stream = zlib.decompressobj(window)
    try:
        found = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise Problem(400, "damaged_body", f"the body is not valid {encoding}", "send it again") from error
    if len(found) > max_bytes:
        what = f"the body is larger than {max_bytes / 1e6:g} MB when decompressed"
        raise Problem(413, "body_too_large", what, "send smaller or fewer images")
    if not stream.eof or stream.unused_data:
        raise Problem(
            400, "damaged_body", f"the body is not one whole {encoding} stream", "send exactly one complete stream"
        )
    return found


def compress(body: bytes, encoding: str) -> bytes:
    """Compress `body` with gzip or deflate, at the fastest level, since the client is waiting."""
    stream = zlib.compressobj(1, zlib.DEFLATED, _WINDOWS[encoding])
    return stream.compress(body) + stream.flush()


def accepted_encoding(header: str | None) -> str | None:
    """Choose gzip or deflate, whichever comes first in the Accept-Encoding header; None if neither is accepted."""
    for part in (header or "")[:1000].lower().split(","):
        name, _, parameters = part.partition(";")
        weight = parameters.replace(" ", "").removeprefix("q=")
        if name.strip() in ("gzip", "deflate") and not (weight and weight.strip("0.") == ""):
            return name.strip()
    return None


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object.

    Raises:
        Problem: 400, the body is not valid JSON (or too deeply nested, not UTF-8, ...), or not an object.
    """
    try:
        document = from_json(body)
    except (ValueError, RecursionError, OverflowError) as error:
        message = first_line(error)[:200].encode("ascii", "replace").decode()
        raise Problem(400, "invalid_json", f"the body is not valid JSON: {message}") from error
    if not isinstance(document, dict):
        raise Problem(400, "invalid_json", f"the body is a JSON {type(document).__name__}, not an object")
    return document


async def read_images(request: Request, max_bytes: int, max_images: int) -> ImagesRequest:
    """Read the images of a request, still encoded; at most `max_images`, in a body of at most `max_bytes`.

    Raises:
        Problem: 4xx, the body cannot be read, is of another type, or has no images or too many.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await read_body(request, max_bytes)
    if kind == "multipart/form-data":
        found = await _multipart(request, body, max_images)
    elif kind == "application/json":
        found = _json(parse_json(body), max_images)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        found = ImagesRequest([body])
    else:
        fix = "send multipart/form-data, application/json, or the image's bytes as image/* or application/octet-stream"
        raise Problem(415, "unsupported_media_type", f"the content type {kind[:80] or '(none)'} is not supported", fix)
    if not found.images:
        raise Problem(400, "no_images", "the request holds no image", "put it into the field 'image'")
    if len(found.images) > max_images:
        raise too_many_images(max_images)
    return found


def _json(document: dict[str, Any], max_images: int) -> ImagesRequest:
    # The images and top_k of a JSON body.
    unknown = sorted(set(document) - {"image", "images", "top_k"})
    if unknown:
        raise Problem(400, "unknown_field", f"unknown field {unknown[0][:60]!a}", "fields: image, images, top_k")
    texts = document.get("images", [])
    if not isinstance(texts, list):
        raise Problem(400, "invalid_images", "'images' is not a list", "give a list of base64 strings")
    texts = ([document["image"]] if "image" in document else []) + texts
    if len(texts) > max_images:
        raise too_many_images(max_images)
    return ImagesRequest([_decode(text, index) for index, text in enumerate(texts)], document.get("top_k"))


def _decode(text: Any, index: int) -> bytes:
    # Decode one image from base64 or a data URL.
    if not isinstance(text, str):
        raise Problem(400, "invalid_base64", f"image {index} is not a string", "give base64")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        what = f"image {index} is not valid base64"
        raise Problem(400, "invalid_base64", what, "give the file's bytes in base64") from error


async def _multipart(request: Request, body: bytes, max_images: int) -> ImagesRequest:
    # The images and top_k of a multipart body.
    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, once(), max_files=max_images, max_fields=16)
    parser.spool_max_size = _IN_MEMORY_BYTES  # no temporary files: the root file system may be read-only
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise too_many_images(max_images) from error
        raise Problem(400, "invalid_multipart", f"the multipart body cannot be read: {error.message[:200]}") from error
    except Exception as error:  # part headers in unknown encodings raise LookupError, UnicodeDecodeError, KeyError
        raise Problem(400, "invalid_multipart", "the multipart body cannot be read") from error
    images, top_k = [], None
    for name, value in form.multi_items():
        if not isinstance(value, str):
            if name not in _FILE_FIELDS:
                raise Problem(400, "unknown_field", f"unknown file field {name[:60]!a}", "use 'image'")
            images.append(await value.read())
        elif name == "top_k":
            top_k = value
        else:
            raise Problem(400, "unknown_field", f"unknown field {name[:60]!a}", "fields: image (files), top_k")
    await form.close()
    return ImagesRequest(images, top_k)


Schema = dict[str, Any]


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def _list(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _body(schemas: Schema) -> Schema:
    content = {kind: {"schema": schema} for kind, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


_FILE: Schema = {"type": "string", "format": "binary"}
_BASE64: Schema = {"type": "string", "format": "byte"}
_COUNT: Schema = {"type": "integer", "minimum": 1, "maximum": 999_999}
_TEXT: Schema = {"type": "string"}
_TENSOR = _object(
    "name", "shape", "datatype", "data",
    name=_TEXT, datatype=_TEXT, shape=_list({"type": "integer"}), data=_list({"type": "number"}),
)  # fmt: skip
TOP_K: Schema = {"name": "top_k", "in": "query", "required": False, "schema": _COUNT}
IMAGES_BODY = _body({
    "multipart/form-data": _object("image", image=_list(_FILE), top_k=_COUNT),
    "application/json": _object(image=_BASE64, images=_list(_BASE64), top_k=_COUNT) | {"additionalProperties": False},
    "application/octet-stream": _FILE,
    "image/*": _FILE,
})  # fmt: skip
INFER_BODY = _body({
    "application/json": _object("inputs", id=_TEXT, inputs=_list(_TENSOR, minItems=1, maxItems=1)),
})  # fmt: skip
