"""Compressed bodies, both ways: gzip and deflate, as Triton's client sends and asks for them.

What a compressed body becomes is bounded while it is read: a few kilobytes can stand for gigabytes. Exactly one
compressed stream is read; bytes after its end are refused.
"""

from __future__ import annotations

import zlib
from typing import Final

from serving.http.problems import Problem

__all__ = ["accepted_encoding", "compress", "decompress"]

# zlib's window sizes that choose the format: gzip, and deflate as HTTP means it (a zlib stream).
_WINDOWS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}
# A fast level: the client waits.
_LEVEL: Final = 1


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body that was sent compressed.

    Args:
        body: as it came.
        encoding: the value of Content-Encoding.
        max_bytes: largest result.

    Raises:
        Problem: 415, another encoding; 413, too large; 400, damaged or cut off.
    """
    window = _WINDOWS.get(encoding)
    if window is None:
        raise Problem(
            415, "unsupported_encoding", f"bodies in the encoding {encoding[:40]!a} are not read",
            "use gzip, deflate, or none",
        )  # fmt: skip
    stream = zlib.decompressobj(window)
    try:
        found = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise Problem(400, "damaged_body", f"the body is not valid {encoding}", "send it again") from error
    if len(found) > max_bytes:
        raise Problem(413, "body_too_large", f"the body is larger than {max_bytes / 1e6:g} MB when decompressed",
                      "send smaller or fewer images")  # fmt: skip
    if not stream.eof or stream.unused_data:
        raise Problem(400, "damaged_body", f"the body is not one whole {encoding} stream", "send all, no more")
    return found


def compress(body: bytes, encoding: str) -> bytes:
    """`body` in gzip or deflate."""
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOWS[encoding])
    return stream.compress(body) + stream.flush()


def accepted_encoding(header: str | None) -> str | None:
    """gzip or deflate, whichever an Accept-Encoding names first; None when it names neither."""
    for part in (header or "")[:1000].lower().split(","):
        name, _, parameters = part.partition(";")
        weight = parameters.replace(" ", "").removeprefix("q=")
        if name.strip() in ("gzip", "deflate") and not (weight and weight.strip("0.") == ""):
            return name.strip()
    return None
