"""The parent of an export, where it is at hand: a validation without it compares an export with its own word."""

from __future__ import annotations

from pathlib import Path

from exporters.vllm.source import open_source
from fp8pipe.artifact import MANIFEST_NAME, Artifact, open_artifact, read_manifest
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError

__all__ = ["artifact_at_hand", "parent_at_hand"]


def parent_at_hand(export: Artifact) -> Path | None:
    """Where the parent lies: where the manifest says, or beside the export; None where no digest is the parent's.

    Nothing is fetched: a model of a hub is the parent only where it is named (`--against`).
    """
    beside = export.root.absolute().parent
    for parent in export.manifest.parents:
        named = Path(parent.path)
        places = [named, beside / named.name, *sorted(beside.iterdir())]
        if parent.kind == "model":
            local = [named] if parent.path.startswith("sample:") else [p for p in places[:2] if p.exists()]
            found = next((place for place in local if _model_digest(place) == parent.digest), None)
        else:
            artifacts = (place for place in places if (place / MANIFEST_NAME).is_file())
            found = next((place for place in artifacts if _digest(place) == parent.digest), None)
        if found is not None:
            return found
    return None


def artifact_at_hand(export: Artifact, against: Path | None, *, kind: str) -> Artifact | None:
    """The artifact that an export was made from, every file of it hashed: `against`, or the one that is at hand.

    Raises:
        ConfigurationError: `against` is another artifact.
        BadArtifactError: it is none of this kind, or damaged.
    """
    if against is None:
        place = parent_at_hand(export)
        return None if place is None else open_artifact(place, kind=kind)
    source = open_artifact(against, kind=kind)
    if source.digest not in {parent.digest for parent in export.manifest.parents}:
        raise ConfigurationError(
            f"{export.root} was not made from {against}",
            why="its manifest names another artifact, or that artifact has changed since",
            fix="give the artifact that was exported",
        )
    return source


def _digest(place: Path) -> str:
    try:
        return Artifact(place, read_manifest(place)).digest
    except Fp8PipeError:
        return ""


def _model_digest(place: Path) -> str:
    try:
        return open_source(place).parent.digest
    except Fp8PipeError:
        return ""
