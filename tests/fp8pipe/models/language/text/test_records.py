from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.models.language.text import Message, Record, load_records, split


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
        ("[", "not valid JSON"),
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
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "messages[0], part 1: an image part must name one file, as text, in 'image', 'url', 'path', 'image_url'",
        ),
        (
            '{"messages": [{"role": "user", "content": ["a", {"type": "image", "image": "https://x.org/a.png"}]}]}',
            "messages[0]: part 2: the image 'https://x.org/a.png' is on a server; download it",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image", "path": "no.png"}]}, {"role": "assistant", '
            '"content": "a"}]}',
            "messages[0], part 1: there is no image file /",
        ),
        (
            f'{{"messages": [{{"role": "user", "content": [{{"type": "image", "image": "{"iVBOR" * 80}"}}]}}, '
            '{"role": "assistant", "content": "a"}]}',
            "is no path; base64 is given as data:image/png;base64,",
        ),
        (
            '{"messages": [{"role": "assistant", "content": [{"type": "image", "path": "no.png"}]}]}',
            "messages[0]: an assistant message has an image, and only text can be learned",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, "\ufffc"]}, '
            '{"role": "assistant", "content": "a"}]}',
            "its text holds the character U+FFFC",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]}',
            "messages[0]: 'content' must be text, or a list of parts of text and images; part 1 is video",
        ),
        ('{"messages": [{"role": "assistant", "content": null}]}', "messages[0]: 'content' is null"),
        ('{"conversations": [{"from": "gpt"}]}', "conversations[0]: 'value' is missing"),
        (
            '{"conversations": [{"from": "function_call", "value": "f()"}]}',
            "'value' must be an object or",
        ),
        ('{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}', "'weight' must be 0 or 1, not 0.5"),
        ('{"messages": [{"role": "user", "content": "a", "weight": 1}]}', "only assistant messages are trained on"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}', "tool_calls[0] must be an object with"),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}',
            "tool_calls[0]: 'arguments' is text that is not valid JSON",
        ),
        (
            '{"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]}',
            "in a message of role",
        ),
        ('{"prompt": "q", "completion": "a", "tools": "[{]"}', "'tools' is text that is not valid JSON"),
        ('{"prompt": "q", "completion": "a", "history": [["q"]]}', "history[0] must be a list of a question and"),
        ('{"prompt": "q", "completion": "a", "tools": [{"name": "\\ud800"}]}', "'tools' holds an unpaired surrogate"),
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


def test_a_hub_id_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingCapabilityError) as caught:
        load_records("org/name")
    assert "fp8pipe[data]" in caught.value.fix
    assert caught.value.exit_code == 11


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
    with pytest.raises(ConfigurationError, match="line 1: 'completion' is null"):
        load_records(str(plain))


def test_the_chatterbot_sample_repeats_its_prompts() -> None:
    if importlib.util.find_spec("chatterbot_corpus") is None:
        pytest.skip("the package chatterbot-corpus is not installed")
    records = load_records("sample:chatterbot")
    train, heldout = split(records, heldout_count=50, seed=0)
    assert 40 < len(heldout) <= 50
    assert 800 < len(train) + len(heldout) < len(records)  # many are there twice; 500 prompts are distinct
    assert all([m.role for m in r.messages] == ["user", "assistant"] for r in records)


def test_what_no_shape_reads_is_counted(tmp_path: Path) -> None:
    said: list[str] = []
    rows = [{"prompt": "q", "completion": "a", "id": 7, "score": 1}, {"prompt": "q", "completion": "a", "id": 8}]
    load_records(write(tmp_path, *map(json.dumps, rows)), said.append)
    assert said == ["fields of records that are not used: 'id' (in 2 of 2), 'score' (in 1 of 2)"]
    load_records(write(tmp_path, GOOD), said.append)
    assert len(said) == 1
