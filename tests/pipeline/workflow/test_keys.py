"""A stage's key covers all that decides what it writes, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace

import pytest
from small_artifacts import write

import pipeline.workflow.keys as keys
from fp8pipe.artifact import Parent
from pipeline.workflow.keys import SourceDigests, canonical_digest, file_states, stage_key
from pipeline.workflow.recipe import StageSpec

SPEC = StageSpec("a", "export", {"artifact": "stage:base", "target": "onnx", "list": ["artifact:stage:base", 1]})


def key(spec=SPEC, contents=(("artifact", "c0"),), sources=(("data", "s0"),), versions=(("torch", "2.13"),)):
    return stage_key(spec, dict(contents), dict(sources), dict(versions))


@pytest.mark.parametrize(
    "other",
    [
        {"spec": replace(SPEC, command="validate")}, {"spec": replace(SPEC, settings={**SPEC.settings, "target": "x"})},
        {"spec": replace(SPEC, settings={**SPEC.settings, "more": None})}, {"contents": (("artifact", "c1"),)},
        {"contents": (("other", "c0"),)}, {"contents": ()}, {"sources": (("data", "s1"),)}, {"sources": ()},
        {"contents": (("artifact", "s0"),), "sources": (("data", "c0"),)}, {"versions": (("torch", "2.14"),)},
        {"versions": ()}, {"versions": (("vllm", "2.13"),)},
    ],
)  # fmt: skip
def test_everything_that_decides_is_in_the_key(other):
    assert key(**other) != key()


def test_the_tools_version_is_in_the_key(monkeypatch):
    before = key()
    monkeypatch.setattr(keys, "__version__", "999")
    assert key() != before


def test_names_of_stages_and_the_order_of_settings_are_not():
    renamed = {"target": "onnx", "list": ["artifact:stage:other", 1], "artifact": "stage:other"}
    assert key(replace(SPEC, name="b", settings=renamed, after=("x",))) == key()


def test_the_canonical_digest_is_that_of_sorted_json():
    text = '{"a":[1,null],"b":"é"}'
    assert canonical_digest({"b": "é", "a": [1, None]}) == hashlib.sha256(text.encode()).hexdigest()


def test_states_are_those_of_every_file_but_of_caches(tmp_path):
    for name in ("b.txt", "a/c.txt", ".git/x", "a/.cache/x", "a/__pycache__/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    os.utime(tmp_path / "b.txt", ns=(5, 7))
    found = file_states(tmp_path)
    assert list(found) == ["b.txt", "a/c.txt"]
    assert found["b.txt"] == (5, 7)
    assert file_states(tmp_path / "b.txt") == {".": (5, 7)}
    assert file_states(tmp_path / "none") == {}


def test_a_source_is_known_by_its_bytes_and_names_and_an_artifact_by_its_content(tmp_path):
    digests = SourceDigests(tmp_path / "memory.json")
    assert digests.digest("sample:thing") == "sample:thing"
    assert digests.digest("images:sample:thing") == "images:sample:thing"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("one")
    seen = {digests.digest(str(folder)), digests.digest(str(folder / "a"))}
    assert digests.digest(f"images:{folder}") == f"images:{digests.digest(str(folder))}"
    (folder / "a").rename(folder / "b")
    seen.add(digests.digest(str(folder)))
    (folder / "b").write_text("two")
    seen.add(digests.digest(str(folder)))
    (folder / "a").write_text("one")
    seen.add(digests.digest(str(folder)))
    assert len(seen) == 5
    one = write(tmp_path / "one")
    again = write(tmp_path / "again", parents=[Parent(kind="model", digest="ab", path="/m")])
    assert digests.digest(str(one.root)) == one.content
    assert digests.digest(f"artifact:{one.root}") == f"artifact:{one.content}"
    assert digests.digest(str(again.root)) == again.content


def test_what_was_hashed_is_remembered_until_size_or_time_change(tmp_path, monkeypatch):
    hashed = []
    real = keys.sha256_file
    monkeypatch.setattr(keys, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    memory, source = tmp_path / "deep" / "memory.json", tmp_path / "text"
    source.write_text("one")
    digests = SourceDigests(memory)
    first = digests.digest(str(source))
    assert digests.digest(str(source)) == first
    digests.save()
    digests.save()
    assert [path.name for path in memory.parent.iterdir()] == ["memory.json"]
    assert SourceDigests(memory).digest(str(source)) == first
    assert hashed == ["text"]
    os.utime(source, (1, 1))
    assert SourceDigests(memory).digest(str(source)) == first
    assert hashed == ["text"] * 2
    for damage in ("{", "[1]", '"x"'):
        memory.write_text(damage)
        assert SourceDigests(memory).digest(str(source)) == first
    assert hashed == ["text"] * 5
    memory.write_text(json.dumps({str(source): [canonical_digest(file_states(source)), "remembered"]}))
    assert SourceDigests(memory).digest(str(source)) == "remembered"
