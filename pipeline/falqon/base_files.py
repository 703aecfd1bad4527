"""The converted base in files, written while layers are converted and then mapped into memory.

The codes of all layers are half the size of the model in bf16, which itself is only mapped from its files. If they were
kept in memory, converting a model would need that much of it. So they are written in files of some hundred megabytes,
and what is trained are private mappings of those files: the operating system reads pages when they are used and may
drop them again; pages that training changes are copied, and the files stay as they are.

`base.json` records each finished file with its sha256, so a conversion that was interrupted at any moment continues
after the last one. It also holds the key of the run: files of another run are not used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8pipe.artifact import disk_guard, sha256_file
from fp8pipe.artifact.writer import sync
from fp8pipe.core.errors import BadArtifactError

__all__ = ["RECORD", "BaseFiles"]

_LOG = logging.getLogger(__name__)
RECORD, _DIRECTIONS = "base.json", "directions.safetensors"
SHARD_BYTES = 1 << 28  # a file's codes are in memory until it is written

Make = Callable[[], dict[str, Tensor]]


class BaseFiles:
    """The files of one conversion, in one directory.

    Args:
        folder: created by the first write.
        key: digest of everything that determines the codes; recorded files with another key are deleted.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._shards: dict[str, Sequence[str]] = {}
        self._finished: dict[str, str] = {}

    def begin(self, sizes: Mapping[str, int], directions: int) -> bool:
        """Find out which files an earlier process finished, and refuse a disk that is too full for the others.

        Args:
            sizes: bytes of each layer's codes, in the order of conversion.
            directions: bytes of the gradient's directions, or 0 if there are none.

        Returns:
            Whether all codes are there already.

        Raises:
            OutOfMemoryError: states the bytes that are needed and those that are free.
        """
        shards = _in_shards(sizes)
        self._shards = {f"base-{i:04d}-of-{len(shards):04d}.safetensors": names for i, names in enumerate(shards, 1)}
        self._finished = self._recorded()
        left = [name for file, names in self._shards.items() if file not in self._finished for name in names]
        if left:
            need = sum(sizes[name] for name in left) + (0 if _DIRECTIONS in self._finished else directions)
            with disk_guard(self._folder, need):
                _LOG.info("the converted base takes %d bytes in %s, %d of them still to be written",
                          sum(sizes.values()) + directions, self._folder, need)  # fmt: skip
        return not left

    def directions(self, make: Make) -> dict[str, Tensor]:
        """The gradient's directions by layer, mapped from their file; `make` is called if it is not there."""
        return self._kept(_DIRECTIONS, make)

    def codes(self, quantize: Callable[[str], dict[str, Tensor]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each layer's name, and its codes and scales, mapped from their file on the CPU.

        Args:
            quantize: called with the name of each layer that is in no finished file.

        Raises:
            BadArtifactError: a finished file has changed since it was written.
            OutOfMemoryError: the disk is full.
        """
        for file, names in self._shards.items():
            made = self._kept(file, lambda names=names: _joined({name: quantize(name) for name in names}))  # type: ignore[misc]
            for name in names:
                stem = f"{name}."
                yield name, {key.removeprefix(stem): t for key, t in made.items() if key.rpartition(".")[0] == name}

    def _kept(self, file: str, make: Make) -> dict[str, Tensor]:
        path = self._folder / file
        if file not in self._finished:
            self._write(path, make())
        elif (now := sha256_file(path)) != self._finished[file]:
            raise BadArtifactError(
                f"{path} is damaged",
                why=f"its sha256 is {now}; when it was written, {self._finished[file]} was recorded",
                fix="delete it: --resume then converts its layers again",
            )
        return load_file(path)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write a file, then record it; an interruption in between leaves it unrecorded, and it is written again."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with disk_guard(path, sum(tensor.nbytes for tensor in tensors.values())):
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
            sync(path)
            self._finished[path.name] = sha256_file(path)
            record, scratch = self._folder / RECORD, self._folder / f"{RECORD}.writing"
            scratch.write_text(json.dumps({"key": self._key, "files": self._finished}, indent=1))
            sync(scratch)
            scratch.rename(record)
            sync(self._folder)

    def _recorded(self) -> dict[str, str]:
        """sha256 of each finished file of this run, by name; files of other runs are deleted."""
        record = self._folder / RECORD
        found = json.loads(record.read_text()) if record.is_file() else {"key": None, "files": {}}
        finished: dict[str, str] = found["files"] if found["key"] == self._key else {}
        if found["files"] and not finished:
            _LOG.info("the base in %s was converted with another configuration: it is converted again", self._folder)
        kept = {}
        for path in [*self._folder.glob("base*.safetensors"), *self._folder.glob(_DIRECTIONS)]:
            if path.name in finished and path.name in {*self._shards, _DIRECTIONS}:
                kept[path.name] = finished[path.name]
            else:
                path.unlink()
        return kept


def _in_shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Layers in consecutive shards of at most `SHARD_BYTES`, or of a single layer."""
    shards: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not shards or used + size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _joined(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, tensors in layers.items() for key, tensor in tensors.items()}
