"""What a chat template passes over is refused or counted."""

from __future__ import annotations

from typing import Any

import pytest
from chat_templates import tokenizer_for

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text import Message, Record, encode
from fp8pipe.models.language.text.render import Renderer
from fp8pipe.models.language.text.template import TemplateInfo

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
    assert warnings == ("the chat template passes over tool calls of assistant messages: 1",)


def test_tools_fields_and_messages_that_a_template_passes_over_are_counted(make_tokenizer: Any) -> None:
    deaf = make_tokenizer(
        "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    thinking = Message("assistant", "a", fields={"reasoning_content": "because"})
    records = [Record((Message("system", "s!"), Message("user", "q"), thinking), TOOLS)] * 2
    assert encode(records, deaf, 512).warnings == (
        "the chat template passes over the content of system messages: 2",
        "the chat template passes over the field 'reasoning_content' of assistant messages: 2",
        "the chat template passes over the tools of records: 2",
    )
    # Content that is written in another way is not passed over.
    llama = tokenizer_for("llama-3", "bytes")
    asked = Record((Message("user", "q"), call("find"), Message("tool", '"18"\n'), Message("assistant", "a")), TOOLS)
    assert not any("passes over" in warning for warning in encode([asked], llama, 512).warnings)


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


def test_the_first_answer_that_does_not_follow_its_prompt_is_the_example() -> None:
    renderer = Renderer(None, TemplateInfo("plain", ""))
    renderer.note_unlike("<think>", "first")
    renderer.note_unlike("<other>", "second")
    (said,) = renderer.warnings()
    assert "<think>" in said
    assert "2 answers" in said
