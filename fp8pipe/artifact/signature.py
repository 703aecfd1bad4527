"""Signatures of a directory by a key of its owner, in OpenSSF's model-signing format. Nothing leaves the machine.

Checksums and hashes show damage. Who can write the files can write them again, too; a signature shows who did. It lies
beside the directory, as `DIR.sig`, so that the files in it stay those of the manifest.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError

__all__ = ["check_signature", "sign_directory", "signature_path"]

# model-signing gives the representation of a list of sentences, in which quotes may be escaped.
_PARTS = (
    ("other bytes", re.compile(r"Hash mismatch for \\?'(.*?)\\?':")),
    ("not signed", re.compile(r"Extra files found in model \\?'.*?\\?': ([^\"'\\]*)")),
    ("missing", re.compile(r"Missing files in model \\?'.*?\\?': ([^\"'\\]*)")),
)


def signature_path(directory: Path) -> Path:
    """`DIR.sig`, beside the directory."""
    absolute = Path(directory).absolute()
    return absolute.with_name(absolute.name + ".sig")


def sign_directory(
    directory: Path, output: Path, *, key: Path, certificate: Path | None = None, chain: Sequence[Path] = (),
    password: str | None = None,
) -> Path:  # fmt: skip
    """Sign every file in a directory.

    Args:
        directory: an artifact, a run's directory, or any other.
        output: where the signature is written.
        key: private key of an elliptic curve, PEM.
        certificate: of that key, PEM; then the signature is checked with certificates instead of the public key.
        chain: certificates between it and a root.
        password: of the key.

    Raises:
        MissingCapabilityError: model-signing is not installed.
        ConfigurationError: no such directory, or a key or certificate that cannot be used.
    """
    signing, hashing = _module("signing"), _module("hashing")
    if not directory.is_dir():
        raise ConfigurationError(f"{directory} is not a directory", why="a whole directory is signed", fix="give one")
    if password is not None and certificate is not None:
        raise ConfigurationError(
            "a locked key cannot sign with a certificate", why="model-signing takes no password there",
            fix="unlock the key, or sign without --certificate",
        )  # fmt: skip
    config = signing.Config().set_hashing_config(_hashing(hashing))
    try:
        if certificate is None:
            # Annotated as str, and handed to a function that takes bytes only.
            locked = None if password is None else password.encode()
            config.use_elliptic_key_signer(private_key=key, password=locked)
        else:
            config.use_certificate_signer(private_key=key, signing_certificate=certificate, certificate_chain=chain)
        config.sign(directory, output)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigurationError(
            f"{directory} cannot be signed", why=" ".join(str(error).split())[:300] or type(error).__name__,
            fix="give a private key of an elliptic curve in PEM form, and its password if it has one",
        ) from error  # fmt: skip
    return output


def check_signature(
    directory: Path, signature: Path, *, public_key: Path | None = None, certificates: Sequence[Path] = ()
) -> str:
    """What is wrong with the signature of a directory, in words; empty when nothing is.

    Give the signer's public key, or the roots that are trusted, as PEM.

    Raises:
        MissingCapabilityError: model-signing is not installed.
        ConfigurationError: the key or a certificate cannot be read.
    """
    verifying, hashing = _module("verifying"), _module("hashing")
    if not signature.is_file():
        return "there is no such signature"
    config = verifying.Config().set_hashing_config(_hashing(hashing))
    try:
        if public_key is not None:
            config.use_elliptic_key_verifier(public_key=public_key)
        else:
            config.use_certificate_verifier(certificate_chain=certificates)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigurationError(
            "the key or certificate cannot be used", why=" ".join(str(error).split())[:300], fix="give it in PEM form"
        ) from error
    try:
        config.verify(directory, signature)
    except Exception as error:  # a wrong key, a changed file and a damaged signature raise different things
        return _in_words(" ".join(str(error).split())) or f"it does not fit ({type(error).__name__})"
    return ""


def _in_words(text: str) -> str:
    """Which files differ, without the digests, which are shown as raw bytes."""
    found = {what: ", ".join(pattern.findall(text)) for what, pattern in _PARTS}
    return "; ".join(f"{what}: {names}" for what, names in found.items() if names) or text[:300]


def _hashing(hashing: Any) -> Any:
    """Every file counts; nothing is ignored, not even what looks like git's."""
    return hashing.Config().use_file_serialization().set_ignored_paths(paths=(), ignore_git_paths=False)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise MissingCapabilityError(
            "model-signing is not installed", why=str(error), fix="pip install 'fp8pipe[sign]'"
        ) from error
