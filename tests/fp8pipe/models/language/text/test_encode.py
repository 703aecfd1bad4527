from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from chat_templates import tokenizer_for
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text.conversation import Message, Record
from fp8pipe.models.language.text.encode import IGNORED, Encoded, encode
from fp8pipe.models.language.text.template import PLAIN_TEMPLATE


def talk(*turns: str, system: str | None = None) -> Record:
    head = (Message("system", system),) if system else ()
    return Record(head + tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(turns)))


def learned(tokenizer: Any, example: Encoded) -> list[str]:
    """The runs of learned tokens, decoded."""
    runs: list[list[int]] = []
    previous = IGNORED
    for label in example.labels:
        if label != IGNORED:
            if previous == IGNORED:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(r) for r in runs]


def test_only_answers_with_their_end_of_turn_are_learned(tokenizer: Any) -> None:
    result = encode([talk("Hi", "Hello.", "And?", "é ☃", "left over"), talk("q", "a", system="s")], tokenizer, 512)
    first, second = result.examples
    assert learned(tokenizer, first) == ["Hello.<|im_end|>", "é ☃<|im_end|>"]
    assert learned(tokenizer, second) == ["a<|im_end|>"]
    whole = [{"role": m.role, "content": m.content} for m in talk("Hi", "Hello.", "And?", "é ☃").messages]
    assert first.input_ids == tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
    assert result.template.origin == "tokenizer"
    assert (result.truncated, result.dropped, result.expanded, result.warnings) == (0, 0, 0, ())


texts = st.text(min_size=1, max_size=12).filter(
    lambda t: t.strip() and t.encode("utf-8", "ignore").decode() == t and "<|" not in t
)


@settings(deadline=None, max_examples=60)
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), limit=st.integers(2, 80))
def test_prompts_are_what_serving_would_send(tokenizer: Any, turns: list[tuple[str, str]], limit: int) -> None:
    """Independent oracle: tokenize each prompt alone; the tokens up to each answer must be exactly those."""
    record = talk(*(t for turn in turns for t in turn))
    (example,) = encode([record], tokenizer, 100_000).examples
    messages = [{"role": m.role, "content": m.content} for m in record.messages]
    expected = [IGNORED] * len(example.input_ids)
    for k in range(1, len(messages), 2):
        prompt = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True, return_dict=False)
        answer = tokenizer(messages[k]["content"] + "<|im_end|>")["input_ids"]
        assert example.input_ids[: len(prompt)] == prompt
        expected[len(prompt) : len(prompt) + len(answer)] = answer
    assert example.labels == expected
    try:
        (cut,) = encode([record], tokenizer, limit).examples
    except ConfigurationError:
        assert all(label == IGNORED for label in expected[:limit])
    else:
        assert (cut.input_ids, cut.labels) == (example.input_ids[:limit], expected[:limit])


def test_a_tokenizer_without_offsets_gives_the_same(tokenizer: Any) -> None:
    class NoOffsets:
        """The same tokenizer, seen through the interface of those written in Python."""

        is_fast = False
        chat_template = tokenizer.chat_template
        apply_chat_template = staticmethod(tokenizer.apply_chat_template)

        def __call__(self, text: str, **options: Any) -> Any:
            return tokenizer(text, **options)

    records = [talk("Hi", "Hello.", "And?", "é ☃"), talk("q", "a", system="s")]
    assert encode(records, NoOffsets(), 512).examples == encode(records, tokenizer, 512).examples


@pytest.mark.parametrize("bos", [False, True])
def test_a_base_model_gets_the_plain_template(make_tokenizer: Callable[..., Any], bos: bool) -> None:
    tokenizer = make_tokenizer(None, bos)
    result = encode([talk("q", "a", "q2", "b", system="s")], tokenizer, 512)
    assert result.template.origin == "plain"
    assert result.template.template.endswith(PLAIN_TEMPLATE)
    (example,) = result.examples
    assert tokenizer.decode(example.input_ids) == ("<|im_start|>" if bos else "") + (
        "s\n\n### Question:\nq\n\n### Answer:\na<|im_end|>\n\n### Question:\nq2\n\n### Answer:\nb<|im_end|>\n\n"
    )
    assert learned(tokenizer, example) == ["a<|im_end|>", "b<|im_end|>"]
    assert any("no chat template" in w for w in result.warnings)


def test_a_template_that_rewrites_history_gives_one_example_for_each_answer(make_tokenizer: Any) -> None:
    # As reasoning templates do: only the last answer carries a reasoning block.
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'U:' + m['content'] + '\n' }}"
        "{% else %}{{ 'A:' + ('<think></think>' if loop.last else '') + m['content'] + '<|im_end|>\n' }}"
        "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    result = encode([talk("q", "a", "q2", "b")], tokenizer, 512)
    assert [tokenizer.decode(e.input_ids) for e in result.examples] == [
        "U:q\nA:<think></think>a<|im_end|>\n",
        "U:q\nA:a<|im_end|>\nU:q2\nA:<think></think>b<|im_end|>\n",
    ]
    assert [learned(tokenizer, e) for e in result.examples] == [
        ["<think></think>a<|im_end|>"],
        ["<think></think>b<|im_end|>"],
    ]
    assert result.expanded == 1


