"""What a chat template ignores is refused or counted."""

from __future__ import annotations

from typing import Any

import pytest
from chat_templates import tokenizer_for

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text import Message, Record, encode
from fp8pipe.models.language.text.encode import IGNORED
from fp8pipe.models.language.text.notes import Kind, Notes, of_heldout

TOOLS = ({"type": "function", "function": {"name": "find", "parameters": {}}},)


def call(name: str, content: str = "", **arguments: Any) -> Message:
    function = {"name": name, "arguments": arguments}
    return Message("assistant", content, fields={"tool_calls": [{"id": "1", "type": "function", "function": function}]})


def test_tool_calls_that_a_template_does_not_write_are_refused() -> None:
    record = Record((Message("user", "q"), call("find", "I look.", city="Rome")), place="line 7")
    with pytest.raises(ConfigurationError, match="loses a tool call of the record at line 7") as caught:
        encode([record], tokenizer_for("chatml", "bytes"), 512)
    assert "'find'" in caught.value.why
    assert caught.value.exit_code == 10
    unlearned = Record((Message("user", "q"), call("find", "I look."), Message("assistant", "a")))
    warnings = encode([unlearned], tokenizer_for("chatml", "bytes"), 512, last_only=True).warnings
    assert warnings == ("the chat template ignores tool calls of assistant messages: 1",)


