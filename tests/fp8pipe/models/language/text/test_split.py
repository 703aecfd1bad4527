from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text import Message, Record, split


def pair(prompt: str, answer: str = "a") -> Record:
    return Record((Message("user", prompt), Message("assistant", answer)))


prompts = st.text(alphabet="ab ?", min_size=1, max_size=3)
conversations = st.lists(st.tuples(prompts, prompts), min_size=1, max_size=3).map(
    lambda turns: Record(tuple(m for q, a in turns for m in (Message("user", q), Message("assistant", a))))
)


def contexts(record: Record) -> set[tuple[tuple[str, str], ...]]:
    """Every prompt that the record's answers are given to, as plainly normalised text."""
    plain = [(m.role, " ".join(m.content.split()).rstrip("? ") or " ".join(m.content.split())) for m in record.messages]
    return {tuple(plain[:i]) for i, m in enumerate(record.messages) if m.role == "assistant"}


@settings(deadline=None)
@given(st.lists(conversations, min_size=2, max_size=30), st.integers(0, 5), st.integers(0, 3))
def test_no_prompt_is_on_both_sides(records: list[Record], count: int, seed: int) -> None:
    try:
        train, heldout = split(records, heldout_count=count, seed=seed)
    except ConfigurationError:
        return
    assert train
    assert not {c for r in train for c in contexts(r)} & {c for r in heldout for c in contexts(r)}
    both = train + heldout
    assert all(record in both for record in records)
    assert all(both.count(record) == 1 for record in both)
    openings = [min(contexts(record), key=len) for record in both]
    if len(heldout) > count:  # then they have one opening, and no other is shared by fewer
        assert len(set(openings[len(train) :])) == 1
        assert len(heldout) == min(map(openings.count, openings))
    assert (train, heldout) == split(records, heldout_count=count, seed=seed)


def test_prompts_that_differ_only_in_case_space_and_closing_punctuation_stay_together() -> None:
    said: list[str] = []
    records = [pair("What is AI?", "1"), pair("what  is ai", "2"), pair("C++", "3")]
    for seed in range(4):
        train, heldout = split([*records, records[0]], heldout_count=2, seed=seed, warn=said.append)
        assert (train, heldout) in [(records[:2], records[2:]), (records[2:], records[:2])]
    assert said == ["1 of 4 records were left out: they repeat another one exactly"] * 4


def test_answers_to_few_prompts_are_all_kept() -> None:
    """Of 200 records with 10 prompts, 9 were trained on and 1 held out, without a word."""
    records = [pair(f"q{i % 10}", str(i)) for i in range(200)]
    said: list[str] = []
    train, heldout = split(records, heldout_fraction=0.1, seed=0, warn=said.append)
    assert (len(train), len(heldout), said) == (180, 20, [])
    assert not {r.messages[0].content for r in train} & {r.messages[0].content for r in heldout}
    few = [pair(f"q{i % 3}", str(i)) for i in range(200)]
    train, heldout = split(few, heldout_fraction=0.1, seed=0, warn=said.append)
    assert (len(train), len(heldout)) == (134, 66)
    assert "66 records are held out where 20 were asked for" in said[0]
    with pytest.raises(ConfigurationError, match="cannot be held out") as caught:
        split([pair("q", str(i)) for i in range(9)], heldout_fraction=0.1, seed=0)
    assert "same prompt" in caught.value.why


def test_a_record_differs_by_everything_in_it() -> None:
    plain = pair("q")
    weighted = Record((Message("user", "q"), Message("assistant", "a", learned=False)))
    called = Record(
        (Message("user", "q"), Message("assistant", "a", fields={"tool_calls": [{"function": {"name": "f"}}]}))
    )
    tools = Record(plain.messages, ({"type": "function"},))
    elsewhere = Record(plain.messages, place="line 9")
    train, _ = split([plain, weighted, called, tools, elsewhere], heldout_count=0, seed=0, warn=lambda _: None)
    assert train == [plain, weighted, called, tools]


@pytest.mark.parametrize("opening", [[], [Message("system", "s")], [Message("assistant", "Hello!")]])
def test_conversations_that_begin_with_the_assistant(opening: list[Message]) -> None:
    greeted = [
        Record((*opening, Message("assistant", "Hi!"), Message("user", f"q{i}"), Message("assistant", "a")))
        for i in range(20)
    ]
    train, heldout = split(greeted, heldout_count=4, seed=0)
    assert (len(train), len(heldout)) == (16, 4)
    spoken = [Record((*opening, Message("assistant", f"Line {i}"))) for i in range(20)]  # answers alone
    train, heldout = split(spoken, heldout_count=4, seed=0)
    assert (len(train), len(heldout)) == (16, 4)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"heldout_count": 1, "heldout_fraction": 0.1}, {"heldout_count": 3}, {"heldout_count": -1},
     {"heldout_fraction": 1.0}, {"heldout_fraction": -0.1}, {"heldout_fraction": float("nan")}],
)  # fmt: skip
def test_what_cannot_be_held_out(arguments: dict) -> None:
    with pytest.raises(ConfigurationError):
        split([pair("a"), pair("b"), pair("c")], seed=0, **arguments)


def test_the_fraction_is_of_distinct_records_and_rounds_up() -> None:
    records = [pair(str(i % 50)) for i in range(200)]  # each four times
    train, heldout = split(records, heldout_fraction=0.11, seed=1)
    assert (len(train), len(heldout)) == (44, 6)
    assert heldout != split(records, heldout_fraction=0.11, seed=2)[1]
