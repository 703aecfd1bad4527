"""Which artifact is served, for /v1/artifact, a header and a metric."""

from __future__ import annotations

from typing import Any

from fp8pipe.artifact import Artifact
from fp8pipe.artifact.record import DIGEST_HEADER

__all__ = ["identity_headers", "identity_labels", "identity_of"]


def identity_of(artifact: Artifact) -> dict[str, Any]:
    """The manifest's identity. Paths stay inside."""
    manifest = artifact.manifest
    return {
        "name": artifact.root.absolute().name,
        "kind": artifact.kind,
        "digest": artifact.digest,
        "created": manifest.created,
        "tool_version": manifest.tool_version,
        "number_format": None if manifest.number_format is None else manifest.number_format.model_dump(mode="json"),
        "parents": [{"kind": parent.kind, "digest": parent.digest} for parent in manifest.parents],
        "files": [entry.model_dump(mode="json") for entry in manifest.files],
        "warnings": list(manifest.warnings),
    }


def identity_headers(artifact: Artifact) -> tuple[tuple[bytes, bytes], ...]:
    """The digest as a header of every response."""
    return ((DIGEST_HEADER.encode(), b"sha256:" + artifact.digest.encode()),)


def identity_labels(artifact: Artifact) -> dict[str, str]:
    """Labels of the metric `fp8pipe_artifact_info`."""
    return {"name": artifact.root.absolute().name, "kind": artifact.kind, "digest": artifact.digest}
