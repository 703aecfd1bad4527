"""Checksums: every changed bit of a record or of its checksum is found, and no crash is taken for one."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from records import sound_record
from small_artifacts import details_of

from fp8pipe.artifact import (
    ArtifactWriter,
    Gate,
    Manifest,
    check_checksum,
    checksum_path,
    open_artifact,
    read_checked,
    remove_checked,
    write_checked,
)
from fp8pipe.artifact.record import ExportRejectedError, record_path
from fp8pipe.artifact.runs import RunRecord, read_run, write_run
from fp8pipe.artifact.verify import check_bytes, check_record, find_tree
from fp8pipe.core.errors import BadArtifactError

RECORD = RunRecord(recipe="r", resolved={"a": 1}, tool_version="0", started="2026-01-01T00:00:00+00:00")


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return write_checked(tmp_path / "run.json", '{"loss": 1.5, "name": "é"}\n')


def test_a_checksummed_record_is_read_back_and_sha256sum_agrees(record):
    assert check_checksum(record) == ""
    assert json.loads(read_checked(record)) == {"loss": 1.5, "name": "é"}
    assert sorted(path.name for path in record.parent.iterdir()) == ["run.json", "run.sha256"]
    subprocess.run(["sha256sum", "--strict", "-c", "run.sha256"], cwd=record.parent, check=True, capture_output=True)


@pytest.mark.parametrize("name", ["run.json", "run.sha256"])
def test_every_flipped_bit_is_found(record, name):
    path = record.with_name(name)
    data = path.read_bytes()
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert "run.json has sha256" in check_checksum(record), place
    path.write_bytes(data)
    assert check_checksum(record) == ""


@pytest.mark.parametrize(
    "spoil", [lambda b: b + b"\n", lambda b: b[:-1], lambda b: b.upper(), lambda b: b"", bytes.strip]
)
def test_a_checksum_of_another_form_is_found_though_sha256sum_may_accept_it(record, spoil):
    checksum = checksum_path(record)
    checksum.write_bytes(spoil(checksum.read_bytes()))
    assert "run.sha256" in check_checksum(record)
    with pytest.raises(BadArtifactError, match=r"run\.json is not what was written"):
        read_checked(record)


def test_missing_pieces_are_told_apart(record):
    checksum_path(record).unlink()
    assert check_checksum(record) == "run.json has no checksum: run.sha256 is missing"
    record.unlink()
    assert "run.json cannot be read" in check_checksum(record)
    with pytest.raises(FileNotFoundError):
        read_checked(record)


@pytest.mark.parametrize("replaced", range(3))
def test_a_crash_between_any_two_steps_leaves_one_whole_record(record, monkeypatch, replaced):
    real, calls = os.replace, []

    def crash(source, target):
        if len(calls) == replaced:
            raise KeyboardInterrupt
        calls.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    if replaced < 2:
        with pytest.raises(KeyboardInterrupt):
            write_checked(record, "new\n")
    else:
        write_checked(record, "new\n")
    assert check_checksum(record) == ""
    assert read_checked(record) == (b"new\n" if replaced else '{"loss": 1.5, "name": "é"}\n'.encode())
    monkeypatch.undo()
    write_checked(record, "newer\n")
    assert read_checked(record) == b"newer\n"
    remove_checked(record)
    assert list(record.parent.iterdir()) == []


def test_a_run_is_read_only_as_it_was_written(tmp_path):
    path = write_run(RECORD, tmp_path)
    assert read_run(tmp_path) == RECORD
    path.write_bytes(path.read_bytes().replace(b'"a": 1', b'"a": 3'))
    with pytest.raises(BadArtifactError, match=r"run\.json has sha256"):
        read_run(tmp_path)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    with ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune") as writer:
        (writer.root / "w.bin").write_bytes(b"weights")
        return writer.commit(details=details_of("falqon"), seed=3).root


def test_a_manifest_is_sealed_and_the_seal_is_no_unlisted_file(artifact):
    open_artifact(artifact)
    assert check_checksum(artifact / "manifest.json") == ""
    (artifact / "manifest.json").write_text((artifact / "manifest.json").read_text().replace('"seed": 3', '"seed": 7'))
    for verify in (True, False):
        with pytest.raises(BadArtifactError, match=r"manifest\.json has sha256"):
            open_artifact(artifact, verify=verify)


def test_a_manifest_without_a_checksum_is_refused_unless_it_is_of_the_first_version(artifact):
    checksum_path(artifact / "manifest.json").unlink()
    with pytest.raises(BadArtifactError, match=r"manifest\.sha256 is missing"):
        open_artifact(artifact)
    path = artifact / "manifest.json"
    old = json.loads(path.read_text()) | {"schema_version": 1}
    old["extra"] = old.pop("details")
    del old["files"][0]["volatile"]  # the first version had no such field, and its digests do not cover it
    path.write_text(json.dumps(old))
    digest = Manifest.from_json(path.read_bytes(), where="test").digest
    assert open_artifact(artifact).digest == digest
    canonical = json.dumps(old, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()
    write_checked(path, json.dumps(old))
    path.write_text(json.dumps(old | {"seed": 4}))
    with pytest.raises(BadArtifactError, match="sha256"):
        open_artifact(artifact)


def test_a_rename_keeps_the_checksum_and_a_record_lies_beside(artifact, tmp_path):
    moved = shutil.move(artifact, tmp_path / "b.c")
    open_artifact(moved)
    assert checksum_path(record_path(Path(moved))).name == "b.c.validation.sha256"


def measured(artifact: Path, **changes: object) -> Path:
    digest = open_artifact(artifact).digest
    path = artifact.with_name(f"{artifact.name}.bench.json")
    return write_checked(path, json.dumps(sound_record(digest, stage="bench", gates=[], **changes)))


@pytest.mark.parametrize(
    ("changes", "why"),
    [({}, ""), ({"manifest_digest": "0" * 64}, "it is about manifest"), ({"reasons": ["slow"]}, "but slow")],
)
def test_a_measurement_beside_an_artifact_is_checked_with_it(artifact, changes, why):
    measured(artifact, **changes)
    tree = find_tree(artifact)
    assert [path.name for path in tree.records] == ["a.bench.json"]
    checked = check_bytes(tree)
    findings, notes = check_record(tree.records[0], {a.root: a for a in checked.artifacts})
    assert (checked.findings, notes) == ([], [])
    assert [f.why[:60] for f in findings if why not in f.why] == []
    assert bool(findings) == bool(why)


def test_a_measurement_without_its_checksum_is_found(artifact):
    checksum_path(measured(artifact)).unlink()
    (finding,) = check_bytes(find_tree(artifact)).findings
    assert (finding.check, finding.where) == ("checksum", "a.bench.json")


def test_a_gate_that_failed_is_said_and_one_that_lies_is_found(tmp_path):
    with ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune") as writer:
        writer.gate(Gate(name="loss", value=2.0, comparison="at most", threshold=1.0))
        writer.commit(details=details_of("falqon"))
    checked = check_bytes(find_tree(tmp_path / "a"))
    assert checked.notes == ["a: when it was written, the gate 'loss' failed"]
    assert checked.findings == []
    path = tmp_path / "a" / "manifest.json"
    data = json.loads(path.read_text())
    data["gates"][0].update(passed=True, verdict="ACCEPT")
    write_checked(path, json.dumps(data))
    (finding,) = check_bytes(find_tree(tmp_path / "a")).findings
    assert (finding.check, finding.where) == ("manifest", "manifest.json")
    assert "the gate 'loss' claims passed=True, and 2 (at most 1) says otherwise" in finding.why


def test_a_copied_manifest_makes_no_artifact_of_a_model_repository(tmp_path):
    (tmp_path / "repository" / "m").mkdir(parents=True)
    for name in ("manifest.json", "manifest.sha256", "config.pbtxt"):
        (tmp_path / "repository" / "m" / name).write_text("x")
    assert find_tree(tmp_path).artifacts == []


def test_a_reader_whose_record_is_replaced_meanwhile_looks_again(record, monkeypatch):
    from fp8pipe.artifact import record as checksum

    real, calls = checksum._bytes, []

    def meanwhile(path: Path) -> bytes | None:
        calls.append(path)
        if len(calls) == 1:
            write_checked(record, "new\n")
        return real(path)

    monkeypatch.setattr(checksum, "_bytes", meanwhile)
    assert read_checked(record) == b"new\n"
    assert len(calls) == 4


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema_version": 1, "stages": [[]]}', "1", "{"])
def test_what_is_no_record_of_a_run_is_said_to_be_none(tmp_path, text):
    write_checked(tmp_path / "run.json", text)
    with pytest.raises(BadArtifactError, match="is not a record of a run"):
        read_run(tmp_path)


def test_a_rejection_says_what_it_is_and_carries_its_record():
    error = ExportRejectedError("it differs", why="one code", fix="export again", record=RECORD)
    assert (error.what, error.why, error.fix, error.record) == ("it differs", "one code", "export again", RECORD)
    assert "it differs" in str(error)
