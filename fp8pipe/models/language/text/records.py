"""Reads conversations from the user's training data, and checks all of them before any expensive work starts.

Several bad records are reported at once, each with its file and line. Fields that are not used are counted and reported
in a warning.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError, first_line
from fp8pipe.models.language.text.conversation import ImagePart, Record
from fp8pipe.models.language.text.files import data_files, rows_of, without_nested_nulls
from fp8pipe.models.language.text.images import located
from fp8pipe.models.language.text.shapes import SHAPES, BadRow, DamagedFile, pair, parse_row
from fp8pipe.models.samples import chatterbot_conversations, sample_name

log = logging.getLogger(__name__)

DATA_SAMPLES: Final = ("chatterbot",)
_SHOWN_ERRORS: Final = 10
_BATCH: Final = 64  # rows of a dataset that are read at once


def load_records(src: str, warn: Callable[[str], None] = log.warning) -> list[Record]:
    """Read and check all records of ``src``.

    Args:
        src: a file, a folder or a glob pattern of JSONL, JSON, CSV, Parquet or Arrow files, which may be compressed; a
            dataset saved by the package ``datasets``; the id of a dataset on the hub; or ``sample:chatterbot``.
        warn: called with a message about files and fields that are not used.

    Raises:
        ConfigurationError: there is no such data, it has no records, or it has bad records (up to ten are listed).
        MissingCapabilityError: the package that reads this kind of file is not installed.
    """
    if sample_name(src, DATA_SAMPLES, "data") is not None:
        # Only the first two turns are used: longer entries are either dialogues or one question with alternative
        # answers, and the files do not distinguish the two.
        return [pair(turns[0], turns[1]) for turns in chatterbot_conversations()]
    path = Path(src).expanduser()
    files = None if _is_saved_dataset(path) else data_files(src, warn)
    if files is not None:
        return _parse_all(src, _file_rows(files, path), warn)
    if not path.is_dir() and (path.suffix or path.is_absolute() or src.count("/") != 1):
        raise ConfigurationError(
            f"there is no data file {src}",
            why="no file or directory has that name",
            fix="check the path, or use sample:chatterbot to try things out",
        )
    rows = _dataset_rows(src, path if path.is_dir() else None)
    return _parse_all(src, ((place, row, path if path.is_dir() else Path()) for place, row in rows), warn)


def _is_saved_dataset(path: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _file_rows(files: list[Path], root: Path) -> Iterator[tuple[str, Any, Path]]:
    """Rows of all files, as in `rows_of`, with the file's folder, to which paths of images are relative.

    If there are several files, each position begins with the file's name.
    """
    for file in files:
        name = f"{file.relative_to(root) if file.is_relative_to(root) else file} " if len(files) > 1 else ""
        for place, row in rows_of(file):
            yield f"{name}{place}", row, file.parent


def _parse_all(src: str, rows: Iterable[tuple[str, Any, Path]], warn: Callable[[str], None]) -> list[Record]:
    records: list[Record] = []
    problems: list[str] = []
    damaged: list[BadRow] = []
    unused: Counter[str] = Counter()
    for place, row, folder in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            records.append(_located(parse_row(row, place, unused), folder))
        except BadRow as error:
            problems.append(f"{place}: {error}")
            damaged += [error] if isinstance(error, DamagedFile) else []
    if problems and len(damaged) == len(problems):
        raise ConfigurationError(f"{src} is incomplete", why="\n    ".join(problems), fix="copy or download it again")
    if problems:
        bad, more = len(problems), len(problems) - _SHOWN_ERRORS
        raise ConfigurationError(
            f"{src} has {bad} bad record{'s' if bad > 1 else ''}",
            why="\n    ".join(problems[:_SHOWN_ERRORS] + ([f"and {more} more"] if more > 0 else [])),
            fix=f"correct them; a record is one JSON object with {SHAPES}",
        )
    if not records:
        raise ConfigurationError(
            f"{src} is empty", why="it holds no record", fix=f"write one JSON object a line, with {SHAPES}"
        )
    if unused:
        fields = ", ".join(f"{key!r} (in {count} of {len(records)})" for key, count in unused.most_common())
        warn(f"fields of records that are not used: {fields}")
    return records


def _located(record: Record, folder: Path) -> Record:
    """The record with absolute paths of its images, and their places in the data.

    Raises:
        BadRow: there is no such file.
    """
    if not record.images:
        return record

    def absolute(part: ImagePart) -> ImagePart:
        try:
            return replace(part, source=located(part.source, folder), place=f"{record.place}, {part.place}")
        except ValueError as error:
            raise BadRow(f"{part.place}: {error}") from error

    return replace(record, messages=tuple(replace(m, images=tuple(map(absolute, m.images))) for m in record.messages))


def _dataset_rows(src: str, path: Path | None) -> Iterator[tuple[str, Any]]:
    """Rows of the ``train`` split of a dataset saved at ``path`` by ``save_to_disk``, or else of the hub id ``src``."""
    try:
        import datasets
    except ImportError as error:
        raise MissingCapabilityError(
            f"reading {src} needs the package datasets",
            why=f"it is {'a saved dataset' if path else 'no file here, so it is taken as a hub id'}; "
            "JSON and CSV files need no extra package",
            fix="pip install 'fp8pipe[data]', or give a .jsonl file",
        ) from error
    try:
        data = datasets.load_from_disk(str(path)) if path else datasets.load_dataset(src, split="train")
        if isinstance(data, Mapping):
            data = data["train"]
        # As stored: the package would decode images, and their bytes are what is wanted.
        batches = data.with_format("arrow").iter(_BATCH)
    except ConnectionError as error:
        raise MissingCapabilityError(
            f"the dataset {src} could not be downloaded",
            why=first_line(error),
            fix="check the network (HF_HUB_OFFLINE must be unset to download), or give a .jsonl file",
        ) from error
    except Exception as error:  # datasets raises many unrelated classes, all of which mean that it cannot be read
        raise ConfigurationError(
            f"{src} cannot be read as a dataset",
            why=f"{type(error).__name__}: {error}",
            fix="check the name and that it has a train part, or give a .jsonl file",
        ) from error
    rows = (row for batch in batches for row in batch.to_pylist())
    return ((f"row {index}", without_nested_nulls(row)) for index, row in enumerate(rows))
