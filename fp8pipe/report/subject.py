"""The subject of a report: the artifacts of a run, or a single artifact, each with the records next to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fp8pipe.artifact import MANIFEST_NAME, Artifact, open_artifact
from fp8pipe.artifact.gate import Verdict
from fp8pipe.artifact.kinds import kind_named
from fp8pipe.artifact.runs import RUN_NAME, RunRecord, read_run
from fp8pipe.artifact.verdict import read_verdict
from fp8pipe.core.errors import BadArtifactError, word
from fp8pipe.report.figures import Documents

__all__ = ["Item", "Record", "Subject", "open_subject"]

_RECORDS = ("validation", "bench", "serve-check", "evaluate")


@dataclass(frozen=True, slots=True)
class Record:
    """A record stored next to an export."""

    kind: str  # validation, bench, serve-check or evaluate
    file: str  # its file name, relative to the subject's root
    finding: str  # why the report ignores it; empty if it is intact and applies to the export in its current state
    verdict: Verdict  # its verdict; ANOMALOUS if it is ignored

    @property
    def current(self) -> bool:
        """Whether the record is intact and applies to the export in its current state."""
        return not self.finding


@dataclass(frozen=True, slots=True)
class Item:
    """One opened artifact, and the records next to it."""

    name: str  # directory name, relative to the root; in a run, the stage's name
    artifact: Artifact
    records: tuple[Record, ...]

    @property
    def kind(self) -> str:
        """The artifact's kind."""
        return self.artifact.kind

    @property
    def manifest(self) -> str:
        """Path of its manifest, relative to the root."""
        return f"{self.name}/{MANIFEST_NAME}"

    def file(self, name: str) -> str:
        """Path of one of its files, relative to the root."""
        return f"{self.name}/{name}"

    def has(self, name: str) -> bool:
        """Whether the artifact lists a file of that name that is not empty."""
        return any(entry.path == name and entry.size for entry in self.artifact.manifest.files)

    def record(self, kind: str) -> Record | None:
        """Its record of a kind, if the record applies to the artifact in its current state."""
        return next((record for record in self.records if record.kind == kind and record.current), None)


@dataclass(frozen=True, slots=True)
class Subject:
    """The run or artifact that a report covers, opened and checked."""

    path: Path  # the directory as given by the user
    root: Path  # file names are relative to this directory
    run: RunRecord | None  # None for a single artifact
    items: tuple[Item, ...]  # in the recipe's order
    documents: Documents
    image: Path | None = None  # an image given by the user, for an attention map

    def of_kind(self, *kinds: str) -> Iterator[Item]:
        """The artifacts of the given kinds."""
        return (item for item in self.items if item.kind in kinds)

    def exports(self) -> list[Item]:
        """The artifacts that are exports, that is, whose kind belongs to an export target."""
        return [item for item in self.items if kind_named(item.kind).target]

    def where(self, item: Item) -> str:
        """An artifact's directory as the user would type it."""
        return word(self.path / item.name if self.run is not None else self.path)


def open_subject(path: Path, image: Path | None = None) -> Subject:
    """Open the directory of a run or an artifact, and check the hash of every file.

    Args:
        path: directory of the run or the artifact.
        image: an image given by the user, for an attention map.

    Raises:
        BadArtifactError: `path` is neither a run nor an artifact, or is damaged.
    """
    if (path / RUN_NAME).is_file():
        run = read_run(path)
        documents = Documents(path)
        names = [stage.output for stage in run.stages if (path / stage.output / MANIFEST_NAME).is_file()]
        items = tuple(_item(path, name) for name in dict.fromkeys(names))
        return Subject(path, path, run, items, documents, image)
    if not (path / MANIFEST_NAME).is_file():
        open_artifact(path)  # reports what is wrong: missing or incomplete
        raise BadArtifactError(f"{path} is no run and no artifact")
    absolute = path.absolute()
    documents = Documents(absolute.parent)
    return Subject(path, absolute.parent, None, (_item(absolute.parent, absolute.name),), documents, image)


def _item(root: Path, name: str) -> Item:
    artifact = open_artifact(root / name)
    records = []
    for kind in _RECORDS:
        file = f"{name}.{kind}.json"
        if (root / file).is_file():
            try:
                records.append(Record(kind, file, "", read_verdict(root / file, artifact).said))
            except BadArtifactError as error:
                records.append(Record(kind, file, error.why, Verdict.ANOMALOUS))
    return Item(name, artifact, tuple(records))
