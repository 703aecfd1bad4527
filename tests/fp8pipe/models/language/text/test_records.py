from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.models.language.text.records import Message, Record, load_records, split


def write(tmp_path: Path, *lines: str | bytes) -> str:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return str(path)


def pair(prompt: str, answer: str = "a") -> Record:
    return Record((Message("user", prompt), Message("assistant", answer)))


GOOD = json.dumps({"prompt": "q", "completion": "a"})


def test_the_three_shapes_give_the_same_records(tmp_path: Path) -> None:
    src = write(
        tmp_path,
        json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        GOOD,
        "",
        json.dumps({"instruction": "q", "input": "", "output": "a", "id": 7}),
        json.dumps({"instruction": "q", "output": "a"}),
        json.dumps({"instruction": "q", "input": "x", "output": "a"}),
    )
    assert load_records(src) == [pair("q", "a")] * 4 + [pair("q\n\nx", "a")]


def test_text_is_kept_exactly(tmp_path: Path) -> None:
    # U+2028 is a line break to str.splitlines, not to JSON lines; the byte-order mark is no part of line 1.
    src = write(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps({"prompt": " é\u2028 ", "completion": "\nb"}, ensure_ascii=False).encode(),
    )
    assert load_records(src) == [pair(" é\u2028 ", "\nb")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "q", ', "not valid JSON"),
        ("[1, 2]", "must be an object, not a list"),
        ("[", "one object a line"),
        ("[" * 100_000, "JSON"),
        (b"\xff\xfe", "not UTF-8"),
        ('{"prompt": "q"}', "'completion' is missing"),
        ('{"prompt": "q", "completion": null}', "'completion' is null"),
        ('{"prompt": 3, "completion": "a"}', "'prompt' must be text, not a number"),
        ('{"prompt": "q", "completion": " "}', "'completion' is empty"),
        ('{"prompt": "q", "completion": "\\ud800"}', "unpaired surrogate"),
        ('{"instruction": "q"}', "'output' is missing"),
        ('{"instruction": "q", "input": [], "output": "a"}', "'input' must be text, not a list"),
        ('{"text": "q"}', "keys not understood ('text')"),
        ("{}", "keys not understood (none)"),
        ('{"messages": "q"}', "must be a list"),
        ('{"messages": []}', "no assistant message"),
        ('{"messages": ["q"]}', "messages[0] must be an object"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "no assistant message"),
        ('{"messages": [{"role": "bot", "content": "q"}]}', "role 'bot' is not one of"),
        (
            '{"messages": [{"role": "user", "content": ["q"]}]}',
            "messages[0]: 'content' must be text, not a list",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str | bytes, said: str) -> None:
    # The "[" hint is for the first line only; elsewhere the bad line stands third.
    lines = [line] if line == "[" else [GOOD, "", line, GOOD]
    with pytest.raises(ConfigurationError) as caught:
        load_records(write(tmp_path, *lines))
    assert f"line {1 if line == '[' else 3}: " in caught.value.why
    assert said in caught.value.why
    assert caught.value.exit_code == 10


def test_bad_lines_are_listed_together_ten_at_most(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_records(write(tmp_path, GOOD, *["{}"] * 13))
    assert "13 bad records" in caught.value.what
    assert [f"line {n}:" in caught.value.why for n in range(1, 14)] == [False] + [True] * 10 + [False] * 2
    assert "and 3 more" in caught.value.why


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigurationError, match="is empty"):
        load_records(write(tmp_path, content))


def test_missing_files_and_unknown_samples(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no data file"):
        load_records(str(tmp_path / "no.jsonl"))
    with pytest.raises(ConfigurationError, match="there is no data file"):
        load_records("nothing_here")
    with pytest.raises(ConfigurationError) as caught:
        load_records("sample:chaterbot")
    assert caught.value.fix == "did you mean sample:chatterbot?"


def test_a_directory_without_the_datasets_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("datasets") is not None:
        pytest.skip("the package datasets is installed")
    for src in (str(tmp_path), "org/name"):
        with pytest.raises(MissingCapabilityError) as caught:
            load_records(src)
        assert "pip install datasets" in caught.value.fix


def test_a_dataset_directory_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    # The columns of both shapes: what a row lacks is null in the table.
    rows = [{"prompt": "q", "completion": "a"}, {"instruction": "i", "output": "o"}]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_records(str(plain)) == [pair("q", "a"), pair("i", "o")]
    datasets.load_dataset(str(plain)).save_to_disk(str(tmp_path / "parts"))
    datasets.load_dataset(str(plain), split="train").save_to_disk(str(tmp_path / "one"))
    for saved in ("parts", "one"):
        assert load_records(str(tmp_path / saved)) == [pair("q", "a"), pair("i", "o")]
    (plain / "train.jsonl").write_text('{"prompt": "q", "completion": null}\n')
    with pytest.raises(ConfigurationError, match="row 0: 'completion' is null"):
        load_records(str(plain))


def test_the_chatterbot_sample_repeats_its_prompts() -> None:
    if importlib.util.find_spec("chatterbot_corpus") is None:
        pytest.skip("the package chatterbot-corpus is not installed")
    records = load_records("sample:chatterbot")
    train, heldout = split(records, heldout_count=50, seed=0)
    assert len(heldout) == 50
    assert 300 < len(train) + 50 < len(records)
    assert all([m.role for m in r.messages] == ["user", "assistant"] for r in records)


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
    assert len(heldout) <= count
    assert train
    assert not {c for r in train for c in contexts(r)} & {c for r in heldout for c in contexts(r)}
    both = train + heldout
    finals = [max(contexts(r), key=len) for r in both]
    assert len(set(finals)) == len(finals)
    assert set(finals) == {max(contexts(r), key=len) for r in records}
    assert (train, heldout) == split(records, heldout_count=count, seed=seed)


def test_equal_prompts_differ_only_in_case_space_and_closing_punctuation() -> None:
    train, heldout = split(
        [
            pair("What is AI?", "1"),
            pair("what  is ai", "2"),
            pair("?", "3"),
            pair("!", "4"),
            pair("C++", "5"),
            pair("C", "6"),
        ],
        heldout_count=0,
        seed=0,
    )
    assert [r.messages[1].content for r in train] == ["1", "3", "4", "5", "6"]
    assert heldout == []


@pytest.mark.parametrize(
    "arguments",
    [{}, {"heldout_count": 1, "heldout_fraction": 0.1}, {"heldout_count": 3}, {"heldout_count": -1},
     {"heldout_fraction": 1.0}, {"heldout_fraction": -0.1}, {"heldout_fraction": float("nan")}],
)  # fmt: skip
def test_what_cannot_be_held_out(arguments: dict) -> None:
    with pytest.raises(ConfigurationError):
        split([pair("a"), pair("b"), pair("c")], seed=0, **arguments)


def test_the_fraction_is_of_distinct_records_and_rounds_up() -> None:
    records = [pair(str(i % 50)) for i in range(200)]
    train, heldout = split(records, heldout_fraction=0.11, seed=1)
    assert (len(train), len(heldout)) == (44, 6)
    assert heldout != split(records, heldout_fraction=0.11, seed=2)[1]
