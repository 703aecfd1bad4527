"""Conversations become token ids with labels: only the answers are learned.

The text is whatever the model's own chat template renders, tokenized whole, because that is what the model
will see when it is served. Which characters of it are an answer is found by rendering the conversation up
to each answer, with the generation prompt, and up to and including it: what the second adds to the first is
the answer with its end of turn (the white space that templates put after the end-of-turn token belongs to
the next turn: the model is never asked to produce it). This holds for any template that only appends. Some
do not (they drop earlier reasoning, or mark the last turn); their conversations are cut into one example
for each answer, each rendered as it would be when that answer is asked for.

A base model without a chat template gets ``PLAIN_TEMPLATE``, which the caller must save beside the model,
since the model has then learned it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text.records import Record

log = logging.getLogger(__name__)

IGNORED: Final = -100  # the label that cross entropy skips

PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Answer:\\n' + message['content'] | trim + (eos_token or '') + '\\n\\n' }}"
    "{% else %}{{ '### Question:\\n' + message['content'] | trim + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer:\\n' }}{% endif %}"
)
_BATCH: Final = 1000  # conversations tokenized at a time: bounds the memory of the offsets


@dataclass(frozen=True, slots=True)
class TemplateInfo:
    """The chat template that was used.

    Attributes:
        origin: "tokenizer" (the model's own) or "plain" (``PLAIN_TEMPLATE``; save it beside the model).
        template: the Jinja text.
    """

    origin: str
    template: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example: ``input_ids`` and ``labels`` of equal length; labels are -100 outside the answers.

    Labels stand at the position of their own token (the loss shifts them); the first is always -100, since
    nothing comes before it that could predict it.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that are learned."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, slots=True)
class Encoding:
    """What ``encode`` returns.

    Attributes:
        examples: in the order of the records.
        template: the template that rendered them.
        truncated: examples cut at the length limit.
        dropped: examples without an answer token left after the cut; they are not in ``examples``.
        expanded: conversations cut into one example for each answer.
        warnings: sentences for the manifest.
    """

    examples: list[Encoded]
    template: TemplateInfo
    truncated: int
    dropped: int
    expanded: int
    warnings: tuple[str, ...]


class _Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # character ranges of the answers, ascending


def template_info(tokenizer: Any) -> TemplateInfo:
    """The tokenizer's own chat template, or the plain one."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):  # several named templates
        own = own.get("default")
    if own:
        return TemplateInfo("tokenizer", own)
    # The plain template begins as the tokenizer begins any text: with the start token where it adds one.
    bos = getattr(tokenizer, "bos_token_id", None)
    starts = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return TemplateInfo("plain", ("{{ bos_token }}" if starts else "") + PLAIN_TEMPLATE)


def encode(records: Sequence[Record], tokenizer: Any, max_length: int) -> Encoding:
    """Tokenizes conversations and labels their answers.

    Args:
        records: the conversations.
        tokenizer: a transformers tokenizer.
        max_length: tokens kept of each example, at least 2; what is longer loses its end.

    Raises:
        ConfigurationError: a template that cannot render a record or loses its answer, or no answer token
            left
            in any example.
    """
    if max_length < 2:
        raise ConfigurationError(
            f"max_length is {max_length}",
            why="an example needs a prompt token and an answer token",
            fix="use for example 512",
        )
    template = template_info(tokenizer)
    examples: list[Encoded] = []
    truncated = dropped = expanded = longest_prompt = 0
    for start in range(0, len(records), _BATCH):
        rendered: list[_Rendered] = []
        for index, record in enumerate(records[start : start + _BATCH], start=start):
            pieces = _render(record, tokenizer, template, index)
            expanded += len(pieces) > 1
            rendered += pieces
        for whole in _tokenize(rendered, tokenizer):
            cut = Encoded(whole.input_ids[:max_length], whole.labels[:max_length])
            truncated += len(whole.input_ids) > max_length
            if cut.answer_tokens:
                examples.append(cut)
            else:
                dropped += 1
                prompt = next((i for i, label in enumerate(whole.labels) if label != IGNORED), len(whole.labels))
                longest_prompt = max(longest_prompt, prompt)
    if not examples:
        raise ConfigurationError(
            f"no answer token is left in any of the {len(records)} records",
            why=f"max_length {max_length} cuts every answer away; prompts reach {longest_prompt} tokens",
            fix="raise max_length, or shorten the prompts",
        )
    warnings = _warnings(len(examples) + dropped, truncated, dropped, expanded, max_length, template)
    for warning in warnings:
        log.warning(warning)
    return Encoding(examples, template, truncated, dropped, expanded, warnings)


def _warnings(
    total: int, truncated: int, dropped: int, expanded: int, max_length: int, template: TemplateInfo
) -> tuple[str, ...]:
    found = []
    if truncated:
        found.append(f"{truncated} of {total} examples were cut to {max_length} tokens")
    if dropped:
        found.append(f"{dropped} of {total} examples were left out: no answer token within {max_length} tokens")
    if expanded:
        found.append(
            f"{expanded} conversations were cut into one example for each answer: "
            "the chat template renders earlier answers differently once others follow"
        )
    if template.origin == "plain":
        found.append(
            "the tokenizer has no chat template; the plain question-answer template is used, and saved with the model"
        )
    return tuple(found)


def _render(record: Record, tokenizer: Any, template: TemplateInfo, index: int) -> list[_Rendered]:
    """The conversation's text and answer ranges; several texts where the template does not only append."""
    messages = [{"role": m.role, "content": m.content} for m in record.messages]
    ends = [i + 1 for i, m in enumerate(record.messages) if m.role == "assistant"]
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    for end in ends:
        text = _apply(messages[:end], tokenizer, template, index)
        # The white space after the end-of-turn mark is no part of the answer.
        spans.append((_answer_start(messages[:end], text, tokenizer, template, index), len(text.rstrip())))
        texts.append(text)
    final = texts[-1]
    # Turns after the last answer are prompts to nothing: they are left out.
    if all(final.startswith(text[:end]) for text, (_, end) in zip(texts, spans, strict=True)):
        return [_Rendered(final, spans)]
    return [_Rendered(text, [span]) for text, span in zip(texts, spans, strict=True)]


def _answer_start(messages: list[dict[str, str]], text: str, tokenizer: Any, template: TemplateInfo, index: int) -> int:
    """Where the last message's answer begins in ``text``; verified to hold the end of its content."""
    content = messages[-1]["content"].strip()
    if len(messages) > 1:
        prompt = _apply(messages[:-1], tokenizer, template, index, generation_prompt=True)
    else:  # templates do not render an empty conversation
        prompt = text[: max(text.find(content), 0)]
    start = len(prompt)
    if not text.startswith(prompt):
        # The generation prompt opens something (a reasoning block) that a finished answer lacks: take what
        # both share, but never a part of the answer itself.
        start = _shared(prompt, text)
        before = text.rfind(content)
        start = min(start, before) if before >= 0 else start
    ending = content.splitlines()[-1].strip() if content else ""
    if ending not in text[start:]:
        raise ConfigurationError(
            f"the chat template loses the answer of record {index + 1}",
            why=f"the rendered text does not end with the assistant's message {ending[:60]!r}",
            fix="use a tokenizer whose chat template renders assistant messages as they are given",
        )
    return start


def _shared(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _apply(
    messages: list[dict[str, str]],
    tokenizer: Any,
    template: TemplateInfo,
    index: int,
    *,
    generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template.template, tokenize=False, add_generation_prompt=generation_prompt
            )
        )
    except (TemplateError, TypeError, ValueError, IndexError) as error:
        raise ConfigurationError(
            f"the chat template cannot render record {index + 1}",
            why=f"{type(error).__name__}: {error}",
            fix="change its roles: some templates refuse system or tool messages, or two turns of one role",
        ) from error


def _tokenize(rendered: Sequence[_Rendered], tokenizer: Any) -> list[Encoded]:
    """One Encoded for each text; special tokens are those the template wrote, none are added."""
    texts = [r.text for r in rendered]
    if getattr(tokenizer, "is_fast", False):
        batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        starts = [[offset[0] for offset in offsets] for offsets in batch["offset_mapping"]]
        ids = batch["input_ids"]
    else:
        ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        starts = [_starts_by_prefix(r, i, tokenizer) for r, i in zip(rendered, ids, strict=True)]
    return [Encoded(list(i), _labels(i, s, r.spans)) for r, i, s in zip(rendered, ids, starts, strict=True)]


def _labels(ids: Sequence[int], starts: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Labels of the tokens that begin inside one of ``spans``."""
    labels = [IGNORED] * len(ids)
    position = 0
    for start, end in spans:
        while position < len(ids) and starts[position] < start:
            position += 1
        while position < len(ids) and starts[position] < end:
            labels[position] = ids[position]
            position += 1
    if labels:
        labels[0] = IGNORED
    return labels


def _starts_by_prefix(rendered: _Rendered, ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Stand-in offsets for tokenizers without them: exact at the borders of the spans, which suffices."""
    starts = [0] * len(ids)
    for border in (border for span in rendered.spans for border in span):
        prefix = list(tokenizer(rendered.text[:border], add_special_tokens=False)["input_ids"])
        shared = _shared(prefix, ids)
        starts[shared:] = [border] * (len(ids) - shared)
    return starts
