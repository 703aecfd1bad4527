"""Checks the external data of ONNX graphs: tensors that are stored in other files, at a path given in the graph.

ONNX readers open any path, and differ in how they treat paths, duplicate entries, and ranges beyond the end of a file.
Graphs are therefore checked before any reader opens them. The file of an external tensor must be in the directory of
the graph and be listed in the manifest, and its range must be within that file. This module parses graphs without a
library, because servers have no ONNX parser installed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

__all__ = ["SUFFIX", "misplaced"]

SUFFIX: Final = ".onnx"
# The fields of onnx.proto that may contain tensors, directly or not: for each message type, the field number and the
# message type of each such field.
_FIELDS: Final[Mapping[str, Mapping[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_NAME, _ENTRY = 8, 13  # field numbers in a tensor: its name, and a key-value pair that describes its external location
_NUMBERS: Final = {0: 0, 1: 8, 5: 4}  # size of a number in bytes, by protobuf wire type; 0 for a varint
_LENGTH: Final = 2  # wire type of fields that begin with their length


def misplaced(graph: Path, sizes: Mapping[str, int]) -> Iterator[str]:
    """Find errors in the external data of a graph.

    Args:
        graph: the ONNX file.
        sizes: for each file of the manifest in the same directory, its size in bytes.

    Yields:
        One message per error, to be put after the file's name.
    """
    if graph.stat().st_size == 0:  # an empty file cannot be memory-mapped
        return
    with graph.open("rb") as stream:
        data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        for name, entries in _stored_elsewhere(data, "model"):
            if why := _wrong(entries, sizes):
                yield f"has the tensor {name} in another file: {why}"
    except (ValueError, IndexError, RecursionError) as error:
        yield f"is not an ONNX graph: {error}"


def _wrong(entries: list[tuple[str, str]], sizes: Mapping[str, int]) -> str:
    stored = dict(entries)
    if len(stored) != len(entries):
        return "an entry occurs twice"
    location = stored.get("location", "")
    if location not in sizes or "/" in location or "\\" in location:
        return f"{location!r} is not a file next to the graph that the manifest lists"
    numbers = [stored.get("offset", "0"), stored.get("length", "0")]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        return f"offset {numbers[0]!r} and length {numbers[1]!r} are not byte counts"
    offset, length = map(int, numbers)
    if offset + length > sizes[location]:
        return f"bytes {offset} to {offset + length}; {location} has {sizes[location]}"
    return ""


def _stored_elsewhere(data: memoryview, message: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Find all external tensors in a protobuf message.

    Args:
        data: the encoded message.
        message: its type, a key of `_FIELDS`, or "tensor".

    Yields:
        The tensor's name, and the (key, value) entries that describe its location.
    """
    if message == "tensor":
        fields = list(_fields(data))
        entries = [dict(_fields(value)) for number, value in fields if number == _ENTRY]
        if entries:
            named = [str(value, "utf-8", "replace") for number, value in fields if number == _NAME]
            yield "".join(named[-1:]), [(_text(entry, 1), _text(entry, 2)) for entry in entries]
        return
    for number, value in _fields(data):
        if (inner := _FIELDS[message].get(number)) is not None:
            yield from _stored_elsewhere(value, inner)


def _text(entry: Mapping[int, memoryview], number: int) -> str:
    return str(entry.get(number, b""), "utf-8")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and the bytes of each field of a protobuf message; for varints, which are not needed, no bytes.

    Raises:
        ValueError: the data is not a valid message.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 == _LENGTH:
            size, place = _varint(data, place)
        elif key & 7 in _NUMBERS:
            size = _NUMBERS[key & 7]
            place = place if size else _varint(data, place)[1]
        else:
            raise ValueError(f"a field of wire type {key & 7}")
        if place + size > len(data):
            raise ValueError("it ends within a field")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Decode the varint at `place` (7 bits per byte, least significant first); returns it and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")
