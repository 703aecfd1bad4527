"""Verifies all artifacts below a directory: the bytes of their files, records, parents and contents.

Parents are matched by digest. They are looked for in the verified tree, in the places named by the caller, at the path
recorded in the manifest, and beside the artifact. If a parent is found in none of these, a note says why.

Without contents (`quick`), neither torch nor safetensors is imported: the images that serve have neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from exporters.parents import candidate_artifacts, local_model
from exporters.target import target_of
from fp8pipe.artifact import Artifact, FileEntry, Parent, open_artifact, read_manifest
from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.artifact.verify import Checked, Tree, check_bytes, check_record, find_parent, find_tree
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError


def verify_tree(
    tree: Tree,
    parents: Sequence[Path] = (),
    *,
    quick: bool = False,
    strict: bool = False,
    on_file: Callable[[FileEntry], None] | None = None,
) -> tuple[Checked, list[tuple[str, str]]]:
    """Verify a tree of artifacts.

    Args:
        tree: the contents of the directory.
        parents: further places to look for parents, besides the tree, the recorded paths and the artifacts' neighbours.
        quick: check bytes, records and parents only.
        strict: report files that no record covers as findings.
        on_file: called after each file that was hashed.

    Returns:
        The findings, and the pairs of artifact and parent that were compared.

    Raises:
        BadArtifactError, ConfigurationError: a place in `parents` holds no artifact or model.
        MissingCapabilityError: contents are to be checked, and a package for that is not installed.
    """
    checked = check_bytes(tree, strict=strict, on_file=on_file)
    artifacts = {artifact.root: artifact for artifact in checked.artifacts}
    for path in tree.records:
        findings, notes = check_record(path, artifacts)
        checked.findings += [replace(f, artifact=tree.name_of(path)) for f in findings]
        checked.notes += notes
    family = _Family(checked.artifacts, parents, quick=quick)
    compared = []
    for artifact in checked.artifacts:
        shown = tree.name_of(artifact.root)
        parent, findings, notes = family.parents_of(artifact)
        if artifact.root in checked.damaged:
            notes.append("its bytes are damaged, so its contents were not checked")
        elif not quick:
            parent = None if parent in checked.damaged else parent
            compared += [(shown, str(parent))] if parent is not None else []
            inner, more = _contents(artifact, parent)
            findings, notes = findings + inner, notes + more
        checked.findings += [replace(f, artifact=shown) for f in findings]
        checked.notes += [f"{shown}: {note}" for note in notes]
    return checked, compared


def _contents(artifact: Artifact, parent: Path | None) -> tuple[list[Finding], list[str]]:
    try:
        from exporters.verify.contents import check_contents
    except ImportError as error:
        raise MissingCapabilityError(
            "the contents of artifacts cannot be looked at", why=f"{error.name} is not installed",
            fix="install fp8pipe with its requirements, or check hashes, checksums and records only, with --quick",
        ) from error  # fmt: skip
    return check_contents(artifact, parent)


class _Family:
    """The artifacts and models among which parents are looked up.

    Args:
        artifacts: those of the verified tree.
        places: directories named by the caller, each with artifacts or a model.
        quick: do not hash parents.

    Raises:
        ConfigurationError: a place holds neither an artifact nor a model.
    """

    def __init__(self, artifacts: Sequence[Artifact], places: Sequence[Path], *, quick: bool) -> None:
        self.quick = quick
        self.known = list(artifacts)
        self.named: list[Artifact] = []
        self.models: dict[str, Path] = {}
        for place in places:
            tree = find_tree(place)
            found = [Artifact(root, read_manifest(root)) for root in tree.artifacts]
            self.known += found
            if found and found[0].root == tree.root:
                self.named += found
            if not found:
                from exporters.vllm.source import open_source

                try:
                    self.models[open_source(place).parent.digest] = place
                except (ConfigurationError, BadArtifactError) as error:
                    raise ConfigurationError(
                        f"{place} is not a possible parent",
                        why=f"neither an artifact nor a model: {error.why or error.what}",
                        fix="name the artifact or model that was exported",
                    ) from error  # fmt: skip

    def parents_of(self, artifact: Artifact) -> tuple[Path | None, list[Finding], list[str]]:
        """Look up every parent that the manifest names.

        Returns:
            The directory of the first parent that was found, or None; findings on parents whose digest differs; and
            notes on parents that were not found or cannot be compared.
        """
        path: Path | None = None
        findings, notes = [], []
        for parent in artifact.manifest.parents:
            if parent.digest in self.models and target_of(artifact.kind) is not None:
                path = path or self.models[parent.digest]
                continue
            known, finding, note = find_parent(artifact, parent, self.known)
            place = None if known is None else known.root
            finding = finding or (self._other(artifact, parent) if place is None else None)
            if place is None and finding is None:
                place, note = self._look_up(artifact, parent)
            findings += [finding] if finding is not None else []
            notes += [note] if note and finding is None else []
            path = path or place
        return path, findings, notes

    def _look_up(self, artifact: Artifact, parent: Parent) -> tuple[Path | None, str]:
        """Look for a parent at its recorded path and beside the artifact, and hash its files.

        Returns its directory, or None and a note that says why it cannot be compared. A different digest at the
        recorded path is a note, not a finding: retraining the parent does not make this artifact wrong.
        """
        named = f"parent {parent.kind} {parent.digest[:12]} ({parent.path})"
        if target_of(artifact.kind) is None:
            return None, f"{named}: not compared, as training and quantization change the weights"
        if parent.outdated:
            return None, f"{named}: not compared: {parent.outdated}; export it again"
        if parent.kind == "model" and self.quick:
            return None, f"{named}: models are not hashed with --quick"
        if parent.kind == "model":
            place, note = local_model(artifact, parent), ""
        else:
            place, note = self._artifact(artifact, parent)
        if place is not None:
            return place, note
        there = os.path.exists(parent.path)
        why = note or ("what is there has another digest" if there else "it is neither there nor beside the artifact")
        return None, f"{named}: not compared: {why}; give its directory with --parents"

    def _artifact(self, child: Artifact, parent: Parent) -> tuple[Path | None, str]:
        """Look for a parent that is an artifact; returns its directory, or None, and a note.

        The note says that the artifact found is damaged, or that only its content matches.
        """
        known, _, note = find_parent(child, parent, list(candidate_artifacts(child, parent)))
        if known is None or self.quick:
            return (None, "") if known is None else (known.root, note)
        try:
            open_artifact(known.root)
        except BadArtifactError as error:
            return None, f"{error.what} ({error.why})"
        return known.root, note

    def _other(self, artifact: Artifact, parent: Parent) -> Finding | None:
        """A finding if the caller named an artifact or model of the parent's kind whose digest is not the parent's."""
        others = [(named.root.name, named.digest) for named in self.named
                  if named.kind == parent.kind and named.root != artifact.root]  # fmt: skip
        if parent.kind == "model" and not parent.outdated and parent.digest not in self.models:
            others = [(place.name, digest) for digest, place in self.models.items()]
        if not others:
            return None
        name, digest = others[0]
        return Finding(Check.PARENT, name, f"the manifest names {parent.kind} {parent.digest}; {name} has {digest}")
