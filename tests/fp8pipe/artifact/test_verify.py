"""What is found without knowing any kind: bytes, records against artifacts, runs against their outputs, parents."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from records import sound_record
from small_artifacts import SHARD, write

from fp8pipe.artifact import Artifact, Parent, open_artifact, write_checked
from fp8pipe.artifact.gate import Verdict
from fp8pipe.artifact.record import checksum_path
from fp8pipe.artifact.runs import RunRecord, StageRecord, write_run
from fp8pipe.artifact.verify import check_bytes, check_record, find_parent, find_tree


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with two artifacts; a is the parent of b."""
    root = tmp_path / "run"
    first = write(root / "a")
    write(root / "b", kind="vllm-export", parents=[first.as_parent()])
    return root


def found(root: Path, **options: Any) -> list[tuple[str, str, str]]:
    return [(f.artifact, f.check, f.where) for f in check_bytes(find_tree(root), **options).findings]


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_every_damaged_file_is_found_and_what_is_whole_is_counted(run):
    seen: list[str] = []
    checked = check_bytes(find_tree(run), on_file=lambda entry: seen.append(entry.path))
    assert (checked.findings, checked.notes, checked.damaged) == ([], [], set())
    assert checked.files == 2 * (3 + 2)
    assert seen == ["config.json", SHARD, "nested/a.txt"] * 2
    assert [artifact.root.name for artifact in checked.artifacts] == ["a", "b"]
    for name in (SHARD, "config.json"):
        spoil(run / "a" / name)
    assert found(run) == [("a", "hash", "config.json"), ("a", "hash", SHARD)]
    assert check_bytes(find_tree(run)).damaged == {run / "a"}
    spoil(run / "b" / "manifest.json")
    assert found(run)[2:] == [("b", "checksum", "manifest.json")]
    assert [artifact.root.name for artifact in check_bytes(find_tree(run)).artifacts] == ["a"]


def test_a_manifest_that_is_none_is_told_from_one_that_is_damaged(run):
    write_checked(run / "a" / "manifest.json", "{}")
    assert found(run) == [("a", "manifest", "manifest.json")]
    (run / "a" / "manifest.json").unlink()
    assert found(run) == [("a", "checksum", "manifest.json")]
    (run / "b" / "manifest.sha256").unlink()
    assert found(run)[1:] == [("b", "checksum", "manifest.json")]


@pytest.mark.parametrize("count", [5, 6])
def test_what_nobody_lists_is_a_finding_in_an_artifact_and_a_note_beside_it_unless_strict(run, count):
    names = [f"x{number}" for number in range(count)]
    for folder in ("a", "others"):
        (run / folder).mkdir(exist_ok=True)
        for name in names:
            (run / folder / name).write_bytes(b"")
    (run / "later.partial").mkdir()
    inside = [("a", "manifest", name) for name in names]
    assert found(run) == inside
    single = [f"others/{name}: no record covers it" for name in names]
    shown = single if count == 5 else ["others/: 6 files: no record covers it"]
    assert check_bytes(find_tree(run)).notes == [*shown, "later.partial: unfinished, not checked"]
    assert found(run, strict=True) == [*inside, *(("others", "manifest", name) for name in names)]


def record(run: Path, name: str = "a.validation.json", **changes: Any) -> Path:
    digest = open_artifact(run / "a").digest
    return write_checked(run / name, json.dumps(sound_record(digest, **changes)))


def judged(path: Path) -> tuple[list[str], list[str]]:
    artifacts = {a.root: a for a in check_bytes(find_tree(path.parent)).artifacts}
    findings, notes = check_record(path, artifacts)
    assert {f.check for f in findings} <= {"record", "checksum"}
    return [f"{f.where}: {f.why}" for f in findings], notes