def test_a_generation_prompt_that_answers_lack(make_tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:<think>\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    # "<b>" shares its first letter with "<think>": the answer must not lose it.
    (example,) = encode([talk("q", "<b>x</b>")], tokenizer, 512).examples
    assert learned(tokenizer, example) == ["<b>x</b><|im_end|>"]


def test_templates_that_fail_name_the_record(make_tokenizer: Any) -> None:
    refusing = make_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(ConfigurationError, match="cannot render record 1") as caught:
        encode([talk("q", "a")], refusing, 64)
    assert "no system role" in caught.value.why
    losing = make_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ConfigurationError, match="loses the answer of record 1"):
        encode([talk("a", "lost"), talk("q", "lost")], losing, 64)


def test_truncation_is_counted_and_all_gone_is_an_error(tokenizer: Any) -> None:
    short, long = talk("q", "a"), talk("q" * 100, "a")
    result = encode([short, long], tokenizer, 60)
    assert len(result.examples) == 1
    assert (result.truncated, result.dropped) == (1, 1)
    assert any("left out" in w for w in result.warnings)
    with pytest.raises(ConfigurationError, match="no answer token is left") as caught:
        encode([long], tokenizer, 60)
    assert caught.value.exit_code == 10
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q" * 100}], add_generation_prompt=True, return_dict=False
    )
    assert f"{len(prompt)} tokens" in caught.value.why
    with pytest.raises(ConfigurationError, match="max_length is 1"):
        encode([short], tokenizer, 1)


def test_a_text_that_begins_with_an_answer(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    result = encode([Record((Message("assistant", "ab"),))], tokenizer, 512)
    assert result.warnings == (
        "1 of 1 examples begin with their answer, whose first token is not learned: nothing comes before it",
    )
    (example,) = result.examples
    assert learned(tokenizer, example) == ["b<|im_end|>"]  # nothing precedes "a" that could predict it


def test_answers_that_join_with_the_prompts_last_space_are_learned_whole() -> None:
    """All "no" were left out ("no answer token within 64 tokens"), and of "yes" only "es" was learned."""
    joining = tokenizer_for("ends-in-a-space", "bytes")
    result = encode([talk("q", "no"), talk("q", "yes", "q", "no")], joining, 64)
    assert [learned(joining, e) for e in result.examples] == [["no</s>"], ["yes</s>"], ["no</s>"]]
    prompt = joining.apply_chat_template([{"role": "user", "content": "q"}], add_generation_prompt=True)["input_ids"]
    assert all(e.input_ids[: len(prompt)] == prompt for e in result.examples[:2])
    assert (result.dropped, result.expanded) == (0, 1)
    (warning,) = result.warnings
    assert "1 conversations were cut into one example for each answer: tokens reach over the border" in warning


def test_what_is_left_out_is_counted_by_its_reason(tokenizer: Any) -> None:
    unlearned = Record((Message("user", "q"), Message("assistant", "a", learned=False)))
    result = encode([talk("q", "a"), talk("q" * 70, "a"), unlearned, unlearned], tokenizer, 60)
    assert (len(result.examples), result.dropped) == (1, 3)
    assert [w for w in result.warnings if "left out" in w] == [
        "1 of 4 examples were left out: no answer token within 60 tokens; prompts reach 89 tokens",
        "2 of 4 examples were left out: every answer of them has weight 0, or is not the last one",
    ]
    with pytest.raises(ConfigurationError, match="no answer token is left") as caught:
        encode([unlearned], tokenizer, 60)
    assert "every answer of them has weight 0" in caught.value.why


def test_an_answer_of_one_token_that_nothing_precedes(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    result = encode([Record((Message("assistant", "a"),)), talk("q", "a")], tokenizer, 512)
    assert [w for w in result.warnings if "left out" in w] == [
        "1 of 2 examples were left out: nothing comes before their only token, so that nothing can predict it"
    ]


def test_weights_and_the_last_answer_alone(tokenizer: Any) -> None:
    messages = talk("q", "a", "q2", "b", "q3", "c").messages
    weighted = Record((*messages[:3], replace(messages[3], learned=False), *messages[4:]))
    (example,) = encode([weighted], tokenizer, 512).examples
    assert learned(tokenizer, example) == ["a<|im_end|>", "c<|im_end|>"]
    (example,) = encode([weighted], tokenizer, 512, last_only=True).examples
    assert learned(tokenizer, example) == ["c<|im_end|>"]
    ended = Record((*messages[:5], replace(messages[5], learned=False)))
    assert encode([ended, weighted], tokenizer, 512, last_only=True).dropped == 1
