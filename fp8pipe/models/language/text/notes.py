"""Collects observations about the chat template while records are rendered, and turns them into warnings.

There is a warning whenever the text that the model is trained on differs from what the user wrote or may expect.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fp8pipe.models.language.text.conversation import Message


class Kind(StrEnum):
    """Observations that are counted per answer.

    The value is the format string of the warning, for the count and the texts of the first answer concerned.
    """

    UNLIKE = (
        "the generation prompt ends in {0!r}, which the text of a finished turn does not have (there {1!r} follows): "
        "served answers begin after it, trained ones do not ({count} answers)"
    )
    HEADER = (
        "the chat template ignores add_generation_prompt, so that {0!r} before an answer is learned as its "
        "beginning, and served answers will begin with it ({count} answers); to have it in the prompt, put "
        "{{% if add_generation_prompt %}}{{{{ {0!r} }}}}{{% endif %}} at the end of the template"
    )
    TRAILER = (
        "the chat template writes {0!r} after every conversation, asked for or not, so that it is learned as the end "
        "of {count} answers; write it where add_generation_prompt is set, and only there"
    )
    PARTIAL = (
        "the chat template renders only a part of {count} answers, which are not learned: the first begins with "
        "{0!r}, and what is rendered of it with {1!r}; use a template that renders answers as they are given"
    )


@dataclass(slots=True)
class Notes:
    """Counts of observations that become warnings.

    Attributes:
        counts: number of answers for each kind of observation.
        firsts: texts of the first answer for each kind, to be shown in the warning.
        passed_over: for each part of records that the template ignores, how often it did so.
        special: for each special token, the number of records whose own text contains it.
    """

    counts: Counter[Kind] = field(default_factory=Counter)
    firsts: dict[Kind, tuple[str, ...]] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)
    special: Counter[str] = field(default_factory=Counter)

    def count(self, kind: Kind, *texts: str) -> None:
        """Count an observation; the `texts` of the first one of each kind are shown in the warning."""
        self.counts[kind] += 1
        self.firsts.setdefault(kind, texts)

    def add(self, other: Notes) -> None:
        """Add the counts of `other` to these."""
        self.counts += other.counts
        self.firsts = other.firsts | self.firsts
        self.passed_over += other.passed_over
        self.special += other.special

    def sentences(self) -> list[str]:
        """One warning for each kind of observation."""
        found = [f"the chat template ignores {what}: {count}" for what, count in self.passed_over.items()]
        found += [kind.format(*self.firsts[kind], count=count) for kind, count in self.counts.items()]
        if self.special:
            listed = ", ".join(f"{token!r} (in {count})" for token, count in self.special.most_common())
            found.append(
                f"records hold special tokens of the tokenizer in their own text, where they are read as those tokens, "
                f"in training as when served: {listed}; if they are meant as text, write them otherwise, with a space "
                "after the first character for one"
            )
        return found


def of_heldout(warnings: Iterable[str], trained: Iterable[str]) -> list[str]:
    """Select the warnings about held-out text that were not already given for the training text.

    Warnings that begin or end with a count (of lost data) are always kept. Others describe a property of the template,
    and are dropped if the training text has the same warning, apart from its numbers.

    Args:
        warnings: the warnings about the held-out text.
        trained: the warnings about the training text.
    """
    said = {re.sub(r"\d+", "", warning) for warning in trained}
    return [f"held-out text: {warning}" for warning in warnings
            if re.search(r"^\d|\d$", warning) or re.sub(r"\d+", "", warning) not in said]  # fmt: skip


def special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern that matches a tokenizer's special tokens in text.

    None if the tokenizer has no special tokens, or treats them in text like any other text.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = {str(token) for token in added if getattr(token, "special", False)}
    tokens |= {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}
    tokens.discard("")
    if not tokens or getattr(tokenizer, "split_special_tokens", False):
        return None
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def special_tokens(pattern: re.Pattern[str], messages: Iterable[Message], tools: Any) -> set[str]:
    """The special tokens, as matched by `pattern`, that occur in the messages or tools of a record."""
    return {token for text in _texts([[m.content, m.fields] for m in messages] + [tools])
            for token in pattern.findall(text)}  # fmt: skip


def _texts(value: Any) -> Iterable[str]:
    """Every string in a nested value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
