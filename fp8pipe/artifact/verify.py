"""The checks of the command `verify` that apply to artifacts of all kinds: file hashes, records and parents.

The checked directory may be that of a run, a folder of exports or a single artifact. Artifacts and records in it are
recognized by the names of their files; the records next to an artifact are checked too, and files that belong to no
artifact or record are reported. All findings are collected, so that the user can decide what to copy again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.artifact.gate import Verdict
from fp8pipe.artifact.manifest import MANIFEST_NAME, FileEntry, Parent, canonical_digest
from fp8pipe.artifact.reader import CHECKSUM_NAME, PARTIAL_SUFFIX, Artifact, check_file, read_manifest, strays
from fp8pipe.artifact.record import CHECKSUM_SUFFIX, check_checksum, checksum_path
from fp8pipe.artifact.runs import RUN_NAME, StageRecord, read_run
from fp8pipe.artifact.signature import signature_path
from fp8pipe.artifact.verdict import former_name, read_verdict
from fp8pipe.core.errors import BadArtifactError

__all__ = ["Checked", "Tree", "check_bytes", "check_record", "find_parent", "find_tree"]

# Suffixes of the records that are written next to an artifact.
_BESIDE = (".validation.json", ".bench.json", ".serve-check.json", ".evaluate.json")
_MANY = 5
_HASHERS = 2  # files hashed in parallel: a core hashes about 1.5 GB per second, and a disk may read faster than that
_UNKNOWN = "no record covers it"


@dataclass(slots=True)
class Tree:
    """The artifacts, records and other files in a directory; each list is sorted."""

    root: Path  # the directory that was searched
    artifacts: list[Path] = field(default_factory=list)  # directories that contain a manifest or its checksum
    records: list[Path] = field(default_factory=list)  # JSON files with a checksum, or with the name of a record or run
    unfinished: list[Path] = field(default_factory=list)  # directories `NAME.partial` of unfinished runs
    others: list[Path] = field(default_factory=list)  # files that belong to no artifact and have no checksum

    @property
    def beside(self) -> list[Path]:
        """Records next to the searched directory, if that is a single artifact."""
        return [path for path in self.records if self.root not in path.parents]

    def name_of(self, path: Path) -> str:
        """`path` relative to the searched directory, for display."""
        shown = os.path.relpath(path, self.root)
        return self.root.name if shown == "." else shown


def find_tree(root: Path) -> Tree:
    """Search a directory for artifacts, records and other files; links are not followed.

    Raises:
        BadArtifactError: `root` is not a directory, or it is that of an unfinished run.
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        why = "it is a file" if root.exists() else "there is no such directory"
        raise BadArtifactError(f"{root} cannot be verified", why=why, fix="give the directory of an artifact or a run")
    if root.name.endswith(PARTIAL_SUFFIX):
        raise BadArtifactError(
            f"{root} is unfinished", why="the run that writes it did not finish", fix="resume the run"
        )
    tree = Tree(root)
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        # A Triton model repository contains a copy of an export's manifest, but not the files that it lists.
        if {MANIFEST_NAME, CHECKSUM_NAME} & set(files) and "config.pbtxt" not in files:
            tree.artifacts.append(here)
            folders.clear()
            continue
        tree.unfinished += [here / name for name in folders if name.endswith(PARTIAL_SUFFIX)]
        folders[:] = sorted(name for name in folders if not name.endswith(PARTIAL_SUFFIX))
        _sort_files(tree, here, set(files))
    if tree.artifacts == [root]:  # the records of a single artifact are next to it
        for suffix in _BESIDE:
            beside = root.with_name(root.name + suffix)
            left = (beside, checksum_path(beside), signature_path(beside))
            tree.records += [beside] if any(path.exists() for path in left) else []
    for found in (tree.artifacts, tree.records, tree.unfinished, tree.others):
        found.sort()
    return tree


def _sort_files(tree: Tree, folder: Path, files: set[str]) -> None:
    """Add the files of a folder to the lists of the tree.

    A file is a record if it has the name of one, or a checksum file; a record whose checksum file alone exists is
    listed too. Checksum files and signatures are not listed.
    """
    checksums = {name for name in files if name.endswith(CHECKSUM_SUFFIX)}
    records = {Path(name).with_suffix(".json").name for name in checksums}
    records |= {name for name in files if name == RUN_NAME or name.endswith(_BESIDE)}
    tree.records += [folder / name for name in records]
    # Signatures are checked by the caller, who has the key.
    signed = {name: name.removesuffix(".sig") for name in files if name.endswith(".sig")}
    signatures = {name for name, of in signed.items() if of in records or (folder / of).is_dir()}
    tree.others += [folder / name for name in files - checksums - records - signatures]


