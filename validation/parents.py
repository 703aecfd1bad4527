"""Finds the parent of an export on this machine. Without it, a validation can compare an export only with itself."""

from __future__ import annotations

from pathlib import Path

from exporters.parents import candidate_artifacts, local_model
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.core.errors import ConfigurationError

__all__ = ["artifact_at_hand", "parent_at_hand"]


def parent_at_hand(export: Artifact) -> Path | None:
    """Find the parent at the path in the manifest or next to the export; None if no candidate has the right digest.

    Nothing is downloaded: a model from a hub is used as the parent only if it is given with `--against`.
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
    """Open the artifact that an export was made from and check its hashes: `against` if given, else the one found.

    Raises:
        ConfigurationError: `against` is not the parent of the export.
        BadArtifactError: the artifact is damaged or of another kind.
    """
    if against is None:
        place = parent_at_hand(export)
        return None if place is None else open_artifact(place, kind=kind)
    source = open_artifact(against, kind=kind)
    if source.digest not in {parent.digest for parent in export.manifest.parents}:
        raise ConfigurationError(
            f"{export.root} was not made from {against}",
            why="the manifest of the export names another artifact, or that artifact has changed since",
            fix="name the artifact that was exported",
        )
    return source