def test_tools_fields_and_messages_that_a_template_passes_over_are_counted(make_tokenizer: Any) -> None:
    deaf = make_tokenizer(
        "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    thinking = Message("assistant", "a", fields={"reasoning_content": "because"})
    records = [Record((Message("system", "s!"), Message("user", "q"), thinking), TOOLS)] * 2
    assert encode(records, deaf, 512).warnings == (
        "the chat template ignores the content of system messages: 2",
        "the chat template ignores the field 'reasoning_content' of assistant messages: 2",
        "the chat template ignores the tools of records: 2",
    )
    # Content that is written in another way is not passed over.
    llama = tokenizer_for("llama-3", "bytes")
    asked = Record((Message("user", "q"), call("find"), Message("tool", '"18"\n'), Message("assistant", "a")), TOOLS)
    assert not any("template ignores" in warning for warning in encode([asked], llama, 512).warnings)


def test_reasoning_is_learned_where_the_template_writes_it() -> None:
    tokenizer = tokenizer_for("reasoning", "bytes")
    turns = [(Message("user", "q"), Message("assistant", "a", fields={"reasoning_content": why})) for why in "xy"]
    result = encode([Record((*turns[0], *turns[1]))], tokenizer, 512)
    found = [tokenizer.decode([label for label in e.labels if label != -100]) for e in result.examples]
    assert found == ["x\n</think>\n\na<|im_end|>", "y\n</think>\n\na<|im_end|>"]
    assert len(result.warnings) == 1  # of the examples


def test_a_generation_prompt_that_finished_turns_do_not_have_is_told_once() -> None:
    records = [Record((Message("user", "q"), Message("assistant", "because")))] * 3
    (told,) = encode(records, tokenizer_for("reasoning", "bytes"), 512).warnings
    assert "the generation prompt ends in '<think>\\n'" in told
    assert "'because" in told
    assert "3 answers" in told
    assert encode(records, tokenizer_for("chatml", "bytes"), 512).warnings == ()


def test_the_first_answer_of_a_kind_is_the_example() -> None:
    notes = Notes()
    notes.count(Kind.UNLIKE, "<think>", "first")
    later = Notes()
    later.count(Kind.UNLIKE, "<other>", "second")
    notes.add(later)
    (said,) = notes.sentences()
    assert "<think>" in said
    assert "2 answers" in said


def test_an_answer_that_is_rendered_in_part_is_not_learned() -> None:
    """DeepSeek-R1's template cuts reasoning off, so that what is left would be learned as the whole answer."""
    tokenizer = tokenizer_for("deepseek-r1", "bytes")
    thought = (Message("user", "q"), Message("assistant", "<think>\nbecause\n</think>\n\nyes"))
    plain = (Message("user", "q2"), Message("assistant", "no"))
    result = encode([Record(thought), Record((*thought, *plain)), Record((*plain, *thought))], tokenizer, 512)
    found = [tokenizer.decode([label for label in e.labels if label != IGNORED]) for e in result.examples]
    assert found == ["no<｜end▁of▁sentence｜>"] * 2
    assert tokenizer.decode(result.examples[0].input_ids).count("yes") == 1  # it is in the prompt, as when served
    assert result.dropped == 1
    assert any("1 of 3 examples were left out: the chat template renders only a part" in w for w in result.warnings)
    (told,) = (w for w in result.warnings if "a part of 3 answers" in w)
    assert repr("<think>\nbecause\n</th") in told
    with pytest.raises(ConfigurationError, match="no answer token is left") as caught:
        encode([Record(thought)], tokenizer, 512)
    assert "renders only a part of their answers" in caught.value.why
    assert "chat template" in caught.value.fix


def test_an_answer_that_is_only_spaced_otherwise_is_whole(make_tokenizer: Any) -> None:
    """As Qwen3's: reasoning is taken out of the content and written again; its opening mark is in the prompt."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
        "{% set thought = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' %}"
        "{{ 'A:<think>\n' + thought + '\n</think>\n\n' + parts[-1].strip() + '<|im_end|>' }}"
        "{% else %}{{ 'U:' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:<think>\n' }}{% endif %}"
    )
    messages = (Message("user", "q"), Message("assistant", "<think>because</think>yes"))
    result = encode([Record(messages)], tokenizer, 512)
    labels = [label for label in result.examples[0].labels if label != IGNORED]
    assert tokenizer.decode(labels) == "because\n</think>\n\nyes<|im_end|>"
    assert result.warnings == ()


def test_a_prompt_that_is_written_after_every_conversation_is_told(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant:")
    records = [Record((Message("user", "q"), Message("assistant", "a")))] * 2
    (told,) = encode(records, tokenizer, 512).warnings
    assert "writes 'assistant:' after every conversation" in told
    assert "the end of 2 answers" in told


@pytest.mark.parametrize("kind", ["bytes", "slow"])
def test_special_tokens_in_the_users_own_text_are_counted_and_stay_what_they_are(kind: str) -> None:
    tokenizer = tokenizer_for("chatml", kind)
    talk = (Message("user", "What does <|im_end|> mean? And <|im_end|>?"), Message("assistant", "the end"))
    field = {"reasoning_content": {"deep": ["<|im_start|>"]}}
    deep = (Message("user", "q"), Message("assistant", "a", fields=field), Message("user", "<|im_end|>"))
    records = [Record(talk), Record((Message("user", "<|im_end"), talk[1])), Record(deep)]
    result = encode(records, tokenizer, 512)
    (told,) = (w for w in result.warnings if "special tokens" in w)
    # Once a record; what follows the last answer is in no text.
    assert "'<|im_end|>' (in 1), '<|im_start|>' (in 1)" in told
    whole = [{"role": m.role, "content": m.content} for m in talk]
    assert result.examples[0].input_ids == tokenizer.apply_chat_template(whole, return_dict=False)


@pytest.mark.parametrize(
    "given", ["m.content[0].text", "m.content | selectattr('type', 'eq', 'text') | map(attribute='text') | join"]
)
def test_templates_that_want_texts_in_parts_get_them(make_tokenizer: Any, given: str) -> None:
    """As those of models that take images, too: the first fails with a text, the second renders it as nothing."""
    tokenizer = make_tokenizer(
        f"{{% for m in messages %}}{{{{ m.role }}}}:{{{{ {given} }}}}<|im_end|>{{% endfor %}}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = (Message("user", "q"), Message("assistant", " a\nb "), Message("user", "r"), Message("assistant", "c"))
    result = encode([Record(messages)], tokenizer, 512)
    assert tokenizer.decode(result.examples[0].input_ids) == (
        "user:q<|im_end|>assistant: a\nb <|im_end|>user:r<|im_end|>assistant:c<|im_end|>"
    )
    labels = [label for label in result.examples[0].labels if label != IGNORED]
    assert tokenizer.decode(labels) == " a\nb <|im_end|>c<|im_end|>"
    assert result.warnings == ()


def test_what_a_template_does_is_not_said_again_of_the_heldout_text() -> None:
    trained = ["the prompt ends in 'x' (12 answers)", "3 of 12 examples were cut to 64 tokens"]
    heldout = [
        "the prompt ends in 'x' (2 answers)",
        "1 of 2 examples were cut to 64 tokens",
        "the prompt ends in 'y' (1 answers)",
    ]
    assert of_heldout(heldout, trained) == [f"held-out text: {warning}" for warning in heldout[1:]]