@dataclass(slots=True)
class Checked:
    """The result of checking a directory."""

    artifacts: list[Artifact] = field(default_factory=list)  # artifacts with a readable manifest, damaged or not
    findings: list[Finding] = field(default_factory=list)  # all problems that were found
    notes: list[str] = field(default_factory=list)  # other messages: what was not checked, and unknown files
    damaged: set[Path] = field(default_factory=set)  # directories of artifacts that do not match their manifest
    files: int = 0  # number of files that were hashed


def check_bytes(tree: Tree, *, strict: bool = False, on_file: Callable[[FileEntry], None] | None = None) -> Checked:
    """Hash every file of every artifact, and check every checksum.

    Args:
        tree: the artifacts and records to check.
        strict: report files that belong to no artifact or record as findings instead of notes.
        on_file: called after each file of an artifact, with its entry in the manifest.
    """
    checked = Checked()
    for root in tree.artifacts:
        found, artifact = _check_artifact(root, on_file)
        shown = tree.name_of(root)
        checked.findings += [replace(f, artifact=shown) for f in found]
        if found:
            checked.damaged.add(root)
        if artifact is not None:
            checked.artifacts.append(artifact)
            checked.files += len(artifact.manifest.files) + 2
            failed = [gate for gate in artifact.manifest.gates if not gate.passed]
            checked.notes += [f"{shown}: when it was written, the gate '{gate.name}' failed" for gate in failed]
    for path in tree.records:
        finding = check_checksum(path, former_name(path))
        checked.files += 2
        if finding:
            checked.findings.append(Finding(Check.CHECKSUM, path.name, finding, artifact=tree.name_of(path)))
    unknown = [(tree.name_of(path.parent), path.name) for path in _unknown(tree)]
    if strict:
        checked.findings += [Finding(Check.MANIFEST, name, _UNKNOWN, artifact=shown) for shown, name in unknown]
    else:
        checked.notes += _stray_notes(unknown)
    checked.notes += [f"{tree.name_of(path)}: unfinished, not checked" for path in tree.unfinished]
    return checked


def _stray_notes(unknown: list[tuple[str, str]]) -> list[str]:
    """Notes about unknown files: one per file, or one for a folder with more than `_MANY` of them.

    Args:
        unknown: name of the folder and name of the file, for each file.
    """
    groups: dict[str, list[str]] = {}
    for shown, name in unknown:
        groups.setdefault(shown, []).append(name)
    notes = []
    for shown, names in groups.items():
        many = len(names) > _MANY
        notes += [f"{shown}/: {len(names)} files: {_UNKNOWN}"] if many else [f"{shown}/{n}: {_UNKNOWN}" for n in names]
    return notes


def _check_artifact(root: Path, on_file: Callable[[FileEntry], None] | None) -> tuple[list[Finding], Artifact | None]:
    try:
        manifest = read_manifest(root)
    except (BadArtifactError, OSError) as error:
        checksum = check_checksum(root / MANIFEST_NAME)
        # A manifest of schema 1 needs no checksum. So if the manifest is unreadable and has none, report why it is
        # unreadable, not the missing checksum.
        unchecked = not checksum_path(root / MANIFEST_NAME).exists() and "no checksum" not in str(error)
        check = Check.CHECKSUM if checksum and not unchecked else Check.MANIFEST
        why = checksum if check is Check.CHECKSUM else getattr(error, "why", "") or str(error)
        return [Finding(check, MANIFEST_NAME, why)], None
    findings = [Finding(Check.MANIFEST, name, f"it {why}") for name, why in strays(root, manifest)]
    with ThreadPoolExecutor(_HASHERS) as pool:  # hashing releases the GIL
        verdicts = pool.map(lambda entry: check_file(root, entry), manifest.files)
        for entry, wrong in zip(manifest.files, verdicts, strict=True):
            if wrong:
                findings.append(Finding(Check.HASH, entry.path, wrong))
            if on_file is not None:
                on_file(entry)
    return findings, Artifact(root, manifest)


# Files and folders in the directory of a run, in addition to the outputs of its stages.
_RUN_NAMES = ("recipe.yaml", "stages", "logs")


