"""The chat template: the model's own or the plain one, and where it fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import ConfigurationError

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
        origin: "tokenizer" (the model's own) or "plain" (``PLAIN_TEMPLATE``; save it beside the model).
        template: the Jinja text.
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
    # The plain template starts as the tokenizer starts any text: with the start token, if the tokenizer adds one.
    bos = getattr(tokenizer, "bos_token_id", None)
    starts = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return TemplateInfo("plain", ("{{ bos_token }}" if starts else "") + PLAIN_TEMPLATE)


def in_parts(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their text as a list of parts, the form that templates of multimodal models may expect."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else {**message}
        for message in messages
    ]


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
        except Exception:  # it may reject this sample conversation; the user's own are checked when they are rendered
            continue


def template_name(tokenizer: Any) -> str:
    """What messages call the template: the name of its file, if it has one."""
    folder = getattr(tokenizer, "name_or_path", "") or ""
    file = Path(folder) / "chat_template.jinja"
    return f"the chat template {file}" if folder and file.is_file() else f"the chat template of {folder or 'the model'}"


def failing_line(error: BaseException) -> str:
    """The template line that raised, from the line number that Jinja puts in the traceback."""
    line, frame = 0, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return f"line {line} of the template: " if line else ""
