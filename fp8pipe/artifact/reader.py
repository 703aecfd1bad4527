"""Opens artifacts, after checking that their files are exactly those that were written.

All files of the manifest must exist with the same size and sha256. The directory must contain no other files, and no
links, because engines load every file that they find in a directory. ONNX graphs must not refer to tensors in files
outside the artifact.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fp8pipe.artifact import external
from fp8pipe.artifact.kinds import kind_named
from fp8pipe.artifact.manifest import CHECKSUM_SINCE, MANIFEST_NAME, FileEntry, Manifest, Parent
from fp8pipe.artifact.record import checksum_path, read_checked
from fp8pipe.core.errors import BadArtifactError, word

__all__ = ["Artifact", "check_file", "open_artifact", "read_manifest", "sha256_file", "staged", "strays"]

PARTIAL_SUFFIX = ".partial"
CHECKSUM_NAME = checksum_path(Path(MANIFEST_NAME)).name
_NAMED = 6  # largest number of artifacts listed in an error message
# Files that model hubs and their clients add to a downloaded directory, and that engines do not load.
_HUB_FILE: Final = ".gitattributes"
_HUB_FOLDER: Final = ".cache/huggingface"


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact."""

    root: Path
    manifest: Manifest

    @property
    def kind(self) -> str:
        """The artifact's kind."""
        return self.manifest.kind

    @property
    def digest(self) -> str:
        """The manifest's digest, which covers all files, because the manifest contains their digests."""
        return self.manifest.digest

    @property
    def content(self) -> str:
        """The content digest, which is the same for a rerun, see `Manifest.content`."""
        return self.manifest.content

    @property
    def size_bytes(self) -> int:
        """Total size of the files listed in the manifest, in bytes."""
        return sum(entry.size for entry in self.manifest.files)

    def as_parent(self) -> Parent:
        """The entry for this artifact in the manifest of another artifact that is made from it."""
        return Parent(kind=self.kind, digest=self.digest, path=str(self.root), content=self.content)


def open_artifact(
    path: Path | str, *, kind: str | Iterable[str] | None = None, verify: bool = True, caches: str | None = None
) -> Artifact:
    """Open a finished artifact.

    Args:
        path: the artifact's directory.
        kind: the accepted kind or kinds; None to accept all.
        verify: hash every file and compare the digests; if False, only the existence and size of files are checked. The
            checksum of the manifest is always checked.
        caches: name of a folder in the artifact whose files can be generated again from the others, and are not
            checked.

    Raises:
        BadArtifactError: there is no such directory; the artifact is unfinished, of a newer schema or of another kind;
            or a file is missing, not listed in the manifest, a link, or differs from the manifest in size or digest.
    """
    root = Path(path)
    if not root.is_dir():
        raise _not_there(root)
    if root.name.endswith(PARTIAL_SUFFIX):
        raise _unfinished(root)
    artifact = read_artifact(root, verify=verify, caches=caches)
    wanted = None if kind is None else ([kind] if isinstance(kind, str) else list(kind))
    if wanted is not None and artifact.kind not in wanted:
        raise BadArtifactError(
            f"{root} is of the wrong kind",
            why=f"it is '{artifact.kind}'; expected {' or '.join(repr(name) for name in wanted)}",
            fix=_toward(artifact.kind, root, wanted),
        )
    return artifact


def _toward(kind: str, root: Path, wanted: list[str]) -> str:
    """Advice for the user who gave an artifact `root` of one kind where one of the kinds `wanted` is required."""
    exports = [name for name in wanted if kind in kind_named(name).made_from]
    if exports:
        target = kind_named(exports[0]).target
        return f"export it first: fp8pipe export {word(root)} --target {target} --output DIR; and give that DIR"
    return "give the directory of an artifact of that kind"


def read_artifact(
    root: Path, *, verify: bool, caches: str | None = None, hashed: frozenset[str] = frozenset()
) -> Artifact:
    """Read and check an artifact like `open_artifact`, but also in a directory `NAME.partial`.

    Args:
        root: the directory.
        verify: as in `open_artifact`.
        caches: as in `open_artifact`.
        hashed: files that the caller has hashed already, of which only existence and size are checked.

    Raises:
        BadArtifactError: the manifest is invalid, or the files do not match it.
    """
    manifest = read_manifest(root)
    findings = [f"{name} {why}" for name, why in strays(root, manifest)]
    looked_at = (e for e in manifest.files if caches is None or not e.path.startswith(f"{caches}/"))
    findings += [
        finding for entry in looked_at if (finding := check_file(root, entry, verify and entry.path not in hashed))
    ]
    if findings:
        raise BadArtifactError(
            f"{root} is not what was written: {len(findings)} finding(s), {len(manifest.files)} file(s) listed",
            why="; ".join(findings),
            fix="copy the artifact again from its source, or write it again",
        )
    return Artifact(root=root, manifest=manifest)


