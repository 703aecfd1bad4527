"""Conversations to learn from, read from the user's data and checked before anything expensive starts.

Three shapes of a JSON object are understood, one object a line:

* ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}``
* ``{"prompt": ..., "completion": ...}``
* ``{"instruction": ..., "input": ... (may be absent or empty), "output": ...}``

Other keys of an object are ignored. Every bad line is reported with its number, several at once. ``split``
removes repeated prompts *before* it sets examples aside: a corpus that repeats its questions (most do)
would otherwise be tested on what it was trained on.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.models.samples import chatterbot_conversations, sample_name

DATA_SAMPLES: Final = ("chatterbot",)
ROLES: Final = ("system", "user", "assistant", "tool")
_SHOWN_ERRORS: Final = 10
_SHAPES: Final = "messages, prompt + completion, or instruction (+ input) + output"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: ``role`` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation with at least one assistant turn."""

    messages: tuple[Message, ...]


class _BadRow(Exception):
    """What is wrong with one row."""


def load_records(src: str) -> list[Record]:
    """Reads every record of ``src``.

    Args:
        src: a JSONL file, a dataset directory or hub id (needs the package ``datasets``), or
            ``sample:chatterbot``.

    Raises:
        ConfigurationError: nothing there, nothing in it, or bad lines (up to ten are listed).
        MissingCapabilityError: ``datasets`` or the sample's package is not installed.
    """
    if sample_name(src, DATA_SAMPLES, "data") is not None:
        # Only the first two turns: the longer entries are partly dialogues and partly one question followed
        # by alternative answers, and nothing in the files tells which.
        return [_pair(turns[0], turns[1]) for turns in chatterbot_conversations()]
    path = Path(src).expanduser()
    if path.is_file():
        rows: Iterable[tuple[str, Any]] = _json_lines(path)
    elif path.is_dir():
        rows = _dataset_rows(src, path)
    elif path.suffix or path.is_absolute() or src.count("/") != 1:
        raise ConfigurationError(
            f"there is no data file {src}",
            why="no file or directory has that name",
            fix="check the path, or use sample:chatterbot to try things out",
        )
    else:
        rows = _dataset_rows(src, None)
    return _parse_all(src, rows)


def _parse_all(src: str, rows: Iterable[tuple[str, Any]]) -> list[Record]:
    records: list[Record] = []
    problems: list[str] = []
    for place, row in rows:
        try:
            if isinstance(row, _BadRow):
                raise row
            records.append(_parse(row))
        except _BadRow as error:
            problems.append(f"{place}: {error}")
    if problems:
        bad, more = len(problems), len(problems) - _SHOWN_ERRORS
        raise ConfigurationError(
            f"{src} has {bad} bad record{'s' if bad > 1 else ''}",
            why="\n    ".join(problems[:_SHOWN_ERRORS] + ([f"and {more} more"] if more > 0 else [])),
            fix=f"correct them; a record is one JSON object with {_SHAPES}",
        )
    if not records:
        raise ConfigurationError(
            f"{src} is empty", why="it holds no record", fix=f"write one JSON object a line, with {_SHAPES}"
        )
    return records


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, parsed object or _BadRow) of each line that is not blank. Lines end at a newline byte only."""
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            place = f"line {number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                yield place, json.loads(text)
            except UnicodeDecodeError as error:
                yield place, _BadRow(f"not UTF-8 text: {error.reason} at byte {error.start} of the line")
            except json.JSONDecodeError as error:
                array = number == 1 and text.startswith("[")
                hint = " (a JSON array over several lines? write one object a line)" if array else ""
                yield place, _BadRow(f"not valid JSON: {error.msg} at column {error.colno}{hint}")
            except (ValueError, RecursionError) as error:
                yield place, _BadRow(f"not readable JSON: {type(error).__name__}: {error}")


def _dataset_rows(src: str, path: Path | None) -> Iterator[tuple[str, Any]]:
    """Rows of the ``train`` part of a dataset directory (``save_to_disk``'s too) or of a hub id."""
    try:
        import datasets
    except ImportError as error:
        raise MissingCapabilityError(
            f"reading {src} needs the package datasets",
            why=f"it is {'a directory' if path else 'no file here, so it is taken as a hub id'}; "
            "JSONL files need no extra package",
            fix="pip install datasets, or give a .jsonl file",
        ) from error
    saved = path is not None and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file())
    try:
        data = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path or src), split="train")
        if isinstance(data, Mapping):
            data = data["train"]
    except ConnectionError as error:
        raise MissingCapabilityError(
            f"the dataset {src} could not be downloaded",
            why=str(error).partition("\n")[0],
            fix="check the network (HF_HUB_OFFLINE must be unset to download), or give a .jsonl file",
        ) from error
    except Exception as error:  # datasets raises many unrelated classes, all meaning: this cannot be read
        raise ConfigurationError(
            f"{src} cannot be read as a dataset",
            why=f"{type(error).__name__}: {error}",
            fix="check the name and that it has a train part, or give a .jsonl file",
        ) from error
    return ((f"row {index}", row) for index, row in enumerate(data))


