"""Writes artifacts such that after a crash, there is either the old artifact, none, or the complete new one.

Files are written into `NAME.partial/` and flushed to disk, then the manifest and its checksum. Then all files are
reopened and hashed again, and the directory is renamed. An existing artifact is replaced only by this final renaming,
and only if `force` is given. Before anything is written, the writer checks whether it may replace or delete what is
there, and that no other process is writing to the same output.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fp8pipe.artifact.kinds import Details
from fp8pipe.artifact.manifest import MANIFEST_NAME, FileEntry, Gate, LayerRecord, Manifest, NumberFormat, Parent
from fp8pipe.artifact.reader import PARTIAL_SUFFIX, Artifact, read_artifact, sha256_file
from fp8pipe.artifact.record import checksum_path, remove_checked, write_checked
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError
from fp8pipe.core.machine import distribution_version, ordinary_mode, translate_disk_full
from fp8pipe.core.version import __version__

__all__ = ["CHECKPOINT_PREFIX", "ArtifactWriter", "check_place", "installed_versions", "lock", "partial_of"]

logger = logging.getLogger(__name__)

# An unfinished directory that contains a name with this prefix can be resumed, and is deleted only if `force` is given.
CHECKPOINT_PREFIX = "checkpoint"
LOCK_NAME = ".lock"
_RECORDED = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "pydantic")


class ArtifactWriter:
    """Writes one artifact; to be used as a context manager, in which a full disk raises an OutOfMemoryError.

    Files are written to the directory `root`, which is `NAME.partial/` until `commit` renames it. If the context ends
    without `commit`, the directory is kept, so that an interrupted run can be resumed; `discard` removes it.

    Args:
        output: final directory of the artifact.
        kind: kind of the artifact.
        stage: the command or stage that writes it, for the manifest.
        force: allow the replacement of an existing artifact at `output` (by `commit`) and the deletion of an unfinished
            run that could be resumed (at once).
        resume: keep the files that an unfinished run has left in `NAME.partial/`.

    Raises:
        ConfigurationError: `output` exists and `force` is not given; it exists but is not an artifact; it is inside an
            artifact; there is an unfinished run that can be resumed, and neither `resume` nor `force` is given; another
            process is writing it; or the directory is not writable.
    """

    def __init__(self, output: Path | str, *, kind: str, stage: str, force: bool = False, resume: bool = False) -> None:
        self.output, self.kind, self.stage, self.force = Path(output).absolute(), kind, stage, force
        self.root = partial_of(self.output)
        self.warnings: list[str] = []
        self.gates: list[Gate] = []
        self._stack = ExitStack()
        check_place(self.output, force=force, resume=resume)
        self.resumed = resume and self.root.is_dir()
        self._made = [folder for folder in self.root.parents if not folder.exists()]
        with translate_disk_full(self.output), _translate_unwritable(self.output):
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.root)
            if not self.resumed:
                for path in self.root.iterdir():
                    if path.name != LOCK_NAME:
                        _remove(path)

    def __enter__(self) -> ArtifactWriter:
        self._stack.enter_context(translate_disk_full(self.output))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.close()
        self._stack.__exit__(kind, error, traceback)

    def warn(self, message: str) -> None:
        """Log a warning and record it in the manifest; a message that was recorded before is ignored."""
        if message not in self.warnings:
            self.warnings.append(message)
            logger.warning("%s", message)

    def gate(self, gate: Gate) -> None:
        """Record a gate in the manifest. A failed gate raises no error here, and does not prevent `commit`."""
        self.gates.append(gate)

    def require_gates(self, gates: Sequence[Gate], what: str, fix: str) -> None:
        """Record gates, and raise an error with the message `what` and the advice `fix` if any of them failed.

        Raises:
            GateFailedError: a gate failed; the message contains the numbers and details of all failed gates.
        """
        for gate in gates:
            self.gate(gate)
        failed = [gate for gate in gates if not gate.passed]
        if failed:
            why = "\n       ".join(map(str, failed))
            raise GateFailedError(f"{what} ({len(failed)} gate(s) failed)", why=why, fix=fix)

    def discard(self) -> None:
        """Remove the unfinished directory, and the parent directories that were created for it."""
        self._lock.close()
        shutil.rmtree(self.root, ignore_errors=True)
        with suppress(OSError):  # a parent directory is not empty, because something else was created in it
            for folder in self._made:
                folder.rmdir()

    def commit(
        self, *, details: Details, config: Mapping[str, Any] | None = None, seed: int | None = None,
        parents: Sequence[Parent] = (), number_format: NumberFormat | None = None,
        preprocessing: Mapping[str, Any] | None = None, runtime: Mapping[str, Any] | None = None,
        layers: Sequence[LayerRecord] = (), versions: Mapping[str, str] | None = None, exclude: Iterable[str] = (),
        volatile: Iterable[str] = (), digests: Mapping[str, str] | None = None,
    ) -> Artifact:  # fmt: skip
        """Hash all files, write the manifest, reopen and verify the result, and rename it to the final name.

        Args:
            details: the fields that depend on the kind, as an instance of the kind's class.
            config: the resolved configuration.
            seed: the seed of the run.
            parents: artifacts and models that the artifact was made from.
            number_format: how quantized weights are dequantized; None if no weights are quantized.
            preprocessing: preprocessing of the inputs, as plain data.
            runtime: description of the runtime that the artifact was checked with.
            layers: records of all layers that were considered for quantization.
            versions: versions of further packages, in addition to `installed_versions`.
            exclude: files or directories in `root` that are deleted first (checkpoints).
            volatile: files or directories in `root` whose bytes may differ in a rerun, because they contain measured
                times or depend on free choices of a compiler. They are excluded from the content digest.
            digests: sha256 by path relative to `root`, for files that the caller has read back and hashed after
                writing. These files are not read again.

        Returns:
            The artifact in its final directory.

        Raises:
            BadArtifactError: a file is not a plain file, or the reopened artifact differs from what was written.
            ConfigurationError: something was created at `output` during the run.
            OutOfMemoryError: the disk is full.
        """
        with translate_disk_full(self.output):
            for name in (*exclude, LOCK_NAME):
                _remove(self.root / name)
            remove_checked(self.root / MANIFEST_NAME)
            manifest = Manifest(
                kind=self.kind, stage=self.stage, created=datetime.now(UTC).isoformat(timespec="seconds"),
                tool_version=__version__, versions={**installed_versions(), **(versions or {})},
                config=dict(config or {}), seed=seed, parents=list(parents),
                files=_hash_files(self.root, tuple(volatile), digests or {}), number_format=number_format,
                preprocessing=None if preprocessing is None else dict(preprocessing), runtime=dict(runtime or {}),
                layers=list(layers), gates=self.gates, warnings=self.warnings, details=details,
            )  # fmt: skip
            self._write_manifest(manifest, frozenset(digests or {}))
            self._rename()
        self._lock.close()
        return Artifact(root=self.output, manifest=manifest)

    def _write_manifest(self, manifest: Manifest, hashed: frozenset[str]) -> None:
        path = self.root / MANIFEST_NAME
        write_checked(path, manifest.to_json())
        sync(self.root)
        reopened = read_artifact(self.root, verify=True, hashed=hashed)
        if reopened.digest != manifest.digest:
            raise BadArtifactError(
                f"{path} was not read back as written",
                why=f"its digest is {reopened.digest}, written was {manifest.digest}",
                fix="check the disk, and whether the configuration holds values that are not plain data",
            )

    def _rename(self) -> None:
        _check_output(self.output, self.force)
        replaced = None
        if self.output.exists():
            replaced = self.output.with_name(f"{self.output.name}.replaced-{os.getpid()}")
            self.output.rename(replaced)
        try:
            self.root.rename(self.output)
        except OSError:
            if replaced is not None:
                replaced.rename(self.output)
            raise
        sync(self.output.parent)
        if replaced is not None:
            shutil.rmtree(replaced)


def installed_versions(names: Iterable[str] = _RECORDED) -> dict[str, str]:
    """Versions of Python and of the given distributions, except those not installed; the packages are not imported."""
    found = {name: distribution_version(name) for name in names}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hash_files(root: Path, volatile: tuple[str, ...], digests: Mapping[str, str]) -> list[FileEntry]:
    """Set the permissions of all files according to the umask, flush them to disk, and hash those not in `digests`.

    Raises:
        BadArtifactError: there is a link, which would break when the artifact is moved, or another special file.
    """
    entries = []
    mode = ordinary_mode(root)
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BadArtifactError(
                f"{name} is not a plain file",
                why="an artifact holds plain files and directories only",
                fix="copy the file instead of linking it",
            )
        if path.is_file():
            path.chmod(mode)  # safetensors creates files that only the owner can read
        sync(path)
        if path.is_file():
            changing = any(name == entry or name.startswith(f"{entry}/") for entry in volatile)
            digest = digests.get(name) or sha256_file(path)
            entries.append(FileEntry(path=name, size=path.stat().st_size, sha256=digest, volatile=changing))
    return entries


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_of(output: Path) -> Path:
    """`OUTPUT.partial`, the directory in which an artifact is written until it is complete."""
    return output.with_name(output.name + PARTIAL_SUFFIX)


def check_place(output: Path | str, *, force: bool, resume: bool = False) -> None:
    """Check an output like `ArtifactWriter`, without creating anything; to be called before any expensive work.

    Raises:
        ConfigurationError: see `ArtifactWriter`; locks and permissions are not checked here.
    """
    output = Path(output).absolute()
    _check_output(output, force)
    root = partial_of(output)
    if root.is_symlink():  # the writer would delete the files of the directory that it points to
        raise ConfigurationError(f"{root} is in the way", why="it is a link", fix="remove it, or give another output")
    if root.exists() and not resume:
        _check_disposable(root, output, force)


def _check_output(output: Path, force: bool) -> None:
    """Raise an error if an output is inside an artifact, or exists and is not an artifact that `force` may replace."""
    _check_outside(output)
    if not (output.exists() or output.is_symlink()):
        return
    if not force:
        raise ConfigurationError(
            f"{output} exists already",
            why="an artifact is never overwritten without --force",
            fix="give another output, or --force to replace it",
        )
    artifact = (output / MANIFEST_NAME).is_file()
    if not output.is_dir() or output.is_symlink() or (any(output.iterdir()) and not artifact):
        raise ConfigurationError(
            f"{output} is not an artifact, and is not replaced",
            why=f"it holds no {MANIFEST_NAME}" if output.is_dir() else "it is not a plain directory",
            fix="remove it yourself, or give another output",
        )


def _check_outside(output: Path) -> None:
    """Raise an error if an output is inside an artifact, which new files that are not in its manifest would damage."""
    for folder in output.resolve().parents:
        if all(file.is_file() for file in (folder / MANIFEST_NAME, checksum_path(folder / MANIFEST_NAME))):
            raise ConfigurationError(
                f"{output} lies inside the artifact {folder}",
                why=f"{folder / MANIFEST_NAME} does not list it, so that the artifact would be damaged",
                fix=f"give an output outside of it, for example {folder.with_name(f'{folder.name}-{output.name}')}",
            )


def _check_disposable(root: Path, output: Path, force: bool) -> None:
    """Raise an error if `root` is not a directory, or is a run that can be resumed and `force` is not given."""
    if not root.is_dir():
        raise ConfigurationError(
            f"{root} is in the way", why="it is not a directory", fix="remove it, or give another output"
        )
    if not force and any(path.name.startswith(CHECKPOINT_PREFIX) for path in root.iterdir()):
        raise ConfigurationError(
            f"an unfinished run for {output} can be resumed",
            why=f"{root} holds a checkpoint",
            fix="--resume to continue it, or --force to throw it away",
        )


@contextmanager
def _translate_unwritable(output: Path) -> Iterator[None]:
    """A context in which errors about an output that cannot be written become a ConfigurationError (exit code 10)."""
    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigurationError(
            f"{output} cannot be written",
            why=f"{error.strerror}: {error.filename}",
            fix="give an output in a directory you may write to",
        ) from error


def lock(root: Path) -> IO[str]:
    """Lock a directory, so that no other process writes files into it at the same time.

    Returns:
        The open lock file; closing it releases the lock. If the file system supports no locks, a warning is logged.

    Raises:
        ConfigurationError: another process holds the lock.
    """
    stream = (root / LOCK_NAME).open("w")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise ConfigurationError(
            f"another process is writing {root}",
            why="it holds the directory's lock",
            fix="wait for it to end, or give another output",
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked against a second writer: %s", root, error.strerror)
    return stream