def strays(root: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Find files that are not listed in the manifest, links, and ONNX graphs with invalid external tensors.

    Yields:
        The path relative to `root`, and the problem as a message to be put after it.
    """
    listed = {entry.path for entry in manifest.files} | {MANIFEST_NAME, CHECKSUM_NAME, _HUB_FILE}
    for folder, inner, names in os.walk(root):
        here = Path(folder).relative_to(root)
        for name in sorted((*inner, *names)):
            path = (here / name).as_posix()
            if (root / path).is_symlink():
                yield path, "is a link: an artifact holds plain files, which cannot lead out of it"
            elif name not in inner and path not in listed:
                yield path, "is not listed in the manifest"
        inner[:] = sorted(name for name in inner if (here / name).as_posix() != _HUB_FOLDER)
    for graph in (Path(entry.path) for entry in manifest.files if entry.path.endswith(external.SUFFIX)):
        if (root / graph).is_file():
            beside = {Path(e.path).name: e.size for e in manifest.files if Path(e.path).parent == graph.parent}
            yield from ((graph.as_posix(), why) for why in external.misplaced(root / graph, beside))


@contextmanager
def staged(artifact: Artifact) -> Iterator[Path]:
    """A context that yields a temporary private directory with only the files listed in an artifact's manifest.

    It is meant for engines, which load every file that they find in a directory. Its files are symbolic links to those
    of the artifact, which the caller has verified.
    """
    with tempfile.TemporaryDirectory(prefix="fp8pipe-staged-") as folder:  # mode 0700
        root = Path(folder) / artifact.root.absolute().name
        for entry in artifact.manifest.files:
            place = root / entry.path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to((artifact.root / entry.path).absolute())
        yield root


def read_manifest(root: Path) -> Manifest:
    """Read the manifest in the directory `root`, and verify its checksum.

    Raises:
        BadArtifactError: there is no manifest, its checksum is missing (required since schema 2) or does not match, or
            it is invalid.
    """
    path = root / MANIFEST_NAME
    if not path.is_file():
        raise _unfinished(root)
    if checksum_path(path).exists():
        return Manifest.from_json(read_checked(path), where=str(path))
    manifest = Manifest.from_json(path.read_bytes(), where=str(path))
    if manifest.stored_version >= CHECKSUM_SINCE:
        read_checked(path)
    return manifest


def sha256_file(path: Path) -> str:
    """sha256 (hexadecimal) of a file, which is read in chunks."""
    with path.open("rb", buffering=0) as stream:  # file_digest reuses its own buffer
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_file(root: Path, entry: FileEntry, verify: bool = True) -> str:
    """Check one file of an artifact.

    Args:
        root: the artifact's directory.
        entry: the manifest's entry for the file.
        verify: also hash the file; otherwise only its existence and size are checked.

    Returns:
        A message that describes the problem; empty if there is none.
    """
    path = root / entry.path
    if not path.is_file():
        return f"{entry.path} is missing"
    size = path.stat().st_size
    if size != entry.size:
        return f"{entry.path} has {size} bytes, the manifest says {entry.size}"
    if verify and (found := sha256_file(path)) != entry.sha256:
        return f"{entry.path} has sha256 {found}, the manifest says {entry.sha256}"
    return ""


def _not_there(root: Path) -> BadArtifactError:
    partial = root.with_name(root.name + PARTIAL_SUFFIX)
    if partial.is_dir():
        return BadArtifactError(
            f"{root} does not exist",
            why=f"the run that writes it is unfinished: {partial} is there",
            fix="finish or resume that run",
        )
    return BadArtifactError(
        f"{root} is not an artifact",
        why="it is not a directory" if root.exists() else "there is no such directory",
        fix="give the directory that a finished command wrote",
    )


def _unfinished(root: Path) -> BadArtifactError:
    if root.name.endswith(PARTIAL_SUFFIX):
        return BadArtifactError(
            f"{root} is unfinished", why="the run that writes it did not finish", fix="resume or repeat the run"
        )
    inside = sorted(path.parent.name for path in root.glob(f"*/{MANIFEST_NAME}"))
    return BadArtifactError(
        f"{root} is not an artifact",
        why=f"it holds no {MANIFEST_NAME}" + ("; artifacts lie below it" if inside else ""),
        fix=f"give one of them: {', '.join(str(root / name) for name in inside[:_NAMED])}"
        if inside
        else "give the directory that a finished command wrote",
    )