def _unknown(tree: Tree) -> list[Path]:
    """The files in `tree.others` that do not belong to a run according to the run's record."""
    known = set()
    for path in tree.records:
        if path.name != RUN_NAME:
            continue
        try:
            stages = read_run(path.parent).stages
        except BadArtifactError:
            continue
        for stage in stages:
            names = {stage.log, *(f"{stage.output}/{name}" for name in stage.files)}
            known |= {path.parent / name for name in names if name}
        working = (path.parent / name for name in _RUN_NAMES)
        known |= {other for place in working for other in tree.others if place in (other, *other.parents)}
    return [path for path in tree.others if path not in known]


def check_record(path: Path, artifacts: dict[Path, Artifact]) -> tuple[list[Finding], list[str]]:
    """Check a record against the artifacts that it refers to.

    Args:
        path: the record of a validation, a measurement or a run.
        artifacts: the artifacts that were found, by directory.

    Returns:
        Findings and notes. Both are empty for a record with a wrong checksum, which `check_bytes` reports.
    """
    if check_checksum(path, former_name(path)):
        return [], []  # `check_bytes` has reported it already
    if path.name == RUN_NAME:
        return _check_run(path, artifacts)
    export = artifacts.get(path.with_name(path.stem.rpartition(".")[0]))
    if export is None:
        return [], [f"{path.name}: the export that it is about was not found next to it"]
    try:
        read_verdict(path, export)
    except BadArtifactError as error:
        return [Finding(Check.RECORD, path.name, error.why)], []
    return [], []


def _check_run(path: Path, artifacts: dict[Path, Artifact]) -> tuple[list[Finding], list[str]]:
    """Check that the output of every stage exists and has the recorded content; returns findings and notes."""
    try:
        record = read_run(path.parent)
    except BadArtifactError as error:
        return [Finding(Check.RECORD, path.name, error.why)], []
    findings, notes = [], []
    for stage in record.stages:
        output = path.parent / stage.output
        artifact = artifacts.get(output)
        if not stage.content or stage.verdict is Verdict.INFEASIBLE:
            continue
        if artifact is not None and artifact.content != stage.content:
            why = f"stage {stage.name} wrote content {stage.content}; {stage.output} has {artifact.content}"
            findings.append(Finding(Check.RECORD, path.name, why))
        elif not output.exists():
            findings.append(Finding(Check.RECORD, stage.output, f"stage {stage.name} wrote it; it is missing"))
        elif output.is_file():
            findings += _check_stage_record(output, stage)
        elif artifact is None:
            notes.append(f"{stage.output}: not an artifact that could be opened, so its content is not compared")
    return findings, notes


def _check_stage_record(output: Path, stage: StageRecord) -> Iterator[Finding]:
    """For a stage whose output is a record, check that the record still has the verdict that the run was based on."""
    try:
        verdict = read_verdict(output).verdict
    except BadArtifactError as error:
        yield Finding(Check.RECORD, stage.output, error.why)
        return
    if canonical_digest([stage.key, verdict]) != stage.content:
        why = f"stage {stage.name} was judged with another verdict; the record states {verdict} now"
        yield Finding(Check.RECORD, stage.output, why)


def find_parent(child: Artifact, parent: Parent, known: list[Artifact]) -> tuple[Artifact | None, Finding | None, str]:
    """Find the parent of an artifact.

    Args:
        child: the artifact.
        parent: the entry for the parent in the manifest of `child`.
        known: the artifacts to search.

    Returns:
        The parent, a finding and a note, each None or empty if there is none. The parent is found by its digest, or
        else by its content digest; there is a note in the latter case. There is a finding if an artifact with the
        parent's kind and name has another digest. If the parent is not among `known`, all three are absent.
    """
    same = [other for other in known if other.digest == parent.digest]
    if same:
        return same[0], None, ""
    again = [other for other in known if other.content == parent.content]
    if again:
        note = f"parent {parent.kind} {parent.digest[:12]} was made again with the same content: {again[0].root.name}"
        return again[0], None, note
    name = Path(parent.path).name
    renamed = [other for other in known if other.kind == parent.kind and other.root.name == name]
    if renamed and renamed[0].root != child.root:
        why = f"the manifest names {parent.kind} {parent.digest}; {name} has {renamed[0].digest}"
        return None, Finding(Check.PARENT, name, why), ""
    return None, None, ""
