"""The types that this package shares: messages, and conversations whose assistant messages are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

ROLES: Final = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: one of ``ROLES``.
        content: its text; empty where an assistant only calls tools.
        learned: of an assistant's message, whether it is learned (OpenAI's ``weight`` 0 means that it is not).
        fields: everything else that a chat template may read: ``tool_calls``, ``tool_call_id``, ``name``,
            ``reasoning_content``, ... The arguments of tool calls are objects, as templates expect them.
    """

    role: str
    content: str
    learned: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation with at least one assistant turn.

    Attributes:
        messages: its turns.
        tools: what the assistant may call, as JSON schemas.
        place: where it was read ("line 3"), for messages; two records that differ in it alone are equal.
    """

    messages: tuple[Message, ...]
    tools: Sequence[Mapping[str, Any]] = ()
    place: str = field(default="", compare=False)
