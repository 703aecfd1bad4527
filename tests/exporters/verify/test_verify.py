"""`fp8pipe verify` on a whole tree: nothing is found in what the commands wrote, and what is not checked is said."""

from __future__ import annotations

import json

import pytest
from artifact_tree import rehash
from click.testing import CliRunner

from exporters.target import targets
from fp8pipe.cli import main

pytestmark = pytest.mark.slow  # the tree takes half a minute to write


def verify(*arguments: object):
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def test_nothing_is_found_in_what_was_written(whole_tree):
    ended = verify(whole_tree, "--json", "--strict")
    assert ended.exit_code == 0, ended.output
    document = json.loads(ended.stdout)
    assert document["verified"]
    assert document["findings"] == []
    kinds = {path.parent.name: json.loads(path.read_text())["kind"] for path in whole_tree.glob("*/manifest.json")}
    assert len(document["artifacts"]) == len(kinds)
    exports = {target.kind for target in targets()}
    assert exports < set(kinds.values()), "the tree lacks an artifact of a kind"
    assert {pair["artifact"] for pair in document["compared"]} == {name for name in kinds if kinds[name] in exports}


def test_a_record_needs_a_checksum_whatever_version_it_claims(tree):
    path = tree / "onnx.validation.json"
    (tree / "onnx.validation.sha256").unlink()
    ended = verify("--quick", tree)
    assert ended.exit_code == 12
    assert "onnx.validation.sha256 is missing" in ended.stderr
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1}))
    assert verify("--quick", tree).exit_code == 12


def test_a_parent_that_was_made_again_is_taken_and_said(tree):
    """Another time of writing, the same content: the child is not stale."""
    rehash(tree / "vit", lambda data: data.update(created="2027-01-01T00:00:00+00:00"))
    document = json.loads(verify("--quick", "--json", tree).stdout)
    assert document["verified"]
    made_from_it = {target.kind for target in targets() if "vit" in target.takes}
    children = sum(artifact["kind"] in made_from_it for artifact in document["artifacts"])
    assert sum("made again with the same content" in note for note in document["notes"]) == children >= 2


def test_unfinished_runs_and_strays_are_said(tree):
    (tree / "later.partial").mkdir()
    (tree / "notes.txt").write_text("mine")
    document = json.loads(verify("--quick", "--json", tree).stdout)
    assert document["verified"]
    assert any("later.partial: unfinished" in note for note in document["notes"])
    assert any("notes.txt: no record covers it" in note for note in document["notes"])
    assert verify("--quick", "--strict", tree).exit_code == 12


def test_a_folder_of_strays_is_one_note(tree):
    (tree / "pictures").mkdir()
    for number in range(40):
        (tree / "pictures" / f"{number}.png").write_bytes(b"x")
    notes = json.loads(verify("--quick", "--json", tree).stdout)["notes"]
    assert [note.partition(": ")[2] for note in notes if "pictures" in note] == ["40 files: no record covers it"]


def test_damage_is_listed_whole_and_damaged_parents_are_not_compared_with(tree):
    for name in ("vit/preprocessing.json", "vllm/config.json", "model/tokenizer.json"):
        (tree / name).write_text("{}")
    document = json.loads(verify("--json", tree).stdout)
    found = {(f["artifact"], f["check"], f["where"]) for f in document["findings"]}
    assert {
        ("vit", "hash", "preprocessing.json"), ("vllm", "hash", "config.json"), ("model", "hash", "tokenizer.json"),
    } <= found  # fmt: skip
    assert {pair["artifact"] for pair in document["compared"]} == {"modelopt", "blocks", "four-bits"}
