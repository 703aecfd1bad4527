"""Compressed bodies: what Python's own gzip and zlib write is read, and bombs and stumps are refused."""

from __future__ import annotations

import gzip
import zlib

import pytest

from serving.http.problems import Problem
from serving.vision.bodies import accepted_encoding, compress, decompress

_TEXT = b"the same words again and again " * 100


@pytest.mark.parametrize(("encoding", "write", "read"), [
    ("gzip", gzip.compress, gzip.decompress), ("x-gzip", gzip.compress, gzip.decompress),
    ("deflate", zlib.compress, zlib.decompress),
])  # fmt: skip
def test_both_ways(encoding, write, read):
    assert decompress(write(_TEXT), encoding, len(_TEXT)) == _TEXT
    assert read(compress(_TEXT, encoding)) == _TEXT
    assert len(compress(_TEXT, encoding)) < len(_TEXT) / 10


@pytest.mark.parametrize(("body", "encoding", "status"), [
    (gzip.compress(bytes(1_000_001), mtime=0), "gzip", 413), (zlib.compress(bytes(50_000_000)), "deflate", 413),
    (gzip.compress(_TEXT, mtime=0)[:-1], "gzip", 400), (gzip.compress(_TEXT, mtime=0) + b"x", "gzip", 400),
    (gzip.compress(_TEXT, mtime=0) * 2, "gzip", 400), (b"", "gzip", 400), (b"plain", "deflate", 400),
    (zlib.compress(_TEXT), "gzip", 400), (_TEXT, "br", 415), (_TEXT, "gzip, gzip", 415),
], ids=range(10))  # fmt: skip
def test_what_cannot_be_read(body, encoding, status):
    with pytest.raises(Problem) as caught:
        decompress(body, encoding, 1_000_000)
    assert caught.value.status == status


@pytest.mark.parametrize(("header", "found"), [
    (None, None), ("", None), ("identity", None), ("br, gzip;q=0.5", "gzip"), ("deflate, gzip", "deflate"),
    ("gzip;q=0, deflate;q=0.000", None), ("GZIP ; q=1.0", "gzip"), ("*", None), ("gzip;q=x", "gzip"),
])  # fmt: skip
def test_what_a_client_accepts(header, found):
    assert accepted_encoding(header) == found
