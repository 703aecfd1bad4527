"""What is learned of random conversations, against an oracle written by hand for each of many templates."""

from __future__ import annotations

from typing import Any

import pytest
from breadth import usual
from chat_templates import TEMPLATES, ChatTemplate, tokenizer_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from fp8pipe.models.language.text import IGNORED, Encoded, Message, Record, encode

texts = st.lists(
    st.sampled_from(["no", "yes", " ", "  ", "\n", "\n\n", "!", ".", "a", "É", "☃", "<", "{", '"', "think", "Q:"]),
    min_size=1, max_size=6,
).map("".join).filter(str.strip)  # fmt: skip
names = st.sampled_from(["find", "get_weather", "f2"])
arguments = st.dictionaries(st.sampled_from(["city", "n", "é"]), st.one_of(texts, st.integers(), st.none()), max_size=2)
calls = st.lists(st.tuples(names, arguments), min_size=1, max_size=2)


def called(chosen: list[tuple[str, dict]]) -> Message:
    functions = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in chosen]
    return Message("assistant", "", fields={"tool_calls": functions})


@st.composite
def conversations(draw: st.DrawFn, template: ChatTemplate) -> tuple[Record, list[str]]:
    """A record, and what a model has to learn of it."""
    messages, learned = [], []
    if template.system and draw(st.booleans()):
        messages.append(Message("system", draw(texts)))
    turns = draw(st.integers(1, 3))
    opens = template.opens_with_answer and draw(st.booleans())
    for turn in range(turns):
        if turn or not opens:
            messages.append(Message("user", draw(texts)))
        if template.calls and messages and draw(st.booleans()):
            chosen = draw(calls)
            messages += [called(chosen), *(Message("tool", draw(texts)) for _ in chosen)]
            learned.append(template.calls(chosen))
        answer, weight = draw(texts), draw(st.sampled_from([1, 1, 1, 0]))
        messages.append(Message("assistant", answer, learned=bool(weight) or not learned))
        learned += [template.answer(answer)] if messages[-1].learned else []
    tools = ({"type": "function", "function": {"name": "find", "parameters": {}}},) if template.calls else ()
    return Record(tuple(messages), tools), learned


def runs(tokenizer: Any, example: Encoded) -> list[tuple[int, str]]:
    """Where each run of learned tokens begins, and its text as it continues what comes before it."""
    found, ids, start = [], example.input_ids, 0
    for i, label in enumerate([*example.labels, IGNORED]):
        previous = example.labels[i - 1] if i else IGNORED
        if label != IGNORED and previous == IGNORED:
            start = i
        if label == IGNORED and previous != IGNORED:
            found.append((start, tokenizer.decode(ids[:i])[len(tokenizer.decode(ids[:start])) :]))
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    # The pieces of Llama 2's tokenizer cannot write DeepSeek's marks, which hold its sign for a space.
    [
        (name, kind)
        for name in TEMPLATES
        for kind in ("bytes", "pieces", "slow")
        if kind != "pieces" or not any("▁" in token for token in TEMPLATES[name].tokens)
    ],
)
def test_exactly_the_answers_and_their_end_marks_are_learned(name: str, kind: str) -> None:
    template, tokenizer = TEMPLATES[name], tokenizer_for(name, kind)

    @settings(
        deadline=None, max_examples=usual(14, long=250), suppress_health_check=[HealthCheck.too_slow], database=None
    )
    @given(conversations(template))
    def check(drawn: tuple[Record, list[str]]) -> None:
        record, expected = drawn
        result = encode([record], tokenizer, 100_000)
        found = [text for example in result.examples for _, text in runs(tokenizer, example)]
        assert found == expected
        # Nothing asks for an answer that a conversation begins with.
        opens = record.messages[0].role == "assistant" and record.messages[0].learned
        told = [warning for warning in result.warnings if template.told and template.told in warning]
        assert bool(told) == (bool(template.told) and len(found) > opens)
        assert [*result.warnings] == told or result.expanded
        prompts = _prompts(tokenizer, record)
        starts = [example.input_ids[:start] for example in result.examples for start, _ in runs(tokenizer, example)]
        assert "generation prompt ends in" in template.told or all(start in prompts for start in starts[opens:])

    check()


def _prompts(tokenizer: Any, record: Record) -> list[list[int]]:
    """What serving sends for each answer: all that comes before it, with the generation prompt."""
    from fp8pipe.models.language.text.template import forms

    found = []
    for form in forms(record.messages):
        for end, message in enumerate(record.messages):
            if message.role == "assistant" and end:
                try:
                    found.append(tokenizer.apply_chat_template(
                        form[:end], tools=list(record.tools) or None, add_generation_prompt=True, return_dict=False
                    ))  # fmt: skip
                except (TypeError, TemplateError):  # not the form of this template
                    continue
    return found
