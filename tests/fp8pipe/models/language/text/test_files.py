"""Every kind of file gives the same records; damaged ones are refused by name and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.models.language.text import Message, Record, data_files, load_records

ROWS = [{"prompt": f"é {i}\u2028?", "completion": f'00{i}\n, "quoted"'} for i in range(3)]
RECORDS = [Record((Message("user", row["prompt"]), Message("assistant", row["completion"]))) for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "completion", "tools"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows([row | {"tools": ""} for row in ROWS])


def zstandard(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(LINES.encode())


def parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def arrow(stream: bool) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import ipc

        rows = pyarrow.Table.from_pylist(ROWS)
        with (ipc.new_stream if stream else ipc.new_file)(str(path), rows.schema) as file:
            file.write_table(rows)

    return write


KINDS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_text(LINES, encoding="utf-8"),
    "bom.jsonl": lambda path: path.write_text(LINES, encoding="utf-8-sig"),
    "a.utf16": lambda path: path.write_text(LINES, encoding="utf-16"),
    "no-bom.jsonl": lambda path: path.write_text(LINES, encoding="utf-16-le"),
    "crlf.jsonl": lambda path: path.write_bytes(LINES.replace("\n", "\r\n").encode()),
    "one-line.json": lambda path: path.write_text(json.dumps(ROWS)),
    "many-lines.json": lambda path: path.write_text(json.dumps(ROWS, indent=2), encoding="utf-16"),
    "objects.jsonl": lambda path: path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "disguised.jsonl": lambda path: path.write_bytes(bz2.compress(json.dumps(ROWS).encode())),
    "a.xz": lambda path: path.write_bytes(lzma.compress(LINES.encode("utf-16"))),
    "a.csv": table,
    "a.tsv": lambda path: table(path, "\t"),
    "table-without-suffix": lambda path: table(path, ";"),
    "a.jsonl.zst": zstandard,
    "a.parquet": parquet,
    "a.arrow": arrow(stream=False),
    "stream.arrow": arrow(stream=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name)
    assert load_records(str(tmp_path / name)) == RECORDS


def test_a_table_adds_no_nulls_to_what_is_nested(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def row(**arguments: str) -> dict:
        call = {"function": {"name": "f", "arguments": arguments}}
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}

    parquet.write_table(pyarrow.Table.from_pylist([row(city="Rome"), row(day="1")]), tmp_path / "a.parquet")
    calls = [r.messages[1].fields["tool_calls"][0]["function"]["arguments"] for r in load_records(str(tmp_path))]
    assert calls == [{"city": "Rome"}, {"day": "1"}]


def test_folders_and_globs(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "data").mkdir()
    for name in ("data/train-1.jsonl", "data/test.jsonl", "more.json", ".hidden.jsonl", "dataset_info.json"):
        (tmp_path / name).write_text(LINES)
    (tmp_path / "README.md").write_text("no data")
    assert load_records(str(tmp_path), said.append) == RECORDS * 2
    assert [sentence.partition("left out")[2] for sentence in said] == [
        ", as they are for evaluation, by their names: data/test.jsonl",
        ", as they are of a kind that is not read: README.md",
    ]
    assert load_records(str(tmp_path / "**" / "t*.jsonl")) == RECORDS * 2  # asked for by name
    assert data_files(str(tmp_path)) == [tmp_path / "data/train-1.jsonl", tmp_path / "more.json"]
    (tmp_path / "more.json").write_text('[{"prompt": "q"}]')
    with pytest.raises(ConfigurationError, match=r"more\.json item 1 \(line 1\): 'completion' is missing"):
        load_records(str(tmp_path))
    for src, what in ((tmp_path / "*.txt", "no data file"), (tmp_path / "empty", "no training data")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ConfigurationError, match=what):
            load_records(str(src))


@pytest.mark.parametrize(
    ("name", "content", "where", "said"),
    [
        ("a.gz", gzip.compress(LINES.encode() * 500, mtime=0)[:-20], "after line", "a.gz is damaged"),
        ("b.gz", gzip.compress(LINES.encode(), mtime=0)[:12], "before its first record ends", "b.gz is damaged"),
        ("a.xz", lzma.compress(LINES.encode())[:-30], "before its first record ends", "a.xz is damaged"),
        ("a.json", json.dumps(ROWS, indent=1)[:-30].encode(), "item 3 (line 10)", "not valid JSON"),
        ("b.json", b'[\n{"prompt": "q", "completion": "a"}\n{}]', "line 3", "expected a comma"),
        ("c.json", b'[\n{"prompt": "q", "completion": "a"},\n', "line 3", "the array does not end"),
        ("d.json", b'[{"prompt": "q", "completion": "a"}]\n{}', "line 2", "something follows the end"),
        ("e.json", b'[\n{"prompt": "q\xff"}]', "line 2", "not UTF-8 text"),
        ("a.csv", b'prompt,completion\nq,a\nq,a,b\n', "line 3", "3 cells, where the header has 2"),
        ("b.csv", b'prompt,completion\nq,a\nq,"a\n\n', "line 3", "not valid CSV"),
        ("c.csv", b"prompt,completion\nq,\n", "line 2", "'completion' is missing"),
        ("d.csv", b"prompt,completion\nq,a\nq,\xff\n", "", "d.csv is damaged"),
        ("a.jsonl", (LINES + "{").encode("utf-16"), "line 4", "not valid JSON"),
        ("a.bin", bytes([7, 8, 9, 10, *range(256)]), "at the beginning", "a.bin is neither text nor a table"),
        ("a.zip", b"PK\x03\x04" + bytes(60), "at the beginning", "a.zip is neither text nor a table"),
        ("a.parquet", b"PAR1" + bytes(60), "before its first record ends", "a.parquet is damaged"),
        ("a.arrow", b"ARROW1" + bytes(60), "before its first record ends", "a.arrow is damaged"),
        ("a.zst", b"\x28\xb5\x2f\xfd" + bytes(9), "before its first record ends", "a.zst is damaged"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name_and_line(
    tmp_path: Path, name: str, content: bytes, where: str, said: str
) -> None:
    if content[:3] in (b"PAR", b"ARR", b"\x28\xb5\x2f"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        load_records(str(tmp_path / name))
    assert caught.value.why.startswith(where)
    assert said in caught.value.why
    assert name in str(caught.value)
    assert caught.value.exit_code == 10


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingCapabilityError) as caught:
        load_records(str(tmp_path / "a.parquet"))
    assert "fp8pipe[data]" in caught.value.fix
    assert caught.value.exit_code == 11
