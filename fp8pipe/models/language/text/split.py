"""Splits records into a training set and a held-out set that have no prompts in common.

Most corpora repeat their questions, so that a random split of the records would evaluate the model on prompts that it
was trained on.
"""

from __future__ import annotations

import json
import logging
import math
import unicodedata
from collections.abc import Callable
from typing import Final

import numpy as np

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text.conversation import Message, Record

log = logging.getLogger(__name__)

_PROMPTS: Final = ("user", "tool")  # roles whose messages are prompts; a system message alone is none


def split(
    records: list[Record],
    *,
    heldout_fraction: float | None = None,
    heldout_count: int | None = None,
    seed: int,
    warn: Callable[[str], None] = log.warning,
) -> tuple[list[Record], list[Record]]:
    """Remove duplicate records, and divide the others into a training set and a held-out set.

    Records are duplicates only if they are entirely equal; records with the same prompt and different answers are kept.
    Conversations with the same opening are always put into the same set. The opening is everything before the first
    answer to a user (the whole conversation if there is none), ignoring case, white space and closing punctuation. If
    many conversations share an opening, the held-out set may have fewer records than requested; if every group of
    conversations with the same opening is larger than requested, the smallest group is held out.

    Args:
        records: the records.
        heldout_fraction: fraction of the distinct records to hold out, 0 <= f < 1 (rounded up).
        heldout_count: number of distinct records to hold out. Exactly one of the two must be given.
        seed: an integer >= 0; the choice depends only on the seed and the records.
        warn: called with a message about removed duplicates, or about a different number of held-out records.

    Returns:
        ``(train, heldout)``. ``train`` keeps the given order; ``heldout`` is in random order, so that any prefix of it
        is a random sample.

    Raises:
        ConfigurationError: a value is out of range, or there are too few distinct records.
    """
    distinct: dict[str, Record] = {}
    for record in records:
        distinct.setdefault(_whole(record), record)
    unique = list(distinct.values())
    if len(unique) < len(records):
        warn(f"{len(records) - len(unique)} of {len(records)} records were left out: they repeat another one exactly")
    wanted = _wanted(len(unique), heldout_fraction, heldout_count)
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(unique):
        groups.setdefault(_opening(record), []).append(index)
    members = list(groups.values())
    chosen: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(members)):
        if len(chosen) + len(members[group]) <= wanted:
            chosen += members[group]
    if wanted and not chosen:
        chosen = _shortest_run(members, wanted, warn)
    aside = set(chosen)
    return [r for i, r in enumerate(unique) if i not in aside], [unique[i] for i in chosen]


def _shortest_run(members: list[list[int]], wanted: int, warn: Callable[[str], None]) -> list[int]:
    """The smallest group of conversations with the same opening, for the case that all are larger than requested."""
    if len(members) == 1:
        raise ConfigurationError(
            f"{wanted} records cannot be held out",
            why="all conversations open with the same prompt, which would be in both parts",
            fix="give data with at least two distinct prompts",
        )
    shortest = min(members, key=len)
    warn(
        f"{len(shortest)} records are held out where {wanted} were asked for: no prompt has fewer answers, and records "
        "of one prompt stay together"
    )
    return shortest


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
            why="give either a fraction or a count",
            fix="set heldout_fraction or heldout_count",
        )
    if count < 0 or count >= distinct:
        raise ConfigurationError(
            f"{count} records cannot be held out",
            why=f"the data has {distinct} distinct records, and one at least must stay for training",
            fix="hold out fewer, or give more data",
        )
    return count


def _whole(record: Record) -> str:
    """The complete contents of a record as JSON text, to detect duplicates."""
    turns = [(m.role, m.content, m.learned, dict(m.fields), _sources(m)) for m in record.messages]
    return json.dumps([turns, list(record.tools)], sort_keys=True, default=str)


def _opening(record: Record) -> str:
    """Normalised text of a record before the first answer to a user, or of all of it if there is none."""
    asked, end = False, len(record.messages)
    for index, message in enumerate(record.messages):
        if message.role == "assistant" and asked:
            end = index
            break
        asked |= message.role in _PROMPTS
    return "\x00".join("\x01".join([f"{m.role}:{_normalised(m.content)}", *_sources(m)]) for m in record.messages[:end])


def _sources(message: Message) -> list[str]:
    return [part.source for part in message.images]


def _normalised(text: str) -> str:
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.rstrip(" .,;:!?…\"'") or plain
