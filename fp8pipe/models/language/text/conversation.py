"""Data classes shared by this package: conversations and their messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

ROLES: Final = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of ``ROLES``.
        content: text of the message, with `images.MARK` in the place of each image; empty if an assistant message only
            calls tools.
        learned: whether an assistant message is trained on; False if its ``weight`` (OpenAI's format) is 0.
        fields: all other fields that a chat template may read: ``tool_calls``, ``tool_call_id``, ``name``,
            ``reasoning_content`` and so on. The arguments of tool calls are objects, not JSON text.
        images: sources of the images in the content, in order; see `images.image_source`.
    """

    role: str
    content: str
    learned: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation with at least one assistant message.

    Attributes:
        messages: the messages in order.
        tools: the tools that the assistant may call, as JSON schemas.
        place: position in the data ("line 3"), for error messages; ignored when records are compared.
    """

    messages: tuple[Message, ...]
    tools: Sequence[Mapping[str, Any]] = ()
    place: str = field(default="", compare=False)

    @property
    def images(self) -> tuple[str, ...]:
        """Sources of the images of all messages, in order."""
        return tuple(source for message in self.messages for source in message.images)
