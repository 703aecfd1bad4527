"""Conversations become text, as the model's chat template renders them, and ranges of it that are learned.

Which characters are an answer is found by rendering the conversation up to each answer, with the generation prompt, and
up to and including it: what the second adds to the first is the answer with its end of turn (the white space that
templates put after the end-of-turn token belongs to the next turn: the model is never asked to produce it). This holds
for any template that only appends. Some do not (they drop earlier reasoning, or mark the last turn); their
conversations are cut into one example for each answer, each rendered as it would be when that answer is asked for.

A template may also pass over what it is given: tools, roles, fields. Nothing tells but to leave it away and to compare.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text.conversation import Message, Record
from fp8pipe.models.language.text.template import TemplateInfo, failing_line, template_name

_OTHER: Final = ("\ue000", "\ue001")  # an answer that begins like no other: private characters
_SHOWN: Final = 20  # characters of an example
_NO_TEXT: Final = ("tool_calls", "tool_call_id", "id")  # checked otherwise, or of no meaning to the model


class Rendered(NamedTuple):
    """One text to learn from."""

    text: str
    spans: list[tuple[int, int]]  # character ranges of the learned answers, ascending


class Renderer:
    """Renders records by a tokenizer's template, and counts what the template passes over.

    Args:
        tokenizer: a transformers tokenizer.
        template: what ``template_info`` says of it.
        last_only: only the last answer of a conversation is learned.
    """

    def __init__(self, tokenizer: Any, template: TemplateInfo, *, last_only: bool = False) -> None:
        self._tokenizer, self._template, self._last_only = tokenizer, template, last_only
        self._seen: set[str] = set()  # fields and roles that change what is rendered
        self._passed_over: Counter[str] = Counter()
        self._unlike_prompt, self._endings = 0, ("", "")  # answers that do not follow the generation prompt; one's ends

    def render(self, record: Record, name: str) -> list[Rendered]:
        """The record's text and answer ranges; several texts where the template does not only append.

        Args:
            record: a conversation; where no answer of it is learned there is no text.
            name: of the record, for errors.

        Raises:
            ConfigurationError: a template that cannot render the record, or loses an answer.
        """
        learned = [i for i, m in enumerate(record.messages) if m.role == "assistant"]
        learned = [i for i in (learned[-1:] if self._last_only else learned) if record.messages[i].learned]
        failure: ConfigurationError | None = None
        for form in _forms(record.messages):
            view, before = _View(self, form, list(record.tools) or None, name), self._unlike_prompt
            try:
                pieces = view.pieces(learned)
            except ConfigurationError as error:
                failure, self._unlike_prompt = failure or error, before
                continue
            if pieces:
                self._look_for_losses(record, view, learned, pieces)
            return pieces
        assert failure is not None
        raise failure

    def warnings(self) -> list[str]:
        """A sentence for each kind of thing that the template passed over or renders otherwise when asked to answer."""
        found = [f"the chat template passes over {what}: {count}" for what, count in self._passed_over.items()]
        if self._unlike_prompt:
            asked, finished = self._endings
            found.append(
                f"the generation prompt ends in {asked!r}, which the text of a finished turn does not have (there "
                f"{finished!r} follows): served answers begin after it, trained ones do not ({self._unlike_prompt} "
                "answers)"
            )
        return found

    def note_unlike(self, asked: str, finished: str) -> None:
        """Count an answer whose rendered text does not begin with the generation prompt.

        Args:
            asked: how the prompt ends, from where both differ.
            finished: what the text of the finished turn has there.
        """
        if not self._unlike_prompt:
            self._endings = asked, finished
        self._unlike_prompt += 1

    def apply(self, messages: list[dict[str, Any]], tools: Any, name: str, *, prompt: bool = False) -> str:
        """What the template makes of these messages.

        Raises:
            ConfigurationError: it fails.
        """
        own = None if self._template.origin == "tokenizer" else self._template.template
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=own, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:  # a template is a program, and fails as programs do
            raise ConfigurationError(
                f"the chat template cannot render {name}",
                why=f"{failing_line(error)}{type(error).__name__}: {error}",
                fix="change its roles: some templates refuse system or tool messages, or two turns of one role; or "
                f"correct {template_name(self._tokenizer)}",
            ) from error

    def _look_for_losses(self, record: Record, view: _View, learned: Sequence[int], pieces: Sequence[Rendered]) -> None:
        """Counts contents, fields and tools without which the text would be the same."""
        last, final = learned[-1] + 1, pieces[-1].text
        alone = dict(zip(learned, pieces, strict=True)) if len(pieces) > 1 else {}
        for index, message in enumerate(record.messages[:last]):
            text, end = (alone[index].text, index + 1) if index in alone else (final, last)
            ending = _last_line(message.content)
            if ending not in text and view.unchanged(index, text, end, content=message.content + _OTHER[0]):
                self._passed_over[f"the content of {message.role} messages"] += 1
            for call in message.fields.get("tool_calls", ()):
                if call["function"]["name"] not in text:
                    self._passed_over[f"tool calls of {message.role} messages"] += 1
            if message.role == "assistant" and index not in learned:
                continue  # templates may drop the reasoning of earlier answers
            for key in message.fields.keys() - self._seen - set(_NO_TEXT):
                if view.unchanged(index, text, end, **{key: None}):
                    self._passed_over[f"the field {key!r} of {message.role} messages"] += 1
                else:
                    self._seen.add(key)
        if record.tools and "tools" not in self._seen:
            if self.apply(view.messages[:last], None, view.name) == final:
                self._passed_over["the tools of records"] += 1
            else:
                self._seen.add("tools")


class _View(NamedTuple):
    """One record in a form that a template may understand."""

    renderer: Renderer
    messages: list[dict[str, Any]]
    tools: Any
    name: str

    def pieces(self, learned: Sequence[int]) -> list[Rendered]:
        texts: list[str] = []
        spans: list[tuple[int, int]] = []
        for index in learned:
            text = self._apply(self.messages[: index + 1])
            start = self._answer_start(index, text)
            self._check_kept(self.messages[index], text[start:])
            spans.append((start, _answer_end(self.messages[index], text, start)))
            texts.append(text)
        # Turns after the last answer are prompts to nothing: they are left out.
        if all(texts[-1].startswith(text[:end]) for text, (_, end) in zip(texts, spans, strict=True)):
            return [Rendered(texts[-1], spans)] if texts else []
        return [Rendered(text, [span]) for text, span in zip(texts, spans, strict=True)]

    def unchanged(self, index: int, text: str, end: int, **change: Any) -> bool:
        """Whether the template renders the same with a changed message (None takes a field away)."""
        messages = self.messages[:end]
        messages[index] = {k: v for k, v in (messages[index] | change).items() if v is not None}
        try:
            return self._apply(messages) == text
        except ConfigurationError:  # it looks at it
            return False

    def _apply(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        return self.renderer.apply(messages, self.tools, self.name, prompt=prompt)

    def _answer_start(self, index: int, text: str) -> int:
        """Where the answer begins in ``text``."""
        start, prompt = len(text), ""
        if index:  # templates do not render an empty conversation
            prompt = self._apply(self.messages[:index], prompt=True)
            if text.startswith(prompt):
                return len(prompt)
            # The generation prompt opens something (a reasoning block) that a finished answer lacks: take what both
            # share.
            start = shared(prompt, text)
        # But never a part of the answer itself, which begins where another answer differs.
        content = str(self.messages[index].get("content") or "").lstrip()
        other = {"role": "assistant", "content": _OTHER[content.startswith(_OTHER[0])]}
        start = min(start, shared(self._apply([*self.messages[:index], other]), text))
        if prompt:
            self.renderer.note_unlike(prompt[start:], text[start : start + _SHOWN])
        return start

    def _check_kept(self, message: Mapping[str, Any], answer: str) -> None:
        ending = _last_line(str(message.get("content") or ""))
        if ending not in answer:
            raise ConfigurationError(
                f"the chat template loses the answer of {self.name}",
                why=f"the rendered text does not end with the assistant's message {ending[:60]!r}",
                fix="use a tokenizer whose chat template renders assistant messages as they are given",
            )
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = function["arguments"]
            keys = arguments if isinstance(arguments, dict) else json.loads(arguments)
            if missing := [word for word in (function["name"], *keys) if str(word) not in answer]:
                raise ConfigurationError(
                    f"the chat template loses a tool call of {self.name}",
                    why=f"the rendered answer does not hold {missing[0]!r} of the call to {function['name']!r}",
                    fix="use a model whose chat template renders tool_calls, or leave these records out",
                )


def _forms(messages: Sequence[Message]) -> list[list[dict[str, Any]]]:
    """The messages as templates may want them: first as most do.

    Most take arguments of tool calls as objects, some as JSON text; most render an empty content as nothing, some look
    for its absence.
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


def _answer_end(message: Mapping[str, Any], text: str, start: int) -> int:
    """The white space after the end-of-turn mark is no part of the answer, unless the answer itself ends in it."""
    end = len(text.rstrip())
    content = str(message.get("content") or "")
    at = text.rfind(content, start) if content and content[-1].isspace() else -1
    return max(end, at + len(content)) if at >= 0 else end


def _last_line(content: str) -> str:
    return content.strip().splitlines()[-1].strip() if content.strip() else ""


def shared(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
