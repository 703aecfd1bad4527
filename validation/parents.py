"""The parent of an export, where it is at hand: a validation without it compares an export with its own word."""

from __future__ import annotations

from pathlib import Path

from exporters.parents import candidate_artifacts, local_model
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.core.errors import ConfigurationError

__all__ = ["artifact_at_hand", "parent_at_hand"]


def parent_at_hand(export: Artifact) -> Path | None:
    """Where the parent lies: where the manifest says, or beside the export; None where no digest is the parent's.

    Nothing is fetched: a model of a hub is the parent only where it is named (`--against`).
    """
    for parent in export.manifest.parents:
        if parent.kind == "model":
            found = local_model(export, parent)
        else:
            candidates = candidate_artifacts(export, parent)
            found = next((one.root for one in candidates if one.digest == parent.digest), None)
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
