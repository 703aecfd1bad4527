"""Signatures with real keys, offline: what was signed is accepted, and nothing else."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fp8pipe.artifact import ArtifactWriter
from fp8pipe.artifact.kinds import Details
from fp8pipe.cli import main

pytest.importorskip("model_signing")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def keys(root: Path, name: str = "key", password: bytes | None = None):
    key = ec.generate_private_key(ec.SECP256R1())
    lock = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    (root / name).write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, lock))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (root / f"{name}.pub").write_bytes(public)
    return key


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
