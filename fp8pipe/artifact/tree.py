"""What lies in a directory: artifacts, records beside them, and files that no record covers.

A run's directory, a folder of exports and a single artifact are all trees. Nothing is believed here: what looks like an
artifact is found by the names of its files alone, and checked elsewhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from fp8pipe.artifact.checksum import CHECKSUM_SUFFIX, checksum_path
from fp8pipe.artifact.manifest import MANIFEST_NAME
from fp8pipe.artifact.reader import CHECKSUM_NAME, PARTIAL_SUFFIX
from fp8pipe.core.errors import BadArtifactError

__all__ = ["BESIDE", "RECORD_SUFFIX", "RUN_FILE", "Tree", "find_tree"]

RECORD_SUFFIX = ".validation.json"
# What is found out about an artifact lies beside it.
BESIDE = (RECORD_SUFFIX, ".bench.json", ".serve-check.json")
RUN_FILE = "run.json"


@dataclass(slots=True)
class Tree:
    """Paths by what they are, sorted.

    Attributes:
        root: the directory that was searched.
        artifacts: directories that hold a manifest, or its checksum.
        records: JSON files with a checksum, or with the name of a record or a run.
        unfinished: directories of runs that did not end.
        others: files outside of artifacts that have no checksum.
    """

    root: Path
    artifacts: list[Path] = field(default_factory=list)
    records: list[Path] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    def name_of(self, path: Path) -> str:
        """`path` as people know it: relative to the tree."""
        shown = os.path.relpath(path, self.root)
        return self.root.name if shown == "." else shown


def find_tree(root: Path) -> Tree:
    """Look through a directory; links are not followed.

    Raises:
        BadArtifactError: it is not a directory, or an unfinished run's.
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        why = "it is a file" if root.exists() else "there is no such directory"
        raise BadArtifactError(f"{root} cannot be verified", why=why, fix="give the directory of an artifact or a run")
    if root.name.endswith(PARTIAL_SUFFIX):
        raise BadArtifactError(f"{root} is unfinished", why="the run that writes it did not end", fix="resume the run")
    tree = Tree(root)
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        # A model repository for Triton holds a copy of an export's manifest, and other files than it lists.
        if {MANIFEST_NAME, CHECKSUM_NAME} & set(files) and "config.pbtxt" not in files:
            tree.artifacts.append(here)
            folders.clear()
            continue
        tree.unfinished += [here / name for name in folders if name.endswith(PARTIAL_SUFFIX)]
        folders[:] = sorted(name for name in folders if not name.endswith(PARTIAL_SUFFIX))
        _sort_files(tree, here, set(files))
    if tree.artifacts == [root]:  # what was found about it lies beside it
        for suffix in BESIDE:
            beside = root.with_name(root.name + suffix)
            tree.records += [beside] if beside.exists() or checksum_path(beside).exists() else []
    for found in (tree.artifacts, tree.records, tree.unfinished, tree.others):
        found.sort()
    return tree


def _sort_files(tree: Tree, folder: Path, files: set[str]) -> None:
    """Records, known by their checksum, their name, or a checksum that they left behind; and others."""
    checksums = {name for name in files if name.endswith(CHECKSUM_SUFFIX)}
    records = {Path(name).with_suffix(".json").name for name in checksums}
    records |= {name for name in files if name == RUN_FILE or name.endswith(BESIDE)}
    tree.records += [folder / name for name in records]
    # A signature is checked with a key, which only the caller has.
    signatures = {name for name in files if name.endswith(".sig") and (folder / name[: -len(".sig")]).is_dir()}
    tree.others += [folder / name for name in files - checksums - records - signatures]
