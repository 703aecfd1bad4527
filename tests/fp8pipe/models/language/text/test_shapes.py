from __future__ import annotations

import json
from collections import Counter

import pytest

from fp8pipe.models.language.text import Message, Record
from fp8pipe.models.language.text.shapes import parse_row

CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome", "day": None}}}
SCHEMA = {"name": "f", "parameters": {"type": "object"}}
TOOLS = ({"type": "function", "function": SCHEMA},)


def parse(row: object) -> Record:
    unused: Counter[str] = Counter()
    record = parse_row(row, "line 1", unused)
    assert not unused
    return record


def spoken(role: str, content: str = "", **fields: object) -> dict[str, object]:
    return {"role": role, "content": content, **fields}


AS_TEXT = {"type": "function", "function": {"name": "f", "arguments": json.dumps(CALL["function"]["arguments"])}}
CALLING = Record(
    (Message("user", "q"), Message("assistant", "", fields={"tool_calls": [CALL]}), Message("tool", "18"),
     Message("assistant", "a")), TOOLS,
)  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [spoken("user", "q"), spoken("assistant", None, tool_calls=[CALL]), spoken("tool", "18"),
                      spoken("assistant", "a")], "tools": list(TOOLS)},
        {"messages": [spoken("user", "q"), spoken("assistant", "", tool_calls=[AS_TEXT]), spoken("tool", "18"),
                      spoken("assistant", "a", tool_calls=[])], "tools": json.dumps([SCHEMA])},
        {"messages": [spoken("user", "q", tools=[SCHEMA]),
                      spoken("assistant", None, function_call=AS_TEXT["function"]), spoken("function", "18"),
                      spoken("assistant", "a", function_call=None, refusal=None)]},
        {"conversations": [{"from": "human", "value": "q"},
                           {"from": "function_call", "value": json.dumps(CALL["function"])},
                           {"from": "observation", "value": "18"}, {"from": "gpt", "value": "a"}], "tools": [SCHEMA]},
        {"conversations": json.dumps([spoken("user", "q"), spoken("assistant", None, tool_calls=[CALL["function"]]),
                                      spoken("ipython", "18"), spoken("assistant", "a")]), "functions": [SCHEMA]},
    ],
)  # fmt: skip
def test_tool_calls_of_every_shape_give_the_same_record(row: dict) -> None:
    assert parse(row) == CALLING


def test_what_stands_beside_a_shape() -> None:
    pair = (Message("user", "q"), Message("assistant", "a"))
    before = (Message("system", "s"), Message("user", "q0"), Message("assistant", "a0"))
    row = {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    assert parse(row) == Record(before + pair)
    assert parse(
        {"conversations": [spoken("developer", "s"), spoken("user", "q"), spoken("assistant", "a")]}
    ) == Record(before[:1] + pair)
    lists = {"prompt": [spoken("user", "q"), spoken("assistant", "x")], "completion": [spoken("assistant", "a")]}
    assert [(m.content, m.learned) for m in parse(lists).messages] == [("q", False), ("x", False), ("a", True)]
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "world"}]
    assert parse({"messages": [spoken("assistant", parts)]}).messages[0].content == "Hello world"


def test_weights_and_fields_of_messages() -> None:
    row = {"messages": [spoken("user", "q", name="Ann", weight=0), spoken("assistant", "a", weight=0),
                        spoken("assistant", "b", weight=1, reasoning_content="because")]}  # fmt: skip
    asked, first, second = parse(row).messages
    assert asked.fields == {"name": "Ann"}
    assert (first.learned, second.learned) == (False, True)
    assert second.fields == {"reasoning_content": "because"}
