"""Lets an interrupted export be resumed: records which shards were completely written.

The record is a file beside the shards. It is valid for one plan: the same source files (names, sizes and modification
times), the same options and the same layout. Kept shards are compared with the source bit for bit like all others
before the export is finished, so a wrong record cannot lead to a wrong export.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from exporters.vllm.plan import ExportPlan
from fp8pipe.artifact.manifest import canonical_digest
from fp8pipe.core.version import __version__
from fp8pipe.models.checkpoint.tensors import shard_names

__all__ = ["PROGRESS_NAME", "ExportProgress"]

PROGRESS_NAME: Final = ".export-progress.json"


class ExportProgress:
    """The finished shards of a plan in an unfinished export directory.

    Attributes:
        finished: names of the finished shards.
    """

    def __init__(self, root: Path, plan: ExportPlan) -> None:
        self._path, self._key = root / PROGRESS_NAME, _key(plan)
        sizes = self._read()
        there = {name for name, size in sizes.items() if _size(root / name) == size}
        self._sizes = {name: sizes[name] for name in shard_names(len(plan.shards)) if name in there}
        self.finished = frozenset(self._sizes)

    def add(self, shard: Path) -> None:
        """Record a shard that is completely on disk; the record is replaced atomically."""
        self._sizes[shard.name] = shard.stat().st_size
        pending = self._path.with_name(f"{PROGRESS_NAME}.partial")
        with pending.open("w", encoding="utf-8") as stream:
            json.dump({"key": self._key, "shards": self._sizes}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(pending, self._path)

    def forget(self) -> None:
        """Remove the record, because written files turned out to be wrong; the next export starts from scratch."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, int]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {str(name): int(size) for name, size in found["shards"].items()} if found["key"] == self._key else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # no record, or a damaged one after a crash: everything is written again


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _key(plan: ExportPlan) -> str:
    """Digest of everything that determines the bytes of the shards."""
    entries = sorted(plan.source.tensors.values(), key=lambda entry: entry.name)
    files = {entry.file: entry.file.stat() for entry in entries}
    outputs = [[[o.name, o.dtype, o.shape] for unit in shard for o in unit.outputs] for shard in plan.shards]
    return canonical_digest(
        [
            __version__,
            plan.options.model_dump(mode="json", exclude={"force"}),
            [[str(file.absolute()), found.st_size, found.st_mtime_ns] for file, found in files.items()],
            [[entry.name, entry.start] for entry in entries],
            outputs,
            plan.added_tensors,
        ]
    )
