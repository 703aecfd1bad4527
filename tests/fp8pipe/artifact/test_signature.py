"""Signatures with real keys, offline: what was signed is accepted, and nothing else."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from records import write_sound_record
from small_artifacts import details_of

from fp8pipe.artifact import ArtifactWriter, none_of, open_artifact, remove_checked, write_checked
from fp8pipe.artifact.kinds import Details
from fp8pipe.artifact.record import record_path
from fp8pipe.artifact.signature import signature_path
from fp8pipe.cli import main
from fp8pipe.core.errors import BadArtifactError
from serving.config import ServeConfig
from serving.http.service import proof_of

pytest.importorskip("model_signing")
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from signing_keys import PEM, keys


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def artifact(tmp_path: Path, plain_kind: str) -> Path:
    with ArtifactWriter(tmp_path / "a", kind="plain", stage="x") as writer:
        (writer.root / "w.bin").write_bytes(b"weights")
        return writer.commit(details=Details()).root


@pytest.fixture
def signed(artifact, tmp_path):
    keys(tmp_path)
    ended = invoke("sign", artifact, "--key", tmp_path / "key")
    assert ended.exit_code == 0, ended.output
    assert (tmp_path / "a.sig").is_file()
    return artifact


def test_what_was_signed_is_accepted(signed, tmp_path):
    ended = invoke("verify", signed, "--public-key", tmp_path / "key.pub", "--strict")
    assert ended.exit_code == 0, ended.output
    ended = invoke("verify", tmp_path, "--json")
    assert not [note for note in json.loads(ended.stdout)["notes"] if "a.sig" in note]


def test_another_key_is_refused(signed, tmp_path):
    keys(tmp_path, "other")
    ended = invoke("verify", signed, "--public-key", tmp_path / "other.pub")
    assert ended.exit_code == 12
    assert "[signature] a.sig" in ended.stderr


def test_a_forger_who_makes_every_hash_right_is_found(signed, tmp_path):
    for attempt in range(20):  # digests are quoted as bytes, so each makes another text of the error
        with ArtifactWriter(signed, kind="plain", stage="x", force=True) as writer:
            (writer.root / "w.bin").write_bytes(b"poison %d" % attempt)
            writer.commit(details=Details())
        assert invoke("verify", signed).exit_code == 0
        ended = invoke("verify", signed, "--public-key", tmp_path / "key.pub")
        assert ended.exit_code == 12
        assert "[signature] a.sig: other bytes: manifest.json, manifest.sha256, w.bin" in ended.stderr


def test_an_added_file_and_a_missing_signature_are_found(signed, tmp_path):
    (signed / "added.txt").write_text("x")
    ended = invoke("verify", signed, "--public-key", tmp_path / "key.pub")
    assert ended.exit_code == 12
    assert "not signed: added.txt" in ended.stderr
    (tmp_path / "a.sig").unlink()
    ended = invoke("verify", signed, "--public-key", tmp_path / "key.pub")
    assert "there is no such signature" in ended.stderr


@pytest.fixture
def accepted(tmp_path):
    """An export with its record, both signed."""
    with ArtifactWriter(tmp_path / "a", kind="onnx-export", stage="export") as writer:
        (writer.root / "model.onnx").write_bytes(b"\x4a\x05graph")  # a field that says nothing
        writer.gate(none_of("codes differing", 0))
        root = writer.commit(details=details_of("onnx-export")).root
    write_sound_record(root)
    keys(tmp_path)
    assert invoke("sign", root, "--key", tmp_path / "key").exit_code == 0
    return root


def edited(record: Path) -> None:
    """The record says something else, and its checksum is right."""
    write_checked(record, json.dumps(json.loads(record.read_text()) | {"tool_version": "edited"}))


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (edited, "a.validation.json.sig: other bytes: a.validation.json"),
        (lambda record: signature_path(record).unlink(), "a.validation.json is not signed"),
        (remove_checked, "a.validation.json cannot be read"),
    ],
    ids=["edited", "unsigned", "removed"],
)
def test_a_record_beside_an_artifact_is_signed_with_it(accepted, tmp_path, attack, said):
    arguments = ("verify", accepted, "--quick", "--strict", "--public-key", tmp_path / "key.pub")
    assert invoke(*arguments).exit_code == 0
    attack(record_path(accepted))
    ended = invoke(*arguments)
    assert ended.exit_code == 12
    assert said in ended.stderr


@pytest.mark.parametrize("command", [("push", "org/name"), ("serve",)], ids=lambda c: c[0])
def test_whoever_needs_the_record_needs_its_signature(accepted, tmp_path, command):
    name, *rest = command
    arguments = (name, accepted, *rest, "--dry-run")
    trusted = (*arguments, "--public-key", tmp_path / "key.pub")
    assert invoke(*trusted).exit_code == 0
    edited(record_path(accepted))
    assert invoke(*arguments).exit_code == 0  # a checksum cannot tell
    ended = invoke(*trusted)
    assert ended.exit_code == 12
    assert "[signature] a.validation.json.sig: other bytes: a.validation.json" in ended.stderr
    (tmp_path / "a.sig").unlink()
    assert "[signature] a.sig: there is no such signature" in invoke(*trusted, "--unvalidated").stderr


def test_a_service_is_refused_where_its_record_is_not_as_signed(accepted, tmp_path):
    config = ServeConfig(public_key=tmp_path / "key.pub", unvalidated=True)
    assert proof_of(open_artifact(accepted), config, {}).verdict == "ACCEPT"
    edited(record_path(accepted))
    with pytest.raises(BadArtifactError, match="not what was signed"):
        proof_of(open_artifact(accepted), config, {})


@pytest.mark.parametrize("options", [("--signature", "s"), ("--public-key", "k", "--certificate", "c")])
def test_how_a_signature_is_checked_is_said_once(signed, options):
    ended = invoke("verify", signed, *options)
    assert ended.exit_code == 10
    assert "a signature" in ended.stderr


def test_a_locked_key_needs_its_password(artifact, tmp_path):
    keys(tmp_path, password=b"secret")
    ended = invoke("sign", artifact, "--key", tmp_path / "key")
    assert ended.exit_code == 10
    assert not (tmp_path / "a.sig").exists()
    (tmp_path / "password").write_text("secret\n")
    ended = invoke("sign", artifact, "--key", tmp_path / "key", "--password-file", tmp_path / "password")
    assert ended.exit_code == 0, ended.output


def _certificate(key, issuer_key, subject: str, issuer: str, *, authority: bool):
    def name(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    built = (
        x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name(issuer)).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, **usage), critical=True)
    )  # fmt: skip
    if not authority:
        built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    return built.sign(issuer_key, hashes.SHA256())


def test_certificates_work_too(artifact, tmp_path):
    root_key, key = keys(tmp_path, "root"), keys(tmp_path)
    for file, parts in (
        ("root.pem", (root_key, root_key, "root", "root", True)),
        ("key.pem", (key, root_key, "me", "root", False)),
    ):
        certificate = _certificate(*parts[:4], authority=parts[4])
        (tmp_path / file).write_bytes(certificate.public_bytes(PEM))
    ended = invoke(
        "sign", artifact, "--key", tmp_path / "key", "--certificate", tmp_path / "key.pem",
        "--chain", tmp_path / "root.pem",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    ended = invoke("verify", artifact, "--certificate", tmp_path / "root.pem")
    assert ended.exit_code == 0, ended.output
    other = keys(tmp_path, "other")
    (tmp_path / "other.pem").write_bytes(_certificate(other, other, "other", "other", authority=True).public_bytes(PEM))
    assert invoke("verify", artifact, "--certificate", tmp_path / "other.pem").exit_code == 12


def test_a_damaged_artifact_is_not_signed(artifact, tmp_path):
    keys(tmp_path)
    (artifact / "w.bin").write_bytes(b"wheights")
    assert invoke("sign", artifact, "--key", tmp_path / "key").exit_code == 12
    assert not (tmp_path / "a.sig").exists()


def test_without_the_package_the_message_says_how_to_get_it(artifact, tmp_path, monkeypatch):
    import sys

    keys(tmp_path)
    for name in ("model_signing", "model_signing.signing", "model_signing.verifying"):
        monkeypatch.setitem(sys.modules, name, None)
    for arguments in (
        ("sign", artifact, "--key", tmp_path / "key"), ("verify", artifact, "--public-key", tmp_path / "key.pub"),
    ):  # fmt: skip
        ended = invoke(*arguments)
        assert ended.exit_code == 11
        assert "fp8pipe[sign]" in ended.stderr
