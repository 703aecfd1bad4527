"""Types shared by this package: messages, and conversations whose assistant messages are trained on."""

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
        content: its text; empty if an assistant message only calls tools.
        learned: for an assistant message, whether it is trained on (OpenAI's ``weight`` 0 excludes it).
        fields: everything else that a chat template may read: ``tool_calls``, ``tool_call_id``, ``name``,
            ``reasoning_content``, ... Arguments of tool calls are objects, as templates expect.
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
        tools: the tools that the assistant may call, as JSON schemas.
        place: where it was read ("line 3"), for messages; ignored when records are compared.
    """

    messages: tuple[Message, ...]
    tools: Sequence[Mapping[str, Any]] = ()
    place: str = field(default="", compare=False)