GATE = {"name": "error", "value": 2.0, "comparison": "at most", "threshold": 1.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []), ({"verdict": "REJECT", "reasons": ["it differs"]}, []), ({"verdict": "REJECT", "gates": [GATE]}, []),
        ({"reasons": ["it differs"]}, ["its verdict is ACCEPT, but it differs"]),
        ({"gates": [GATE]}, ["its verdict is ACCEPT, but error: 2 (at most 1)"]),
        ({"gates": [GATE | {"value": 1.0}]}, []), ({"reasons": None}, ["reasons: Input should be a valid list"]),
        ({"gates": None}, ["its verdict is ACCEPT, but it has no gates"]), ({"gates": [7]}, ["it is not a gate"]),
        ({"gates": [GATE | {"passed": True}]}, ["claims passed=True"]),
        ({"verdict": "PROVED-WITHOUT-RUNNING", "reasons": ["x"]}, ["its verdict is PROVED-WITHOUT-RUNNING, but x"]),
        ({"manifest_digest": "0" * 64}, [f"it is about manifest {'0' * 64}; a has "]),
    ],
)  # fmt: skip
def test_a_verdict_agrees_with_what_stands_beside_it(run, changes, said):
    findings, notes = judged(record(run, **changes))
    assert notes == []
    assert len(findings) == len(said)
    for text, part in zip(findings, said, strict=True):
        assert text.startswith("a.validation.json: ")
        assert part in text


def test_a_record_of_an_absent_export_is_noted_and_one_that_is_no_json_is_found(run):
    assert judged(record(run, "c.validation.json")) == (
        [], ["c.validation.json: the export that it is about was not found next to it"],
    )  # fmt: skip
    assert "it is not JSON" in judged(write_checked(run / "a.bench.json", "{"))[0][0]
    assert "its top level is a list" in judged(write_checked(run / "a.bench.json", "[1]"))[0][0]
    bare = judged(write_checked(run / "a.bench.json", '{"verdict": "ACCEPT"}'))[0][0]
    assert "schema_version: Field required; manifest_digest: Field required" in bare
    spoil(path := record(run))
    assert judged(path) == ([], [])  # a finding of its checksum already
    assert ("a.validation.json", "checksum", "a.validation.json") in found(run)


def test_an_export_and_its_record_under_other_names_are_as_written(run):
    # As a container mounts them: the checksum file still has the name that the record was written under.
    record(run, export="a")
    for source in (run / "a.validation.json", run / "a.validation.sha256"):
        source.rename(run / source.name.replace("a.", "model.", 1))
    (run / "a").rename(run / "model")
    moved = run / "model.validation.json"
    assert (found(run), judged(moved)) == ([], ([], []))
    spoil(moved)
    assert found(run) == [("model.validation.json", "checksum", "model.validation.json")]


def stage(name: str, output: str, content: str, **changes: Any) -> StageRecord:
    plain = {"name": name, "command": "export", "key": "k", "output": output, "content": content, "verdict": "ACCEPT"}
    return StageRecord(**{**plain, **changes})


def judged_run(run: Path, *stages: StageRecord) -> tuple[list[str], list[str]]:
    return judged(write_run(RunRecord(recipe="r", resolved={}, tool_version="0", started="now", stages=stages), run))


def test_a_run_is_held_against_what_its_stages_wrote(run):
    content = open_artifact(run / "a").content
    assert judged_run(run, stage("one", "a", content)) == ([], [])
    ((finding,), notes) = judged_run(run, stage("one", "a", content), stage("two", "b", "0" * 64))
    assert "run.json: stage two wrote content 0000" in finding
    assert notes == []
    assert judged_run(run, stage("gone", "c", "0" * 64))[0] == ["c: stage gone wrote it; it is missing"]
    for skipped in ({"content": ""}, {"verdict": Verdict.INFEASIBLE}):
        assert judged_run(run, stage("x", "c", "0" * 64).model_copy(update=skipped)) == ([], [])
    (run / "plain").mkdir()
    assert judged_run(run, stage("x", "plain", "0" * 64)) == (
        [], ["plain: not an artifact that could be opened, so its content is not compared"],
    )  # fmt: skip
    write_checked(run / "run.json", "{}")
    assert len(judged(run / "run.json")[0]) == 1


