"""Reads the rows of data files, whose format is detected from their first bytes and, for CSV, also from their name.

JSON and CSV files in UTF-8, UTF-16 or UTF-32, uncompressed or compressed with gzip, bzip2 or xz, need no extra package.
Parquet, Arrow and Zstandard files need pyarrow, which the extra ``data`` installs. pyarrow is not used for JSON and CSV
because its tables add missing keys and guess types: ``{"city": "Rome"}`` gains nulls for all other keys of the column,
and "007" becomes 7.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.models.language.text.shapes import BadRow, DamagedFile

_COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst")
_SUFFIXES: Final = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
_COLUMNS: Final = {"messages", "conversations", "prompt", "completion", "instruction", "output"}
# Metadata files that the package datasets writes beside the data.
_DESCRIPTIONS: Final = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
_EVALUATION: Final = re.compile(r"(?<![a-z])(tests?|testing|evals?|evaluations?|valid|validation|val|dev)(?![a-z])")
_TRAINING: Final = re.compile(r"(?<![a-z])train(ing)?(?![a-z])")
_ZSTANDARD: Final = b"\x28\xb5\x2f\xfd"
_PACKED: Final = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_TABLES: Final = {b"PAR1": "parquet", b"ARROW1": "file", b"\xff\xff\xff\xff": "stream"}
_DAMAGED: Final = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


def data_files(src: str, warn: Callable[[str], None] = lambda _: None) -> list[Path] | None:
    """Find the data files that ``src`` refers to.

    Args:
        src: a file, a folder (searched recursively) or a glob pattern. In a folder, files of other formats and files
            whose names mark them as evaluation data are skipped.
        warn: called with a message about skipped files.

    Returns:
        The files; None if ``src`` is neither an existing path nor a pattern.

    Raises:
        ConfigurationError: the folder or pattern contains no data files.
    """
    path = Path(src).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_of_folder(path, warn)
    if not glob.has_magic(src):
        return None
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not any(file.is_file() for file in found):
        raise ConfigurationError(
            f"there is no data file {src}", why="no file matches this pattern", fix="check the pattern"
        )
    return [file for file in found if file.is_file()]


def _files_of_folder(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    train, evaluation, others = [], [], []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if not file.is_file() or file.name in _DESCRIPTIONS or any(p.startswith(".") for p in inside.parts):
            continue
        if not _bare(file).endswith(_SUFFIXES):
            others.append(str(inside))
        elif _EVALUATION.search(str(inside).lower()) and not _TRAINING.search(str(inside).lower()):
            evaluation.append(str(inside))
        else:
            train.append(file)
    if not train:
        kinds = ", ".join((*_SUFFIXES, *_COMPRESSED))
        raise ConfigurationError(
            f"{folder} holds no training data",
            why=f"all its data files are for evaluation: {', '.join(evaluation[:8])}" if evaluation
            else f"no file in it ends in {kinds}",
            fix="name the file to train on",
        )  # fmt: skip
    for names, why in ((evaluation, "for evaluation, by their names"), (others, "of a kind that is not read")):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            warn(f"files of {folder} that are left out, as they are {why}: {', '.join(names[:8])}{more}")
    return train


def _bare(path: Path) -> str:
    """The file's name in lower case, without the suffix of a compression format."""
    name = path.name.lower()
    return name[: -len(path.suffix)] if path.suffix.lower() in _COMPRESSED else name


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file as pairs of their position ("line 3") and their content.

    For an unreadable row, the content is a ``BadRow`` exception that is not raised; for the rest of a damaged file, it
    is a ``DamagedFile``.

    Raises:
        MissingCapabilityError: pyarrow is needed but not installed.
    """
    place = ""
    try:
        for place, row in _rows(path):
            yield place, row
    except _DAMAGED as error:
        where = f"after {place}" if place else "before its first record ends"
        yield where, DamagedFile(f"{path.name} is damaged or cannot be read: {type(error).__name__}: {error}")


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        magic = file.read(8)
    table = next((kind for start, kind in _TABLES.items() if magic.startswith(start)), None)
    if table:
        yield from _table_rows(path, table)
        return
    with _unpacked(path, magic) as packed, io.BufferedReader(packed) as stream:
        head = stream.peek(4096)
        encoding = json.detect_encoding(head)
        opening = head.decode(encoding, "ignore").lstrip("\ufeff").lstrip()
        if b"\x00" in head and encoding.startswith("utf-8"):
            yield "at the beginning", BadRow(f"{path.name} is neither text nor a table in a supported format")
        elif opening.startswith("[") or opening.partition("\n")[0].rstrip() == "{":
            yield from _json_document(stream.read(), encoding)
        elif not opening.startswith("{") and (_bare(path).endswith((".csv", ".tsv")) or _is_header(opening)):
            yield from _csv_rows(io.TextIOWrapper(stream, encoding, newline=""))
        elif encoding.startswith("utf-8"):
            yield from _json_lines(stream)
        else:
            lines = io.TextIOWrapper(stream, encoding, newline="\n")
            yield from _json_lines(line.encode("utf-8", "surrogatepass") for line in lines)


def _unpacked(path: Path, magic: bytes) -> Any:
    """Open a file as a byte stream, decompressed according to its first bytes ``magic``."""
    if magic.startswith(_ZSTANDARD):
        return io.BytesIO(_pyarrow(path).input_stream(str(path), compression="zstd").read())
    opener: Any = next((opener for start, opener in _PACKED.items() if magic.startswith(start)), Path.open)
    return opener(path, "rb")


def _json_lines(lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield the position and the parsed object (or a ``BadRow``) of each non-blank line; lines end only at newlines."""
    for number, raw in enumerate(lines, start=1):
        place = f"line {number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            yield place, json.loads(text)
        except UnicodeDecodeError as error:
            yield place, BadRow(f"not UTF-8 text: {error.reason} at byte {error.start} of the line")
        except json.JSONDecodeError as error:
            yield place, BadRow(f"not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            yield place, BadRow(f"not readable JSON: {type(error).__name__}: {error}")


def _json_document(raw: bytes, encoding: str) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON document: the items of one array, or a sequence of objects that may span several lines."""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        yield f"line {raw[: error.start].count(10) + 1}", BadRow(f"not {encoding.upper()} text: {error.reason}")
        return
    decoder, at, line = json.JSONDecoder(), _skip(text, 0), 1
    array = text.startswith("[", at)
    at = _skip(text, at + array)
    last, number = 0, 0
    while at < len(text) and not (array and text[at] == "]"):
        line, last, number = line + text.count("\n", last, at), at, number + 1
        place = f"item {number} (line {line})"
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            position = f"{error.msg} at line {error.lineno}, column {error.colno}" if isinstance(
                error, json.JSONDecodeError
            ) else str(error)  # fmt: skip
            yield place, BadRow(f"not valid JSON: {position}; what follows was not read")
            return
        yield place, value
        at = _skip(text, at)
        if array and not text.startswith(("]", ","), at):
            line += text.count("\n", last, at)
            yield f"line {line}", BadRow("not valid JSON: expected a comma or the end of the array")
            return
        at = _skip(text, at + (array and text[at] == ","))
    end = _skip(text, at + array)
    if array and (at >= len(text) or end < len(text)):
        why = "the array does not end" if at >= len(text) else "something follows the end of the array"
        yield f"line {line + text.count(chr(10), last, end)}", BadRow(f"not valid JSON: {why}")


def _skip(text: str, at: int) -> int:
    """The first position from ``at`` on that is not JSON white space."""
    while at < len(text) and text[at] in " \t\r\n\ufeff":
        at += 1
    return at


def _is_header(opening: str) -> bool:
    return bool(_COLUMNS & set(re.split(r"[,;\t|]", opening.partition("\n")[0].replace('"', "").strip())))


def _csv_rows(text: io.TextIOWrapper) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV table with a header; empty cells are omitted."""
    csv.field_size_limit(sys.maxsize)
    header_line = text.readline().lstrip("\ufeff")
    delimiter = max(",;\t|", key=lambda d: len(_COLUMNS & set(header_line.replace('"', "").strip().split(d))))
    header = next(csv.reader([header_line], delimiter=delimiter), [])
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    first = 2
    try:
        for cells in reader:
            place, first = f"line {first}", reader.line_num + 2
            if cells and len(cells) != len(header):
                yield place, BadRow(f"{len(cells)} cells, where the header has {len(header)}")
            elif cells:
                yield place, {key: cell for key, cell in zip(header, cells, strict=True) if cell}
    except csv.Error as error:
        yield f"line {first}", BadRow(f"not valid CSV: {error}; what follows was not read")


def _table_rows(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    pyarrow = _pyarrow(path)
    number = 0
    for batch in _batches(path, kind, pyarrow):
        for row in batch.to_pylist():
            yield f"row {number}", without_nested_nulls(row)
            number += 1


def _batches(path: Path, kind: str, pyarrow: Any) -> Iterator[Any]:
    if kind == "parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches()
        return
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as source:
        if kind == "stream":
            yield from ipc.open_stream(source)
        else:
            reader = ipc.open_file(source)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingCapabilityError(
            f"reading {path} needs the package pyarrow",
            why="parquet, arrow and Zstandard files are read through it",
            fix="pip install 'fp8pipe[data]', or give a .jsonl file",
        ) from error
    return pyarrow


def without_nested_nulls(row: Any) -> Any:
    """A row of a table without null values in nested objects, which tables add for keys that the original lacked."""
    return {key: _pruned(value) for key, value in row.items()} if isinstance(row, dict) else row


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value
