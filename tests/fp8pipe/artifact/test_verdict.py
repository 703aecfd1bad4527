"""The one reader of records: whatever is not whole, known and borne out is no verdict."""

from __future__ import annotations

import json

import pytest
from records import sound_record, write_sound_record
from small_artifacts import write

from fp8pipe.artifact import Gate, write_checked
from fp8pipe.artifact.gate import Verdict, worst
from fp8pipe.artifact.record import record_path
from fp8pipe.artifact.verdict import read_verdict, require_accept
from fp8pipe.core.errors import BadArtifactError, GateFailedError

FAILED = Gate(name="weights differing", value=4).model_dump(mode="json")


@pytest.fixture
def artifact(tmp_path):
    return write(tmp_path / "export")


def test_a_sound_record_is_read(artifact):
    path = write_sound_record(artifact.root, served={"form": "on a CPU: bfloat16, compiled"})
    for record in (read_verdict(path), read_verdict(path, artifact), require_accept(artifact)):
        assert (record.said, record.versions) == (Verdict.ACCEPT, {"engine": "1.0"})
        assert record.form == "on a CPU: bfloat16, compiled"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"verdict": "FINE"}, "verdict: Input should be 'ACCEPT'"),
        ({"verdict": None}, "verdict"),
        ({"verdict": "accept"}, "verdict"),
        ({"verdict": ["ACCEPT"]}, "verdict"),
        ({"schema_version": 4}, "schema_version"),
        ({"schema_version": "3"}, "schema_version"),
        ({"manifest_digest": "0" * 64}, "it is about manifest 000000"),
        ({"versions": {}}, "versions"),
        ({"versions": None}, "versions"),
        ({"gates": []}, "its verdict is ACCEPT, but it has no gates"),
        ({"gates": [FAILED]}, "weights differing: 4"),
        ({"gates": [FAILED], "verdict": "CONSISTENT"}, "its verdict is CONSISTENT, but weights differing: 4"),
        ({"gates": [FAILED | {"passed": True, "verdict": "ACCEPT"}]}, "claims passed=True"),
        ({"gates": [3]}, "it is not a gate"),
        ({"gates": [None]}, "it is not a gate"),
        ({"gates": [{"name": "x", "threshold": 0}]}, "x: missing"),
        ({"reasons": ["one weight differs"]}, "its verdict is ACCEPT, but one weight differs"),
    ],
)
def test_what_is_not_borne_out_is_refused_by_name(artifact, changes, named):
    path = write_sound_record(artifact.root, **changes)
    with pytest.raises(BadArtifactError, match=r"export\.validation\.json is not a valid record") as caught:
        read_verdict(path, artifact)
    assert named in caught.value.why
    with pytest.raises(BadArtifactError):
        require_accept(artifact)


def test_a_measurement_needs_no_gates_and_accepts_no_export(artifact):
    path = write_sound_record(artifact.root, gates=[], stage="bench")
    assert read_verdict(path).said is Verdict.ACCEPT
    with pytest.raises(BadArtifactError, match="record of bench, not of a validation"):
        require_accept(artifact)


@pytest.mark.parametrize("missing", ["schema_version", "manifest_digest", "verdict", "versions"])
def test_what_a_record_lacks_is_named(artifact, missing):
    record = sound_record(artifact.digest)
    del record[missing]
    path = write_checked(record_path(artifact.root), json.dumps(record))
    with pytest.raises(BadArtifactError, match=f"{missing}: Field required"):
        read_verdict(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"ACCEPT"', "\x00", '{"a": ' * 3000], ids=["empty", "open", "list", "number", "text",
                                                                            "binary", "deep"],
)  # fmt: skip
def test_what_is_no_record_is_refused(artifact, text):
    path = write_checked(record_path(artifact.root), text)
    with pytest.raises(BadArtifactError, match="is not a valid record"):
        read_verdict(path)


def test_a_broken_checksum_is_never_passed_over(artifact):
    path = write_sound_record(artifact.root, verdict="REJECT", reasons=["a weight differs"])
    whole = path.read_bytes()
    for spoilt in (whole + b" ", whole.replace(b"REJECT", b"ACCEPT")):
        path.write_bytes(spoilt)
        with pytest.raises(BadArtifactError, match="has sha256"):
            read_verdict(path)
    path.with_suffix(".sha256").unlink()
    with pytest.raises(BadArtifactError, match="has no checksum"):
        read_verdict(path)
    path.unlink()
    with pytest.raises(BadArtifactError, match="No such file"):
        read_verdict(path)


def test_a_record_may_be_mounted_under_another_name(artifact, tmp_path):
    path = write_sound_record(artifact.root, export="export")
    place = tmp_path / "model.validation.json"
    place.write_bytes(path.read_bytes())
    checksum = path.with_suffix(".sha256").read_bytes()
    place.with_suffix(".sha256").write_bytes(checksum)
    assert require_accept(artifact, place).verdict == "ACCEPT"
    place.with_suffix(".sha256").write_bytes(checksum.replace(b"export", b"expert"))
    with pytest.raises(BadArtifactError, match="what follows the digest"):
        require_accept(artifact, place)


@pytest.mark.parametrize("verdict", ["REJECT", "CONSISTENT", "PROVED-WITHOUT-RUNNING"])
def test_only_accept_is_accepted(artifact, verdict):
    with pytest.raises(GateFailedError, match="there is no record of a validation"):
        require_accept(artifact)
    said = read_verdict(write_sound_record(artifact.root, verdict=verdict)).said
    assert said is (Verdict.ANOMALOUS if verdict == "REJECT" else Verdict(verdict))
    with pytest.raises(GateFailedError, match=f"says {verdict}"):
        require_accept(artifact)


def test_unproved_is_between_accepted_and_failed():
    assert [verdict for verdict in Verdict if verdict.failed] == list(Verdict)[3:]
    assert worst([Verdict.PROVED_WITHOUT_RUNNING, Verdict.ACCEPT, Verdict.CONSISTENT]) is Verdict.CONSISTENT
    assert worst([Verdict.REGRESSION, Verdict.CONSISTENT]) is Verdict.REGRESSION
