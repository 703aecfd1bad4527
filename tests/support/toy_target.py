"""An export target that stands in one file: names and sha256 of a tuned model's weight files, as lines of text.

It has all that a target can have, so that tests see whether the commands know a target by nothing but the registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from exporters.target import Engine, ExportTarget, Service
from fp8pipe.artifact import Artifact, ArtifactWriter, open_artifact, sha256_file
from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.artifact.gate import Gate, none_of
from fp8pipe.artifact.kinds import Details
from fp8pipe.artifact.record import ExportRejectedError, write_record
from fp8pipe.core.config import CONFIG_ONLY, FrozenConfig
from fp8pipe.core.plan import Plan

KIND = "toy-export"
LINES = "lines.txt"


class ToyOptions(FrozenConfig):
    """Options of one export."""

    refrain: int = Field(default=1, ge=1, description="how often every line is written")
    force: Annotated[bool, CONFIG_ONLY] = Field(default=False, description="replace an existing output directory")


class ToyDetails(Details):
    """Of an export of this kind."""

    refrain: int = Field(description="as in --refrain")
    lines: int = Field(description="lines in the file")


class ToyRecord(BaseModel):
    """What a validation found."""

    schema_version: int = Field(default=1, description="version of this schema")
    versions: dict[str, str] = Field(default={"toy-engine": "1"}, description="of what took part")
    manifest_digest: str
    engine: str = "toy-engine"
    gates: list[Gate]
    reasons: list[str]
    verdict: str


def text_of(source: Path, refrain: int) -> str:
    """What the file must hold."""
    names = sorted(Path(source).glob("*.safetensors"))
    return "".join(f"{path.name} {sha256_file(path)}\n" * refrain for path in names)


def export_toy(source: Path, output: Path, options: ToyOptions) -> Artifact:
    """Write the export."""
    parent = open_artifact(source)
    with ArtifactWriter(output, kind=KIND, stage="export", force=options.force) as writer:
        text = text_of(source, options.refrain)
        (writer.root / LINES).write_text(text)
        writer.gate(none_of("lines differing", 0, "read back"))
        details = ToyDetails(refrain=options.refrain, lines=len(text.splitlines()))
        config = options.model_dump(exclude={"force"})
        return writer.commit(details=details, config=config, parents=[parent.as_parent()])


def plan_toy(source: Path, output: Path, options: ToyOptions) -> tuple[dict[str, Any], Plan]:
    """The dry run."""
    size = len(text_of(source, options.refrain))
    return {"refrain": options.refrain}, Plan((str(source),), (str(output),), None, size, size)


def verify_toy(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """The file against the manifest, and against the parent."""
    details = artifact.manifest.details_of(ToyDetails)
    text = (artifact.root / LINES).read_text()
    if len(text.splitlines()) != details.lines:
        yield Finding(Check.MANIFEST, LINES, f"it has {len(text.splitlines())} lines, {details.lines} are stated")
    if parent is not None and text != text_of(parent, details.refrain):
        yield Finding(Check.PARITY, LINES, "it is not what follows from the parent")


def validate_toy(export: Path) -> ToyRecord:
    """Run it."""
    artifact = open_artifact(export)
    wrong = sum(len(line.split()) != 2 for line in (artifact.root / LINES).read_text().splitlines())
    gate = none_of("lines without a digest", wrong)
    reasons = [] if gate.passed else [str(gate)]
    verdict = "ACCEPT" if gate.passed else "REJECT"
    record = ToyRecord(manifest_digest=artifact.digest, gates=[gate], reasons=reasons, verdict=verdict)
    write_record(record, export)
    if reasons:
        raise ExportRejectedError(f"{export} was rejected", why=reasons[0], fix="export it again", record=record)
    return record


def describe_toy(export: Path, record: ToyRecord) -> str:
    """For people."""
    return f"{export}: {record.verdict} by {record.engine}"


def plan_validation(artifact: Artifact, stage: str, record: Path, **given: object) -> Plan:
    """Of validate."""
    return Plan((str(artifact.root),), (str(record),), None, 100, 100)


TOY = ExportTarget(
    name="toy", kind=KIND, takes=("falqon",), options=ToyOptions, details=ToyDetails, help="digests as lines of text",
    export=export_toy, plan=plan_toy, verify="toy_target:verify_toy", after=lambda artifact: ["  sing it"],
    engines=(Engine("toy-engine", validate_toy, describe_toy),),
    service=Service("vision", serve=lambda export, config, language: 0, plan=plan_validation),
)  # fmt: skip
