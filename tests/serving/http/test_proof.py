"""Serving wants a sealed ACCEPT for these files, these versions and this form; without one, every answer says so."""

from __future__ import annotations

import logging

import pytest
from records import write_sound_record
from small_artifacts import write

from fp8pipe.artifact import open_artifact
from fp8pipe.core.errors import BadArtifactError, GateFailedError
from serving.config import ServeConfig
from serving.http.service import identity_of, proof_of

VERSIONS = {"vllm": "0.19.1", "torch": "2.10.0", "python": "3.12.1"}
FORM = "on a CPU: bfloat16, compiled, activations not rounded"


@pytest.fixture
def artifact(tmp_path):
    return write(tmp_path / "export")


def validated(artifact, **changes):
    said = {"versions": VERSIONS | {"python": "3.11.9"}, "served": {"form": FORM}}
    return write_sound_record(artifact.root, **said | changes)


def test_an_accepted_export_is_served_and_says_what_was_proved(artifact):
    validated(artifact)
    proof = proof_of(artifact, ServeConfig(), VERSIONS, FORM)
    assert proof.verdict == "ACCEPT"
    assert identity_of(artifact, proof)["validation"] == {
        "verdict": "ACCEPT", "form": FORM, "versions": {"vllm": "0.19.1", "torch": "2.10.0"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"verdict": "REJECT", "reasons": ["a weight differs"]}, "says REJECT: a weight differs"),
        ({"verdict": "CONSISTENT", "not_proved": ["the source"]}, "says CONSISTENT: the source"),
        ({"verdict": "PROVED-WITHOUT-RUNNING"}, "says PROVED-WITHOUT-RUNNING"),
        ({"versions": VERSIONS | {"vllm": "0.18.0"}}, "vllm 0.18.0, but here it is 0.19.1"),
        ({"versions": {"torch": "2.10.0"}}, "vllm absent, but here it is 0.19.1"),
        (
            {"served": {"form": "on a CPU: float32, eager"}},
            "float32, eager, but here it is on a CPU: bfloat16",
        ),
        ({"served": None}, "form unnamed, but here it is on a CPU: bfloat16"),
        ({"manifest_digest": "0" * 64}, "it is about manifest 000000"),
    ],
)
def test_anything_else_is_refused_and_named_and_never_shown_as_accepted(artifact, changes, named, caplog):
    validated(artifact, **changes)
    with pytest.raises((GateFailedError, BadArtifactError)) as caught:
        proof_of(artifact, ServeConfig(), VERSIONS, FORM)
    assert named in caught.value.why
    assert "--unvalidated" in caught.value.fix
    with caplog.at_level(logging.WARNING):
        proof = proof_of(artifact, ServeConfig(unvalidated=True), VERSIONS, FORM)
    assert proof.verdict == identity_of(artifact, proof)["validation"]["verdict"] == "unvalidated"
    assert "UNVALIDATED" in caplog.text
    assert named in caplog.text


def test_a_missing_or_damaged_record_is_none(artifact):
    with pytest.raises(GateFailedError, match="no record of a validation"):
        proof_of(artifact, ServeConfig(), VERSIONS, FORM)
    path = validated(artifact)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BadArtifactError, match="has sha256"):
        proof_of(artifact, ServeConfig(), VERSIONS, FORM)


def test_the_record_may_lie_elsewhere(artifact, tmp_path):
    path = validated(artifact)
    (tmp_path / "record").mkdir()
    for name in (path, path.with_suffix(".sha256")):
        name.rename(tmp_path / "record" / name.name)
    config = ServeConfig(record=tmp_path / "record" / path.name)
    assert proof_of(open_artifact(artifact.root), config, VERSIONS, FORM).verdict == "ACCEPT"
