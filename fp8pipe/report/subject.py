"""What a report is about: the artifacts of a run with their records, or one artifact with the records beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fp8pipe.artifact import MANIFEST_NAME, Artifact, open_artifact
from fp8pipe.artifact.gate import Verdict
from fp8pipe.artifact.kinds import kind_named
from fp8pipe.artifact.runs import RUN_NAME, RunRecord, read_run
from fp8pipe.artifact.verdict import read_verdict
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.report.figures import Documents

__all__ = ["Item", "Record", "Subject", "open_subject"]

_RECORDS = ("validation", "bench", "serve-check")


@dataclass(frozen=True, slots=True)
class Record:
    """A record beside an export."""

    kind: str  # validation, bench or serve-check
    file: str  # its name, relative to the subject's root
    finding: str  # why it is not used; empty where it is whole and speaks of the export as it lies there now
    verdict: Verdict  # what it says; ANOMALOUS where it is not used

    @property
    def current(self) -> bool:
        """Whether it is used."""
        return not self.finding


@dataclass(frozen=True, slots=True)
class Item:
    """One artifact, opened, and the records beside it."""

    name: str  # of its directory, relative to the root; the stage's name in a run
    artifact: Artifact
    records: tuple[Record, ...]

    @property
    def kind(self) -> str:
        """The artifact's kind."""
        return self.artifact.kind

    @property
    def manifest(self) -> str:
        """Name of its manifest, relative to the root."""
        return f"{self.name}/{MANIFEST_NAME}"

    def file(self, name: str) -> str:
        """Name of one of its files, relative to the root."""
        return f"{self.name}/{name}"

    def has(self, name: str) -> bool:
        """Whether the artifact lists a file of that name, and it holds something."""
        return any(entry.path == name and entry.size for entry in self.artifact.manifest.files)

    def record(self, kind: str) -> Record | None:
        """Its record of a kind, if it speaks of the artifact as it is."""
        return next((record for record in self.records if record.kind == kind and record.current), None)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is reported on."""

    path: Path  # as given
    root: Path  # what names of files are relative to
    run: RunRecord | None  # None for one artifact
    items: tuple[Item, ...]  # in order of the recipe
    documents: Documents
    image: Path | None = None  # a picture of the user's, for attention maps

    def of_kind(self, *kinds: str) -> Iterator[Item]:
        """Artifacts of some kinds."""
        return (item for item in self.items if item.kind in kinds)

    def exports(self) -> list[Item]:
        """Artifacts that an engine runs, or would."""
        return [item for item in self.items if kind_named(item.kind).target]

    def where(self, item: Item) -> str:
        """An artifact's directory as one would type it."""
        return str(self.path / item.name) if self.run is not None else str(self.path)


def open_subject(path: Path, image: Path | None = None) -> Subject:
    """Open a run's directory, or an artifact's, and check every file: a report speaks of what lies there.

    Raises:
        BadArtifactError: neither, or damaged.
    """
    if (path / RUN_NAME).is_file():
        run = read_run(path)
        documents = Documents(path)
        names = [stage.output for stage in run.stages if (path / stage.output / MANIFEST_NAME).is_file()]
        items = tuple(_item(path, name) for name in dict.fromkeys(names))
        return Subject(path, path, run, items, documents, image)
    if not (path / MANIFEST_NAME).is_file():
        open_artifact(path)  # says what is wrong: absent, or unfinished
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
