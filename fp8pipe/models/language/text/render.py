"""Renders conversations with the model's chat template, and finds the character ranges of the answers to train on.

To locate an answer, the conversation is rendered twice: up to the answer with the generation prompt, and up to and
including the answer. The text that the second rendering adds is the answer with its end-of-turn token. (White space
after that token belongs to the next turn, because the model never has to generate it.) This works if rendering a longer
conversation only appends text. Some templates change earlier text (they drop earlier reasoning, or mark the last turn);
their conversations are split into one example per answer, each rendered as when that answer is requested.

If the text of the finished turn does not begin with the generation prompt (for instance because the prompt opens a
reasoning block), the answer begins at the first character that depends on the answer's content. If a template renders
only a part of an answer, the answer is not trained on at all.

A template may also ignore some of its input, such as tools, roles or fields. To detect this, each of them is removed
or changed, and the renderings are compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text.conversation import ImagePart, Record
from fp8pipe.models.language.text.notes import Kind, Notes, special_pattern, special_tokens
from fp8pipe.models.language.text.template import TemplateInfo, failing_line, forms, in_parts, template_name

_OTHERS: Final = ("\ue000", "0")  # substitute answers; no answer begins with the same character as both of them
_SHOWN: Final = 20  # number of characters of a text shown in a warning
_NO_TEXT: Final = ("tool_calls", "tool_call_id", "id")  # fields that are checked elsewhere, or irrelevant to the model


class Rendered(NamedTuple):
    """One rendered text to train on."""

    text: str
    spans: list[tuple[int, int]]  # character ranges (start, end) of the answers to train on, in ascending order
    messages: int  # number of the record's messages that were rendered
    images: tuple[ImagePart, ...] = ()  # the images of these messages


class Renderer:
    """Renders records with a chat template, and collects observations about the template for warnings.

    Args:
        tokenizer: a transformers tokenizer.
        template: the chat template, from ``template_info``.
        last_only: train only on the last answer of a conversation.

    Attributes:
        notes: observations over all records rendered so far.
        silent: for each role of the last message, whether the template adds no generation prompt after it.
    """

    def __init__(self, tokenizer: Any, template: TemplateInfo, *, last_only: bool = False) -> None:
        self._tokenizer, self._last_only = tokenizer, last_only
        self._renders, self._source = tokenizer, None if template.origin == "tokenizer" else template.template
        self._seen: set[str] = set()  # fields and roles that are known to change the rendered text
        self._special = special_pattern(tokenizer)
        self.silent: dict[str, bool] = {}
        self.notes = Notes()

    def render(self, record: Record, name: str) -> list[Rendered]:
        """Render a record and locate its answers.

        Args:
            record: a conversation.
            name: the record's name in error messages.

        Returns:
            One text with the ranges of all answers to train on; or one text per answer, if the template does not only
            append; or nothing, if no answer is trained on.

        Raises:
            ConfigurationError: the template cannot render the record, or omits an answer.
        """
        learned = [i for i, m in enumerate(record.messages) if m.role == "assistant"]
        learned = [i for i in (learned[-1:] if self._last_only else learned) if record.messages[i].learned]
        failure: ConfigurationError | None = None
        every = forms(record.messages)
        for form, parts in [(form, parts) for parts in (False, True) for form in every]:
            view = _View(self, form, list(record.tools) or None, name, Notes(), parts)
            try:
                found = view.answers(learned)
            except ConfigurationError as error:
                failure = failure or error
                continue
            pieces = self.joined(found, record)
            if pieces:
                self._look_for_losses(record, view, [*found], pieces)
            if pieces and self._special is not None:
                read = record.messages[: max(found) + 1]
                view.notes.special.update(special_tokens(self._special, read, record.tools))
            self.notes.add(view.notes)
            return pieces
        assert failure is not None
        raise failure

    def joined(self, answers: Mapping[int, Rendered], record: Record) -> list[Rendered]:
        """Combine the texts of all answers into one if each is a continuation of the previous ones; else keep them.

        Args:
            answers: the answers to train on, by index of their messages in `record`.
            record: the conversation.
        """
        pieces = [*answers.values()]
        # Turns after the last answer are never trained on, so they are left out.
        if pieces and all(pieces[-1].text.startswith(piece.text[: piece.spans[0][1]]) for piece in pieces):
            return [pieces[-1]._replace(spans=[span for piece in pieces for span in piece.spans])]
        return pieces

    def apply(self, messages: list[dict[str, Any]], tools: Any, name: str, *, prompt: bool = False) -> str:
        """Render messages with the chat template.

        Args:
            messages: the messages, in a form that the template accepts.
            tools: JSON schemas of the tools, or None.
            name: the record's name in error messages.
            prompt: add the generation prompt.

        Raises:
            ConfigurationError: the template fails.
        """
        try:
            return str(
                self._renders.apply_chat_template(
                    messages, tools=tools, chat_template=self._source, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:  # a template is a program and may raise any type
            raise ConfigurationError(
                f"the chat template cannot render {name}",
                why=f"{failing_line(error)}{type(error).__name__}: {error}",
                fix="change its roles: some templates refuse system or tool messages, or two turns of one role; or "
                f"correct {template_name(self._tokenizer)}",
            ) from error

    def _look_for_losses(self, record: Record, view: _View, learned: Sequence[int], pieces: Sequence[Rendered]) -> None:
        """Count contents, fields and tools of a record that the template ignores, that is, that do not change the text.

        Args:
            record: the conversation.
            view: the form of the record that was rendered.
            learned: indices of the messages that are trained on.
            pieces: the rendered texts.
        """
        last, final = learned[-1] + 1, pieces[-1].text
        alone = dict(zip(learned, pieces, strict=True)) if len(pieces) > 1 else {}
        for index, message in enumerate(record.messages[:last]):
            text, end = (alone[index].text, index + 1) if index in alone else (final, last)
            ending = _last_line(message.content)
            if ending not in text and view.unchanged(index, text, end, content=message.content + _OTHERS[0]):
                view.notes.passed_over[f"the content of {message.role} messages"] += 1
            for call in message.fields.get("tool_calls", ()):
                if call["function"]["name"] not in text:
                    view.notes.passed_over[f"tool calls of {message.role} messages"] += 1
            if message.role == "assistant" and index not in learned:
                continue  # templates may drop the reasoning of earlier answers
            for key in message.fields.keys() - self._seen - set(_NO_TEXT):
                if view.unchanged(index, text, end, **{key: None}):
                    view.notes.passed_over[f"the field {key!r} of {message.role} messages"] += 1
                else:
                    self._seen.add(key)
        if record.tools and "tools" not in self._seen:
            if view.apply(view.messages[:last], tools=False) == final:
                view.notes.passed_over["the tools of records"] += 1
            else:
                self._seen.add("tools")


class _View(NamedTuple):
    """One record in one of the forms that templates may accept, see `forms`."""

    renderer: Renderer
    messages: list[dict[str, Any]]
    tools: Any
    name: str
    notes: Notes
    parts: bool  # whether contents are passed as lists of parts, see `in_parts`

    def answers(self, learned: Sequence[int]) -> dict[int, Rendered]:
        """The text up to the end of each answer in `learned`, with its range; partly rendered answers are omitted."""
        found = {}
        for index in learned:
            text = self.apply(self.messages[: index + 1])
            prompt = self.apply(self.messages[:index], prompt=True) if index else ""
            start, unlike = self._answer_start(index, text, prompt)
            if not self._is_whole(index, text, start):
                continue
            if unlike:
                self.notes.count(Kind.UNLIKE, *unlike)
            if index and self._takes_no_prompt(index, prompt):
                self._note_headers(index, text, prompt)
            found[index] = Rendered(text, [(start, _answer_end(self.messages[index], text, start))], index + 1)
        return found

    def unchanged(self, index: int, text: str, end: int, **change: Any) -> bool:
        """Whether the first `end` messages are still rendered as `text` if fields of message `index` are changed.

        A change to None removes the field.
        """
        messages = self.messages[:end]
        messages[index] = {k: v for k, v in (messages[index] | change).items() if v is not None}
        try:
            return self.apply(messages) == text
        except ConfigurationError:  # the template fails, so it reads the field
            return False

    def apply(self, messages: list[dict[str, Any]], *, prompt: bool = False, tools: bool = True) -> str:
        """Render messages like `Renderer.apply`, in the form of this view, with or without the record's tools.

        Raises:
            ConfigurationError: the template fails.
        """
        given = in_parts(messages) if self.parts else messages
        return self.renderer.apply(given, self.tools if tools else None, self.name, prompt=prompt)

    def _takes_no_prompt(self, index: int, prompt: str) -> bool:
        """Whether the template adds no generation prompt before message `index`, although it is requested."""
        silent, role = self.renderer.silent, self.messages[index - 1]["role"]
        if role not in silent:
            silent[role] = self.apply(self.messages[:index]) == prompt
        return silent[role]

    def _answer_start(self, index: int, text: str, prompt: str) -> tuple[int, tuple[str, ...]]:
        """Find where an answer begins in the rendered text.

        Args:
            index: index of the answer's message.
            text: the conversation rendered up to and including the answer.
            prompt: the conversation before the answer, rendered with the generation prompt.

        Returns:
            Position of the answer in `text`; and, if `text` does not begin with `prompt`, excerpts of `prompt` and
            `text` from the point where they diverge.
        """
        if not index:  # templates do not render an empty conversation
            return self._fork(index, text), ()
        if text.startswith(prompt):
            return len(prompt), ()
        # The generation prompt opens something (such as a reasoning block) that a finished answer lacks.
        fork = self._fork(index, text)
        alike = min(fork, shared(prompt, text))
        alike -= prompt[:alike].endswith("<")  # if they diverge inside a tag, step back to its "<"
        # Text that precedes every answer does not belong to the answer, unless it is only white space.
        start = fork if text[alike:fork].strip() else alike
        return start, (prompt[alike:][-_SHOWN:], text[alike : alike + _SHOWN])

    def _fork(self, index: int, text: str) -> int:
        """Position in `text` from which the rendering depends on the content of answer `index`."""
        others = ([*self.messages[:index], {"role": "assistant", "content": other}] for other in _OTHERS)
        return min(shared(self.apply(other), text) for other in others)

    def _note_headers(self, index: int, text: str, prompt: str) -> None:
        """Count headers and trailers that become part of an answer because there is no separate generation prompt."""
        if (header := text[len(prompt) : self._fork(index, text)]).strip():
            self.notes.count(Kind.HEADER, header)
        try:
            followed = self.apply([*self.messages[: index + 1], {"role": "user", "content": _OTHERS[0]}])
        except ConfigurationError:  # the template does not accept a user message here
            return
        tail = text[shared(followed, text) :]
        if tail.strip() and prompt.endswith(tail):
            self.notes.count(Kind.TRAILER, tail)

    def _is_whole(self, index: int, text: str, start: int) -> bool:
        """Whether the template renders an answer completely, except for white space at its ends.

        Args:
            index: index of the answer's message.
            text: the conversation rendered up to and including the answer.
            start: position in `text` at which the answer begins.

        Raises:
            ConfigurationError: the template omits the answer or one of its tool calls altogether.
        """
        self._check_calls(self.messages[index], text[start:])
        content = str(self.messages[index].get("content") or "").strip()
        if content in text[start:]:
            return True
        # The answer's first characters may be part of the prompt, such as the tag that opens a reasoning block.
        before = self.apply(self.messages[:index]) if index else ""
        if _squeezed(content) in _squeezed(text[shared(before, text) :]):
            return True
        if self.unchanged(index, text, index + 1, content=content + _OTHERS[0]):
            raise ConfigurationError(
                f"the chat template loses the answer of {self.name}",
                why=f"it renders the same without the assistant's message {content[-60:]!r}",
                fix="use a tokenizer whose chat template renders assistant messages as they are given",
            )
        self.notes.count(Kind.PARTIAL, content[:_SHOWN], text[start:][:_SHOWN])
        return False

    def _check_calls(self, message: Mapping[str, Any], answer: str) -> None:
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


def _answer_end(message: Mapping[str, Any], text: str, start: int) -> int:
    """Position in `text` at which the answer ends.

    White space at the end of `text` is excluded, unless it belongs to the answer's own content.
    """
    end = len(text.rstrip())
    content = str(message.get("content") or "")
    at = text.rfind(content, start) if content and content[-1].isspace() else -1
    return max(end, at + len(content)) if at >= 0 else end


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _last_line(content: str) -> str:
    return content.strip().splitlines()[-1].strip() if content.strip() else ""


def shared(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of the common prefix of two sequences."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
