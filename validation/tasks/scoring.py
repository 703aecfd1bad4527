"""What scores texts: an engine, which gets token ids and returns the log-probabilities of their last ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text whose end is scored.

    Attributes:
        ids: token ids, at least two.
        start: number of tokens, at least one, before the part that is scored.
    """

    ids: tuple[int, ...]
    start: int


class Score(NamedTuple):
    """The score of a continuation: its log-probability (nats), and whether each of its tokens is the likeliest."""

    logprob: float
    greedy: bool


class Scorer(Protocol):
    """A model in an engine.

    Attributes:
        versions: versions of the engine's packages, once it has scored something.
    """

    versions: dict[str, str]

    def score(self, texts: Sequence[Continuation]) -> list[Score]:
        """The scores of continuations, in their order."""
