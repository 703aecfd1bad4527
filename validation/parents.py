"""Finds the parent of an export on this machine: the artifact or model that the export was made from.

Validation compares the export with its parent; without one, it can only check that the export is consistent.
"""

from __future__ import annotations

from pathlib import Path

from exporters.parents import candidate_artifacts, local_model
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.core.errors import ConfigurationError

__all__ = ["artifact_at_hand", "parent_at_hand"]


def parent_at_hand(export: Artifact) -> Path | None:
    """Find the parent at the path recorded in the manifest or next to the export.

    Nothing is downloaded: a parent on the Hub is used only if its local directory is given with `--against`.

    Returns:
        The directory of the parent; None if no candidate has the digest recorded in the manifest.
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
    """Open the artifact that an export was made from and check the hashes of its files.

    Args:
        export: the export.
        against: directory of the artifact; None searches for it with `parent_at_hand`.
        kind: the kind that the artifact must have.

    Returns:
        The artifact; None if `against` is None and the search finds nothing.

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
            why="the manifest of the export records another digest: this is another artifact, or it has changed since",
            fix="give the artifact that was exported",
        )
    return source
