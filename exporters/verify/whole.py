"""Everything about a directory in one call: bytes, records, parents, contents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from exporters.verify.contents import check_contents
from exporters.verify.parents import Family
from fp8pipe.artifact import FileEntry
from fp8pipe.artifact.verify import Checked, Tree, check_bytes, check_record

__all__ = ["verify_tree"]


def verify_tree(
    tree: Tree,
    parents: Sequence[Path] = (),
    *,
    quick: bool = False,
    strict: bool = False,
    on_file: Callable[[FileEntry], None] | None = None,
) -> tuple[Checked, list[tuple[str, str]]]:
    """Verify a tree.

    Args:
        tree: what lies in the directory.
        parents: places where parents may lie that are not in it.
        quick: bytes, records and parents only.
        strict: files that no record covers are findings.
        on_file: called after each file that was hashed.

    Returns:
        what was found, and pairs of artifact and parent that were compared.

    Raises:
        BadArtifactError, ConfigurationError: a place in `parents` holds none.
    """
    checked = check_bytes(tree, strict=strict, on_file=on_file)
    artifacts = {artifact.root: artifact for artifact in checked.artifacts}
    for path in tree.records:
        findings, notes = check_record(path, artifacts)
        checked.findings += [replace(f, artifact=tree.name_of(path)) for f in findings]
        checked.notes += notes
    family = Family(checked.artifacts, parents)
    compared = []
    for artifact in checked.artifacts:
        found, shown = family.parents_of(artifact), tree.name_of(artifact.root)
        findings, notes = found.findings, found.notes
        if artifact.root in checked.damaged:
            notes = [*notes, "its bytes are damaged, so its contents were not looked at"]
        elif not quick:
            parent = None if found.path in checked.damaged else found.path
            compared += [(shown, str(parent))] if parent is not None else []
            inner, more = check_contents(artifact, parent)
            findings, notes = [*findings, *inner], [*notes, *more]
        checked.findings += [replace(f, artifact=shown) for f in findings]
        checked.notes += [f"{shown}: {note}" for note in notes]
    return checked, compared
