"""Signs directories with the owner's key, and checks signatures, in OpenSSF's model-signing format.

Checksums detect damage, but whoever can change files can also update their checksums. A signature proves who wrote the
files. It is stored next to the directory, as `DIR.sig`, so that the directory contains only the files of the manifest.
A record next to an artifact has a signature of its own, so that the signature of the artifact remains valid if the
artifact is copied without the record. Signing and checking are done on this machine, without any network service.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.core.config import Flag, FrozenConfig
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError, one_line

__all__ = ["Trust", "check_signature", "sign", "signature_path"]

# Parts of error messages of model-signing, which contain the repr() of a list of sentences with escaped quotes.
_PARTS = (
    ("other bytes", re.compile(r"Hash mismatch for \\?'(.*?)\\?':")),
    ("not signed", re.compile(r"Extra files found in model \\?'.*?\\?': ([^\"'\\]*)")),
    ("missing", re.compile(r"Missing files in model \\?'.*?\\?': ([^\"'\\]*)")),
)


class Trust(FrozenConfig):
    """The public key or the certificates to check signatures with. Without them, signatures are not checked."""

    public_key: Annotated[Path | None, Flag(default="not checked")] = Field(
        default=None, description="Check signatures with this key, PEM"
    )
    certificates: Annotated[tuple[Path, ...], Flag("certificate")] = Field(
        default=(), description="Check signatures with this trusted root, PEM; repeatable"
    )
    signature: Annotated[Path | None, Flag(default="DIRECTORY.sig")] = Field(
        default=None, description="The directory's signature"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.public_key is not None and self.certificates:
            raise ValueError("a signature is checked with a public key or with certificates: give one of them")
        if self.signature is not None and self.public_key is None and not self.certificates:
            raise ValueError("a signature needs a public key or a certificate to be checked with")
        return self

    def findings(self, directory: Path, records: Iterable[Path]) -> list[Finding]:
        """Check the signatures of a directory and of records next to it.

        Returns:
            One finding for each signature that is missing or does not match; empty without a key or certificates.
        """
        if self.public_key is None and not self.certificates:
            return []
        places = {directory: self.signature or signature_path(directory)} | {r: signature_path(r) for r in records}
        checked = {
            path: check_signature(path, place, public_key=self.public_key, certificates=self.certificates)
            for path, place in places.items()
        }
        return [
            Finding(Check.SIGNATURE, places[path].name, wrong, artifact=path.name)
            for path, wrong in checked.items()
            if wrong
        ]

    def require(self, directory: Path, record: Path) -> None:
        """Raise an error unless the signatures of an artifact and of its validation record, if it exists, are valid.

        Raises:
            BadArtifactError: a signature is missing, was made with another key, or does not match the files.
        """
        found = self.findings(directory, [record] if record.exists() else [])
        if found:
            why, fix = "; ".join(map(str, found)), "copy it again from its source, or have its owner sign it"
            raise BadArtifactError(f"{directory} is not what was signed", why=why, fix=fix)


def signature_path(path: Path) -> Path:
    """Path of the signature of a directory or record: `DIR.sig` or `RECORD.json.sig`, next to it."""
    absolute = Path(path).absolute()
    return absolute.with_name(absolute.name + ".sig")


def sign(
    path: Path, output: Path, *, key: Path, certificate: Path | None = None, chain: Sequence[Path] = (),
    password: str | None = None,
) -> Path:  # fmt: skip
    """Sign every file in a directory, or one file.

    Args:
        path: a directory, such as an artifact or a run, or a file, such as a record.
        output: path of the signature.
        key: elliptic-curve private key, PEM.
        certificate: certificate of that key, PEM. The signature is then checked with certificates instead of the public
            key.
        chain: intermediate certificates between `certificate` and a root certificate.
        password: password of the private key.

    Raises:
        MissingCapabilityError: model-signing is not installed.
        ConfigurationError: the path does not exist, or a key or certificate cannot be used.
    """
    signing, hashing = _module("signing"), _module("hashing")
    if password is not None and certificate is not None:
        raise ConfigurationError(
            "a locked key cannot sign with a certificate", why="model-signing takes no password there",
            fix="unlock the key, or sign without --certificate",
        )  # fmt: skip
    config = signing.Config().set_hashing_config(_hashing(hashing))
    try:
        if certificate is None:
            # model-signing annotates the password as str, but passes it to a function that accepts only bytes.
            locked = None if password is None else password.encode()
            config.use_elliptic_key_signer(private_key=key, password=locked)
        else:
            config.use_certificate_signer(private_key=key, signing_certificate=certificate, certificate_chain=chain)
        config.sign(path, output)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigurationError(
            f"{path} cannot be signed", why=one_line(error),
            fix="give a private key of an elliptic curve in PEM form, and its password if it has one",
        ) from error  # fmt: skip
    return output


def check_signature(
    path: Path, signature: Path, *, public_key: Path | None = None, certificates: Sequence[Path] = ()
) -> str:
    """Check the signature of a directory or file.

    Args:
        path: the directory or file.
        signature: its signature.
        public_key: the signer's public key, PEM. Either this or `certificates` must be given.
        certificates: trusted root certificates, PEM.

    Returns:
        A message that describes the problem; empty if the signature is valid.

    Raises:
        MissingCapabilityError: model-signing is not installed.
        ConfigurationError: the key or a certificate cannot be read.
    """
    verifying, hashing = _module("verifying"), _module("hashing")
    if not signature.is_file():
        return f"there is no such signature: {path.name} is not signed, or was written after `fp8pipe sign`"
    config = verifying.Config().set_hashing_config(_hashing(hashing))
    try:
        if public_key is not None:
            config.use_elliptic_key_verifier(public_key=public_key)
        else:
            config.use_certificate_verifier(certificate_chain=certificates)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigurationError(
            "the key or certificate cannot be used", why=one_line(error), fix="give it in PEM form"
        ) from error
    try:
        config.verify(path, signature)
    except Exception as error:  # wrong keys, changed files and damaged signatures raise different types
        return _in_words(" ".join(str(error).split()), path.name) or f"it does not match ({type(error).__name__})"
    return ""


def _in_words(text: str, name: str) -> str:
    """Shorten an error message of model-signing to the names of the files that differ.

    The message also contains digests as raw bytes. A single signed file is called `.` there; `name` is shown instead.
    """
    found = {what: ", ".join(name if n == "." else n for n in pattern.findall(text)) for what, pattern in _PARTS}
    return "; ".join(f"{what}: {names}" for what, names in found.items() if names) or text[:300]


def _hashing(hashing: Any) -> Any:
    """The hashing configuration, which includes all files, also those of git, which are ignored by default."""
    return hashing.Config().use_file_serialization().set_ignored_paths(paths=(), ignore_git_paths=False)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise MissingCapabilityError(
            "model-signing is not installed", why=str(error), fix="pip install 'fp8pipe[sign]'"
        ) from error
