"""Keys of an elliptic curve, as an owner of artifacts has them."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["PEM", "keys"]

PEM = serialization.Encoding.PEM


def keys(root: Path, name: str = "key", password: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Write the private key `name` and the public one `name`.pub."""
    key = ec.generate_private_key(ec.SECP256R1())
    lock = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    (root / name).write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, lock))
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (root / f"{name}.pub").write_bytes(public)
    return key
