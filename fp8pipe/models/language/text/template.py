"""Determines the chat template to use: the model's own, or a plain one for models without; and locates its errors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text.conversation import Message

PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Answer:\\n' + message['content'] | trim + (eos_token or '') + '\\n\\n' }}"
    "{% else %}{{ '### Question:\\n' + message['content'] | trim + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer:\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TemplateInfo:
    """The chat template that was used.

    Attributes:
        origin: "tokenizer" for the model's own template, or "plain" for ``PLAIN_TEMPLATE``, which must then be saved
            with the model.
        template: source text of the Jinja template.
    """

    origin: str
    template: str


def template_info(tokenizer: Any) -> TemplateInfo:
    """The tokenizer's own chat template, or the plain one.

    Raises:
        ConfigurationError: the template is not valid Jinja.
    """
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):  # several named templates
        own = own.get("default")
    if own:
        _check_syntax(tokenizer)
        return TemplateInfo("tokenizer", own)
    # The plain template begins with the start token if the tokenizer puts that token before any text.
    bos = getattr(tokenizer, "bos_token_id", None)
    starts = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return TemplateInfo("plain", ("{{ bos_token }}" if starts else "") + PLAIN_TEMPLATE)


def in_parts(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of messages whose text content is a list of parts, as templates of multimodal models may expect it."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else {**message}
        for message in messages
    ]


def forms(messages: Sequence[Message]) -> list[list[dict[str, Any]]]:
    """Convert messages to the different forms that templates may expect, the most common form first.

    Most templates expect the arguments of tool calls as objects, some as JSON text. If a message only calls tools, most
    accept an empty content, but some require that the field is absent.
    """
    plain = [{"role": m.role, "content": m.content, **m.fields} for m in messages]
    if not any(m.fields.get("tool_calls") for m in messages):
        return [plain]
    absent = [{k: v for k, v in m.items() if k != "content" or v or not m.get("tool_calls")} for m in plain]
    return [plain, absent, [_as_text(m) for m in plain], [_as_text(m) for m in absent]]


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)},
        }
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _check_syntax(tokenizer: Any) -> None:
    from jinja2 import TemplateSyntaxError

    for tools in (None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tools=tools, tokenize=False)
        except TemplateSyntaxError as error:
            line = (error.source or "").splitlines()[error.lineno - 1 : error.lineno]
            raise ConfigurationError(
                f"{template_name(tokenizer)} is not valid",
                why=f"line {error.lineno}: {error.message}{f': {line[0].strip()[:120]}' if line else ''}",
                fix="correct the template, or take it from the model's publisher again",
            ) from error
        except Exception:  # a template may reject this test conversation; the user's own are checked when rendered
            continue


def template_name(tokenizer: Any) -> str:
    """Description of a tokenizer's template for error messages, with the path of its file if there is one."""
    folder = getattr(tokenizer, "name_or_path", "") or ""
    file = Path(folder) / "chat_template.jinja"
    return f"the chat template {file}" if folder and file.is_file() else f"the chat template of {folder or 'the model'}"


def failing_line(error: BaseException) -> str:
    """The line of the template that raised `error`, as the start of a message; empty if unknown."""
    line, frame = 0, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return f"line {line} of the template: " if line else ""
