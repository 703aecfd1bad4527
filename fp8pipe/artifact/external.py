"""Where an ONNX file has its tensors: a graph may name other files, and its readers open whatever path stands there.

Every reader has rules of its own for such paths, for entries that stand twice, and for ranges that do not fit. So the
file itself is read before any of them, without a library, since servers have none that parses ONNX: each tensor that is
stored elsewhere must name a file that the artifact lists, beside the graph, and a range within it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

__all__ = ["SUFFIX", "misplaced"]

SUFFIX: Final = ".onnx"
# Fields that lead to tensors, by number, from onnx.proto: what a message holds, and which message that is.
_FIELDS: Final[Mapping[str, Mapping[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_NAME, _ENTRY = 8, 13  # of a tensor: its name, and a pair of strings that says where it is stored
_NUMBERS: Final = {0: 0, 1: 8, 5: 4}  # bytes of a wire type; 0 stands for a varint
_LENGTH: Final = 2


def misplaced(graph: Path, sizes: Mapping[str, int]) -> Iterator[str]:
    """What is wrong with where a graph has its tensors, a sentence each; `sizes` are those of the files beside it."""
    if graph.stat().st_size == 0:  # which no memory can be mapped to
        return
    with graph.open("rb") as stream:
        data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        for name, entries in _stored_elsewhere(data, "model"):
            if why := _wrong(entries, sizes):
                yield f"has the tensor {name} in another file: {why}"
    except (ValueError, IndexError, RecursionError) as error:
        yield f"is no ONNX graph: {error}"


def _wrong(entries: list[tuple[str, str]], sizes: Mapping[str, int]) -> str:
    stored = dict(entries)
    if len(stored) != len(entries):
        return "an entry stands twice"
    location = stored.get("location", "")
    if location not in sizes or "/" in location or "\\" in location:
        return f"{location!r} is no listed file beside the graph"
    numbers = [stored.get("offset", "0"), stored.get("length", "0")]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        return f"offset {numbers[0]!r} and length {numbers[1]!r} are no numbers of bytes"
    offset, length = map(int, numbers)
    if offset + length > sizes[location]:
        return f"bytes {offset} to {offset + length}; {location} has {sizes[location]}"
    return ""


def _stored_elsewhere(data: memoryview, message: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Every tensor below a message that names a place: its name, and the entries that say where."""
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
    """A protobuf message's fields: number and bytes; of numbers, which nothing here reads, no bytes."""
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
    """A number of 7 bits a byte, the lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")
