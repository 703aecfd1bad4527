"""What an export says of its model, read once at the start, after every file's digest was checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from exporters.graph.formats import CLASSES_FILE, GraphDetails
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.artifact.kinds import kind_named
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, Preprocessing, read_model_file

__all__ = ["ServedModel", "read_model"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A vision export."""

    artifact: Artifact  # the export
    name: str  # what clients call it: the directory's name
    preprocessing: Preprocessing  # from a picture to the input, the same that calibration used
    classes: tuple[str, ...] | None  # names in the order of the outputs; None for a backbone
    input_name: str  # of the graph
    output_name: str  # of the graph

    @property
    def engine(self) -> str:
        """The engine that runs it, as `--engine` names it."""
        return kind_named(self.artifact.kind).engines[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, H, W) of one input."""
        return (3, *self.preprocessing.crop)


def read_model(export: Path) -> ServedModel:
    """Read an export; every file but engines, which are caches, is hashed.

    Raises:
        BadArtifactError: a file is not what the manifest says, or the export is of no vision model.
    """
    artifact = open_artifact(export, caches="engines")
    details = artifact.manifest.details
    if not isinstance(details, GraphDetails) or not (artifact.root / PREPROCESSING_FILE).is_file():
        raise BadArtifactError(
            f"{export} is no vision model's export",
            why=f"it is of kind {artifact.kind!r}, or has no {PREPROCESSING_FILE}",
            fix="export a vision model",
        )
    return ServedModel(
        artifact=artifact,
        name=artifact.root.resolve().name,
        preprocessing=read_model_file(Preprocessing, artifact.root / PREPROCESSING_FILE),
        classes=_classes(artifact.root / CLASSES_FILE),
        input_name=details.input.name,
        output_name=details.output.name,
    )


def _classes(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    try:
        return tuple(str(name) for name in json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise BadArtifactError(f"{path} is no list of names", why=str(error), fix="export it again") from error
