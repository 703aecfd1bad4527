"""Pushing to a hub that speaks HTTP: what arrives, what is refused, what is said, and that it can be repeated."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import fake_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http
from records import write_sound_record
from small_artifacts import details_of

from fp8pipe.artifact import ArtifactWriter
from fp8pipe.artifact.gate import none_of
from fp8pipe.artifact.push import Target, plan_push, push
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError, MissingCapabilityError

OWN = ("manifest.json", "manifest.sha256")
_ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def hub():
    with fake_hub() as found:
        yield found


@pytest.fixture(autouse=True)
def _plain_client(monkeypatch):
    """No seconds of waiting between tries; and LFS, which the fake hub speaks, in the place of Xet."""
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def write(place, passed=True, gates=1):
    with ArtifactWriter(place, kind="onnx-export", stage="export") as writer:
        (writer.root / "model.onnx").write_bytes(b"\x4a\x80\x50" + bytes(range(256)) * 40)
        (writer.root / "engines").mkdir()
        (writer.root / "engines" / "rtx-8.9 [a].engine").write_bytes(b"engine" * 100)
        (writer.root / "README.md").write_text("---\nlibrary_name: onnx\n---\n# It\n")
        for _ in range(gates):
            writer.gate(none_of("codes differing", 0 if passed else 3))
        return writer.commit(details=details_of("onnx-export"))


@pytest.fixture
def artifact(tmp_path):
    written = write(tmp_path / "export")
    write_sound_record(written.root)
    return written


def client(hub):
    return HfApi(endpoint=hub.url, token="hf_secret")


def test_the_bytes_that_arrive_have_the_manifest_s_digests(hub, artifact):
    address = push(plan_push(artifact.root), Target("org/name"), client(hub))
    assert address.startswith(f"{hub.url}/org/name/commit/")
    listed = {entry.path: entry.sha256 for entry in artifact.manifest.files}
    arrived = {name: hashlib.sha256(data).hexdigest() for name, data in hub.files.items() if name not in OWN}
    assert arrived == listed
    assert {name: hub.files[name] for name in OWN} == {name: (artifact.root / name).read_bytes() for name in OWN}
    assert artifact.digest[:12] in hub.commits[0]["summary"]
    assert artifact.digest in hub.commits[0]["description"]
    assert hub.private == {"org/name": False}
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_branch_a_pull_request_and_a_private_repository(hub, artifact):
    plan = plan_push(artifact.root)
    push(plan, Target("org/name", private=True, revision="next"), client(hub))
    assert hub.private == {"org/name": True}
    assert any(call.startswith("POST /api/models/org/name/commit/next") for call in hub.calls)
    hub.calls.clear()
    assert push(plan, Target("org/name", create_pr=True), client(hub)).endswith("/discussions/1")
    assert "POST /api/repos/create" not in hub.calls


def test_a_public_repository_is_not_taken_for_a_private_one(hub, artifact):
    hub.private["org/name"] = False
    with pytest.raises(ConfigurationError, match="is public"):
        push(plan_push(artifact.root), Target("org/name", private=True), client(hub))
    assert not hub.files


@pytest.mark.parametrize(
    ("place", "status", "kind", "said"),
    [
        ("/api/repos/create", 401, ConfigurationError, "does not accept the token"),
        ("/api/repos/create", 500, MissingCapabilityError, "the hub failed"),
        ("/preupload/", 403, ConfigurationError, "may not write to org/name"),
        ("/preupload/", 404, ConfigurationError, "not on the hub"),
        ("/commit/", 409, ConfigurationError, "changed at the same time"),
        ("/commit/", 500, MissingCapabilityError, "the hub failed"),
        ("/objects/batch", 403, ConfigurationError, "may not write to org/name"),
        ("/blob/", 403, ConfigurationError, "may not write to org/name"),
        ("/blob/", 500, MissingCapabilityError, "the hub failed"),
    ],
)
def test_refusals_are_told_in_plain_words(hub, artifact, place, status, kind, said):
    hub.fail[place] = status
    with pytest.raises(kind, match=said) as caught:
        push(plan_push(artifact.root), Target("org/name"), client(hub))
    assert f"answered {status}" in caught.value.why
    assert caught.value.fix
    assert "hf_secret" not in str(caught.value)
    assert not hub.commits


def test_no_hub_at_all(artifact):
    with fake_hub() as gone:
        api = client(gone)
    with pytest.raises(MissingCapabilityError, match="cannot be reached"):
        push(plan_push(artifact.root), Target("org/name"), api)


def test_a_name_that_is_none(hub, artifact):
    with pytest.raises(ConfigurationError, match="is not a repository name"):
        push(plan_push(artifact.root), Target("a/b/c"), client(hub))


def test_a_cut_upload_is_repeated_without_harm(hub, artifact):
    hub.cut = 1
    with pytest.raises(MissingCapabilityError, match="cannot be reached"):
        push(plan_push(artifact.root), Target("org/name"), client(hub))
    assert len(hub.blobs) == 1
    assert not hub.commits
    hub.cut = None
    hub.calls.clear()
    push(plan_push(artifact.root), Target("org/name"), client(hub))
    assert sum(call.startswith("PUT") for call in hub.calls) == 1
    assert set(hub.files) == {entry.path for entry in artifact.manifest.files} | set(OWN)


def test_a_damaged_artifact_or_one_with_a_failed_gate_stays_here(tmp_path):
    damaged = write(tmp_path / "damaged")
    data = bytearray((damaged.root / "model.onnx").read_bytes())
    data[7] ^= 1
    (damaged.root / "model.onnx").write_bytes(bytes(data))
    with pytest.raises(BadArtifactError, match="is not what was written"):
        plan_push(damaged.root)
    with pytest.raises(GateFailedError, match="1 gate"):
        plan_push(write(tmp_path / "failed", passed=False).root)


def test_the_record_of_a_validation_counts_if_it_speaks_of_these_files(tmp_path):
    artifact = write(tmp_path / "export", gates=0)
    with pytest.raises(GateFailedError, match="there is no record of a validation"):
        plan_push(artifact.root)
    assert len(plan_push(artifact.root, unvalidated=True).notes) == 2  # no gates, no record
    path = write_sound_record(artifact.root, manifest_digest="0" * 64)
    with pytest.raises(BadArtifactError, match="it is about manifest"):
        plan_push(artifact.root)
    write_sound_record(artifact.root)
    assert len(plan_push(artifact.root).notes) == 1
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BadArtifactError, match="has sha256"):
        plan_push(artifact.root)
    for verdict in ("CONSISTENT", "PROVED-WITHOUT-RUNNING"):
        write_sound_record(artifact.root, verdict=verdict)
        with pytest.raises(GateFailedError, match=f"says {verdict}"):
            plan_push(artifact.root)
        assert any(verdict in note for note in plan_push(artifact.root, unvalidated=True).notes)
    write_sound_record(artifact.root, verdict="REJECT")
    for unvalidated in (False, True):
        with pytest.raises(GateFailedError, match="says REJECT"):
            plan_push(artifact.root, unvalidated=unvalidated)


def run(*arguments, **variables):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment = kept | {"PYTHONPATH": str(_ROOT), **variables}
    command = [sys.executable, "-P", "-m", "fp8pipe", "push", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_takes_endpoint_and_token_from_the_environment(hub, artifact, tmp_path):
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    planned = run(artifact.root, "org/name", "--dry-run", **variables)
    assert planned.returncode == 0, planned.stderr
    assert "would upload 5 files" in planned.stdout
    assert not hub.calls
    assert run(artifact.root, "org/name", **variables).returncode == 11  # no token
    done = run(artifact.root, "org/name", "--json", HF_TOKEN="hf_env", **variables)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"].startswith(hub.url)
    assert hub.tokens == {"Bearer hf_env"}
    hub.fail["/preupload/"] = 403
    assert run(artifact.root, "org/name", HF_TOKEN="hf_env", **variables).returncode == 10
