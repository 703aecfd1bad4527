"""Check external data of ONNX files: a graph may store tensors in other files, and readers open any path it names.

Readers differ in how they treat such paths, duplicate entries, and ranges beyond the end of a file. So the graph is
checked before any of them opens it. This module parses it without a library, because servers have no ONNX parser
installed. Each external tensor must name a file next to the graph that the artifact lists, and a range within that
file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

__all__ = ["SUFFIX", "misplaced"]

SUFFIX: Final = ".onnx"
# Fields of onnx.proto that lead to tensors: for each message, the field numbers and the message that each one holds.
_FIELDS: Final[Mapping[str, Mapping[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_NAME, _ENTRY = 8, 13  # fields of a tensor: its name, and a key-value pair of strings about its external location
_NUMBERS: Final = {0: 0, 1: 8, 5: 4}  # size in bytes by wire type of numbers; 0 means a varint
_LENGTH: Final = 2


def misplaced(graph: Path, sizes: Mapping[str, int]) -> Iterator[str]:
    """Errors in a graph's external data, one sentence each; `sizes` are the sizes of the listed files next to it."""
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
    """Every external tensor in a message: its name, and the key-value entries that describe its location."""
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
    """The fields of a protobuf message as number and bytes; varints, which are not used here, yield no bytes."""
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
    """Decode a varint (7 bits per byte, least significant first) and return it with the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")
