"""Data classes shared by this package: conversations and their messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

ROLES: Final = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image in the content of a message.

    Attributes:
        source: the path of its file, or a ``data:`` URI; see `images.image_source`.
        place: position in the data ("line 3, messages[0], part 2"), for error messages; ignored when compared.
        unread: keys of the part in the data that nothing reads; ignored when compared.
    """

    source: str
    place: str = field(default="", compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of ``ROLES``.
        content: text of the message, with `images.IMAGE_PLACEHOLDER` in the place of each image; empty if an assistant
            message only calls tools.
        learned: whether an assistant message is trained on; False if its ``weight`` (OpenAI's format) is 0.
        fields: all other fields that a chat template may read: ``tool_calls``, ``tool_call_id``, ``name``,
            ``reasoning_content`` and so on. The arguments of tool calls are objects, not JSON text.
        images: the images in the content, in order.
    """

    role: str
    content: str
    learned: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[ImagePart, ...] = ()


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
    def images(self) -> tuple[ImagePart, ...]:
        """The images of all messages, in order."""
        return tuple(part for message in self.messages for part in message.images)
