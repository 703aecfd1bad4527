"""Renders conversations with images: each image is passed to the chat template as a part of a message's content.

The template writes the processor's placeholder for it. Only a prompt can have images, because the processor is given
the text up to the first answer. So a conversation in which an image follows an answer becomes one example per answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text.conversation import Record
from fp8pipe.models.language.text.image_prompts import ImagePrompts
from fp8pipe.models.language.text.images import IMAGE_PLACEHOLDER
from fp8pipe.models.language.text.render import Rendered, Renderer
from fp8pipe.models.language.text.template import TemplateInfo, template_info


def image_template(images: ImagePrompts, tokenizer: Any) -> TemplateInfo:
    """The chat template with which prompts with images are rendered: the processor's, or else the tokenizer's.

    Raises:
        ConfigurationError: there is none, or it is not valid Jinja.
    """
    found = template_info(images.processor if images.processor.chat_template else tokenizer)
    if found.origin == "plain":
        raise ConfigurationError(
            "the model has no chat template, so images have no place in its prompts",
            why="neither its processor nor its tokenizer has one",
            fix="take chat_template.jinja from the model's publisher, or give text without image parts",
        )
    return found


class ImageRenderer(Renderer):
    """A `Renderer` for records with images and without.

    Args:
        images: the checkpoint's processor.
        tokenizer: its tokenizer.
        template: from `image_template`.
        last_only: train only on the last answer of a conversation.
    """

    def __init__(self, images: ImagePrompts, tokenizer: Any, template: TemplateInfo, *, last_only: bool) -> None:
        super().__init__(tokenizer, template, last_only=last_only)
        self._renders, self._source = images.processor, template.template
        self._images, self._has_images = images, False

    def render(self, record: Record, name: str) -> list[Rendered]:
        """Like `Renderer.render`; the result also has the images of the rendered messages.

        Raises:
            ConfigurationError: as there; or a prompt does not have exactly one placeholder per image.
        """
        self._refuse_written_placeholders(record, name)
        self._has_images = bool(record.images)
        pieces = super().render(record, name)
        if not record.images:
            return pieces
        return [self._with_images(piece, record, name) for piece in pieces]

    def apply(self, messages: list[dict[str, Any]], tools: Any, name: str, *, prompt: bool = False) -> str:
        """Like `Renderer.apply`; each `IMAGE_PLACEHOLDER` in the messages becomes a part of type `image`."""
        return super().apply(with_image_parts(messages) if self._has_images else messages, tools, name, prompt=prompt)

    def joined(self, answers: Mapping[int, Rendered], record: Record) -> list[Rendered]:
        """Like `Renderer.joined`, but one text per answer if an image follows the first answer."""
        if answers and any(message.images for message in record.messages[min(answers) : max(answers)]):
            return [*answers.values()]
        return super().joined(answers, record)

    def _with_images(self, piece: Rendered, record: Record, name: str) -> Rendered:
        images = tuple(part for message in record.messages[: piece.messages] for part in message.images)
        count = piece.text[: piece.spans[0][0]].count(self._images.placeholder)
        if count != len(images):
            raise ConfigurationError(
                f"the chat template does not place the images of {name}",
                why=f"its prompt has {len(images)} images and {count} times the processor's placeholder "
                f"{self._images.placeholder!r}",
                fix="use the chat template that belongs to the model's processor",
            )
        return piece._replace(images=images)

    def _refuse_written_placeholders(self, record: Record, name: str) -> None:
        """Refuse text that the model would take for an image: the processor's placeholder, and its image tokens."""
        processor = self._images.processor
        ids = [number for number in processor.image_token_ids if number is not None]
        for token in (self._images.placeholder, *processor.tokenizer.convert_ids_to_tokens(ids)):
            if any(token in message.content for message in record.messages):
                raise ConfigurationError(
                    f"the text of {name} holds {token!r}",
                    why="it stands for an image, and none is given for it",
                    fix="remove it; where an image belongs, give the image as a part of the message's content",
                )


def with_image_parts(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of messages in which each `IMAGE_PLACEHOLDER` in the content is a part of type `image`.

    Args:
        messages: their contents are text, or lists of text parts (see `template.in_parts`).
    """
    found = []
    for message in messages:
        content = message.get("content")
        texts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
        if any(IMAGE_PLACEHOLDER in text for text in texts):
            found.append({**message, "content": [part for text in texts for part in _parts(text)]})
        else:
            found.append({**message})
    return found


def _parts(text: str) -> Iterable[dict[str, Any]]:
    for number, written in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if number:
            yield {"type": "image"}
        if written:
            yield {"type": "text", "text": written}