def test_a_run_judged_the_verdict_that_stands_there(run):
    content = hashlib.sha256(b'["k","ACCEPT"]').hexdigest()
    path = record(run)
    assert judged_run(run, stage("proof", path.name, content)) == ([], [])
    path = record(run, verdict="REJECT")
    ((finding,), _) = judged_run(run, stage("proof", path.name, content))
    assert finding == "a.validation.json: stage proof was judged with another verdict; the record states REJECT now"
    path.with_suffix(".sha256").unlink()
    ((finding,), _) = judged_run(run, stage("proof", path.name, content))
    assert "has no checksum" in finding


def test_a_manifest_that_cannot_be_read_is_named_for_that_and_not_for_its_missing_checksum(run):
    path = run / "a" / "manifest.json"
    checksum_path(path).unlink()
    assert found(run)[0][:2] == ("a", "checksum")
    path.write_text("{}")
    assert found(run)[0][:2] == ("a", "manifest")


def test_files_that_a_run_names_are_no_strays(run):
    for name in ("logs/one.log", "stages/x.json", "recipe.yaml", "out/plain.txt", "out/other.txt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    (run / "log.txt").write_text("x")
    kept = stage("one", "out", "", files={"plain.txt": (1, 1)}, log="log.txt")
    write_run(RunRecord(recipe="r", resolved={}, tool_version="0", started="now", stages=[kept]), run)
    assert found(run, strict=True) == [("out", "manifest", "other.txt")]


def written_again(artifact: Artifact, root: Path, **changes: Any) -> Artifact:
    """A copy whose manifest says something else."""
    shutil.copytree(artifact.root, root)
    path = root / "manifest.json"
    write_checked(path, json.dumps(json.loads(path.read_text()) | changes))
    return open_artifact(root)


def test_a_parent_is_known_by_its_digest_then_by_its_content_then_by_its_name(run):
    a, b = (open_artifact(run / name) for name in "ab")
    (named,) = b.manifest.parents
    assert find_parent(b, named, [b, a]) == (a, None, "")
    again = written_again(a, run / "again", created="later")
    assert again.digest != a.digest
    parent, finding, note = find_parent(b, named, [b, again])
    assert (parent, finding) == (again, None)
    assert "was made again with the same content: again" in note
    other = Artifact(run / "a", written_again(a, run / "other", seed=7).manifest)
    parent, finding, note = find_parent(b, named, [b, other])
    assert (parent, note) == (None, "")
    assert finding is not None
    assert (finding.check, finding.where) == ("parent", "a")
    assert f"the manifest names falqon {a.digest}; a has {other.digest}" == finding.why
    elsewhere = Artifact(run / "elsewhere", other.manifest)
    assert find_parent(b, named, [b, elsewhere]) == (None, None, "")
    nameless = named.model_copy(update={"content": None})
    assert find_parent(b, nameless, [again])[0] is None
    model = Parent(kind="model", digest="ab", path="/m")
    assert find_parent(b, model, [a, b]) == (None, None, "")
    own = Parent(kind=b.kind, digest="0" * 64, path=str(b.root))
    assert find_parent(b, own, [b]) == (None, None, "")


def test_signatures_of_records_and_directories_belong_to_the_tree_and_files_are_counted(run):
    before = check_bytes(find_tree(run), strict=True)
    record = write_checked(run / "b.validation.json", "{}")
    for name in ("a.sig", f"{record.name}.sig"):
        (run / name).write_text("signature")
    after = check_bytes(find_tree(run), strict=True)
    assert [f.where for f in after.findings if f.where.endswith(".sig")] == []
    assert after.files == before.files + 2  # the record and its checksum
    (run / "c.sig").write_text("of nothing")
    assert [f.where for f in check_bytes(find_tree(run), strict=True).findings if f.where.endswith(".sig")] == ["c.sig"]
