"""Finds an artifact's parent on this machine: at the path recorded in the manifest, or beside the artifact.

`verify` and `validate` look in the same places. The path alone proves nothing: what is found there is the parent only
if its digest is the one in the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fp8pipe.artifact import MANIFEST_NAME, Artifact, Parent, read_manifest
from fp8pipe.core.errors import Fp8PipeError

__all__ = ["candidate_artifacts", "local_model"]


def candidate_artifacts(child: Artifact, parent: Parent) -> Iterator[Artifact]:
    """Candidates for the parent: at the recorded path, then beside the child by that name, then anything beside it.

    Only manifests are read; unreadable ones are skipped.
    """
    beside = child.root.absolute().parent
    recorded = Path(parent.path)
    for place in dict.fromkeys([recorded, beside / recorded.name, *sorted(beside.iterdir())]):
        if os.path.isfile(place / MANIFEST_NAME):  # unlike Path.is_file, returns False if the directory is not readable
            try:
                yield Artifact(place, read_manifest(place))
            except (Fp8PipeError, OSError):
                continue


def local_model(child: Artifact, parent: Parent) -> Path | None:
    """The local directory of the model that has the parent's digest; its files are hashed.

    Nothing is downloaded: for models from a hub the caller has to name the directory.
    """
    recorded = Path(parent.path)
    beside = child.root.absolute().parent / recorded.name
    places = [recorded] if parent.path.startswith("sample:") else [p for p in (recorded, beside) if os.path.exists(p)]
    return next((place for place in places if _digest(place) == parent.digest), None)


def _digest(model: Path) -> str:
    from exporters.vllm.source import open_source  # imports torch, which artifacts need not

    try:
        return open_source(model).parent.digest
    except (Fp8PipeError, OSError):
        return ""