def _parse(row: Any) -> Record:
    """A checked record; raises _BadRow."""
    if not isinstance(row, dict):
        raise _BadRow(f"a record must be an object, not {_json_type(row)}")
    # A dataset table may hold a column of another shape that is empty in this row.
    keys = {k for k, v in row.items() if v is not None}
    if "messages" in keys:
        return _from_messages(row["messages"])
    if "prompt" in keys or "completion" in keys:
        return _pair(_text(row, "prompt"), _text(row, "completion"))
    if "instruction" in keys or "output" in keys:
        extra = _text(row, "input", needed=False)
        instruction, output = _text(row, "instruction"), _text(row, "output")
        return _pair(f"{instruction}\n\n{extra}" if extra.strip() else instruction, output)
    found = ", ".join(map(repr, sorted(map(str, row))[:8])) or "none"
    raise _BadRow(f"keys not understood ({found}); expected {_SHAPES}")


def _pair(prompt: str, answer: str) -> Record:
    return Record((Message("user", prompt), Message("assistant", answer)))


def _text(row: dict[str, Any], key: str, *, needed: bool = True) -> str:
    value = row.get(key)
    if value is None and not needed:
        return ""
    if value is None:
        raise _BadRow(f"{key!r} is {'null' if key in row else 'missing'}")
    if not isinstance(value, str):
        raise _BadRow(f"{key!r} must be text, not {_json_type(value)}")
    if needed and not value.strip():
        raise _BadRow(f"{key!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # an unpaired \ud800 escape is valid JSON but no text
        raise _BadRow(f"{key!r} holds an unpaired surrogate at character {error.start}") from error
    return value


def _from_messages(value: Any) -> Record:
    if not isinstance(value, list):
        raise _BadRow(f"'messages' must be a list, not {_json_type(value)}")
    messages = []
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise _BadRow(f"messages[{index}] must be an object with role and content, not {_json_type(item)}")
        try:
            role, content = _text(item, "role"), _text(item, "content")
        except _BadRow as error:
            raise _BadRow(f"messages[{index}]: {error}") from error
        if role not in ROLES:
            raise _BadRow(f"messages[{index}]: role {role!r} is not one of {', '.join(ROLES)}")
        messages.append(Message(role, content))
    if not any(m.role == "assistant" for m in messages):
        raise _BadRow("no assistant message, so there is nothing to learn")
    return Record(tuple(messages))


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def split(
    records: list[Record], *, heldout_fraction: float | None = None, heldout_count: int | None = None, seed: int
) -> tuple[list[Record], list[Record]]:
    """Removes repeated prompts, then sets some records aside: ``(train, heldout)``.

    ``train`` keeps the given order; ``heldout`` is in the order drawn: its beginning is a fair sample.

    A record's prompt is everything before its last answer, compared without case, white space and closing
    punctuation; of equal prompts the first record stays. Conversations that open alike go to the same side
    together, so that no prompt inside one side's conversations occurs on the other; ``heldout`` may
    therefore fall short of the number asked for where long runs of conversations share their opening.

    Args:
        records: the records.
        heldout_fraction: part of the distinct records to set aside, 0 <= f < 1 (rounded up).
        heldout_count: number of distinct records to set aside; exactly one of the two must be given.
        seed: any integer >= 0; the choice depends on it and on the records only.

    Raises:
        ConfigurationError: a value out of range, or too few distinct records.
    """
    distinct: dict[str, Record] = {}
    for record in records:
        distinct.setdefault(_context(record, last=True), record)
    unique = list(distinct.values())
    wanted = _wanted(len(unique), heldout_fraction, heldout_count)
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(unique):
        groups.setdefault(_context(record, last=False), []).append(index)
    members = list(groups.values())
    chosen: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(members)):
        if len(chosen) + len(members[group]) <= wanted:
            chosen += members[group]
    if wanted and not chosen:
        raise ConfigurationError(
            f"{wanted} records cannot be set aside",
            why="all conversations open alike",
            fix="hold out more, or give data with distinct prompts",
        )
    aside = set(chosen)
    return [r for i, r in enumerate(unique) if i not in aside], [unique[i] for i in chosen]


def _wanted(distinct: int, fraction: float | None, count: int | None) -> int:
    if fraction is not None and count is None:
        if not 0 <= fraction < 1:
            raise ConfigurationError(
                f"heldout_fraction is {fraction}", why="it must be at least 0 and below 1", fix="use for example 0.1"
            )
        count = math.ceil(distinct * fraction)
    elif count is None or fraction is not None:
        raise ConfigurationError(
            "how much to hold out is not clear",
            why="give a fraction or a count, one of them",
            fix="set heldout_fraction or heldout_count",
        )
    if count < 0 or count >= distinct:
        raise ConfigurationError(
            f"{count} records cannot be held out",
            why=f"the data has {distinct} records with distinct prompts, and one at least must stay for training",
            fix="hold out fewer, or give more data",
        )
    return count


def _context(record: Record, *, last: bool) -> str:
    """Normalised text before the last (or the first) answer."""
    answers = [i for i, m in enumerate(record.messages) if m.role == "assistant"]
    end = answers[-1 if last else 0]
    return "\x00".join(f"{m.role}:{_normalised(m.content)}" for m in record.messages[:end])


def _normalised(text: str) -> str:
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.rstrip(" .,;:!?…\"'") or plain
