"""The artifact that another one was made from, found where it may lie and known by its digest alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fp8pipe.artifact.manifest import MANIFEST_NAME
from fp8pipe.artifact.reader import Artifact, open_artifact, read_manifest
from fp8pipe.core.errors import BadArtifactError, ConfigurationError

__all__ = ["parent_at_hand"]


def parent_at_hand(child: Artifact, against: Path | None, *, kind: str) -> Artifact | None:
    """The parent of an artifact, every file of it hashed.

    Args:
        child: whose manifest names it.
        against: where it is; None looks where the manifest says it was, and then beside the child.
        kind: of the parent.

    Returns:
        None where `against` is None and no directory there has the digest that the manifest names.

    Raises:
        ConfigurationError: `against` is another artifact.
        BadArtifactError: `against` is none of this kind, or the parent is damaged.
    """
    digests = {parent.digest for parent in child.manifest.parents}
    if against is not None:
        found = open_artifact(against, kind=kind)
        if found.digest in digests:
            return found
        raise ConfigurationError(
            f"{child.root} was not made from {against}",
            why="its manifest names another artifact, or that artifact has changed since",
            fix="give the artifact that was exported",
        )
    place = next((root for root in _places(child) if _digest(root) in digests), None)
    return None if place is None else open_artifact(place, kind=kind)


def _places(child: Artifact) -> Iterator[Path]:
    yield from (Path(parent.path) for parent in child.manifest.parents)
    yield from sorted(path.parent for path in child.root.absolute().parent.glob(f"*/{MANIFEST_NAME}"))


def _digest(root: Path) -> str | None:
    """The digest of a directory's manifest; None where there is none that can be read."""
    try:
        return read_manifest(root).digest if (root / MANIFEST_NAME).is_file() else None
    except (BadArtifactError, OSError):
        return None
