"""Opening an artifact: a directory is only used if its bytes are those that were written.

Every file must be listed in the manifest and be a regular file, because engines load whatever is in a directory, listed
or not. ONNX graphs may not refer to tensors outside the artifact.
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
from fp8pipe.core.errors import BadArtifactError

__all__ = ["Artifact", "check_file", "open_artifact", "read_manifest", "sha256_file", "staged", "strays"]

PARTIAL_SUFFIX = ".partial"
CHECKSUM_NAME = checksum_path(Path(MANIFEST_NAME)).name
_NAMED = 6  # largest number of artifacts that an error message lists
# What model hubs and their clients add to a downloaded directory. Engines do not load these.
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
        """The manifest's digest; it covers every file, since the manifest contains their digests."""
        return self.manifest.digest

    @property
    def content(self) -> str:
        """The digest of the reproducible content, which a rerun produces again (`Manifest.content`)."""
        return self.manifest.content

    @property
    def size_bytes(self) -> int:
        """Total size of the listed files."""
        return sum(entry.size for entry in self.manifest.files)

    def as_parent(self) -> Parent:
        """The entry for this artifact in the manifest of an artifact made from it."""
        return Parent(kind=self.kind, digest=self.digest, path=str(self.root), content=self.content)


def open_artifact(
    path: Path | str, *, kind: str | Iterable[str] | None = None, verify: bool = True, caches: str | None = None
) -> Artifact:
    """Open a finished artifact.

    Args:
        path: its directory.
        kind: the kind, or the kinds, that the caller can use; None accepts any.
        verify: whether to hash every file; otherwise only presence and size are checked.
        caches: a folder of files that can be regenerated from the others; they are not checked here.

    Raises:
        BadArtifactError: there is no such directory; or the artifact is unfinished, of a newer schema or of another
            kind; or a file is missing, not listed, a link, or differs in size or digest (the message names the file
            and both values). The manifest's own checksum is always checked.
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
    """Advice for the user who gave an artifact of this kind when another was expected."""
    exports = [name for name in wanted if kind in kind_named(name).made_from]
    if exports:
        target = kind_named(exports[0]).target
        return f"export it first: fp8pipe export {root} --target {target} --output DIR; and give that DIR"
    return "give the directory of an artifact of that kind"


def read_artifact(
    root: Path, *, verify: bool, caches: str | None = None, hashed: frozenset[str] = frozenset()
) -> Artifact:
    """Read and check the artifact in `root`, whatever the directory's name (the writer checks `NAME.partial`).

    Files in `hashed` were hashed by the caller already, so only their presence and size are checked.
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
    """Unlisted files, links, and graphs with invalid external tensors: the name of each, and what is wrong."""
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
    """A private directory with only the listed files of an artifact, for engines that load whatever a directory holds.

    The files are symbolic links to those of the artifact, which the caller has verified.
    """
    with tempfile.TemporaryDirectory(prefix="fp8pipe-staged-") as folder:  # mode 0700
        root = Path(folder) / artifact.root.absolute().name
        for entry in artifact.manifest.files:
            place = root / entry.path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to((artifact.root / entry.path).absolute())
        yield root


def read_manifest(root: Path) -> Manifest:
    """Read the manifest in `root` and verify its checksum, which manifests of schema version 1 need not have.

    Raises:
        BadArtifactError: there is no manifest, its checksum is missing or does not match, or it is invalid.
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
    """sha256 of a file's bytes, hexadecimal, read in chunks."""
    with path.open("rb", buffering=0) as stream:  # file_digest reuses its own buffer
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_file(root: Path, entry: FileEntry, verify: bool = True) -> str:
    """What is wrong with one file of an artifact, in words; empty if nothing is."""
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
