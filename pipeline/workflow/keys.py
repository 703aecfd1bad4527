"""Cache keys of stages: digests of everything that determines a stage's output, so that it is not computed twice.

The key covers the command, its settings as given in the recipe, the contents of the outputs of other stages that it
reads, the bytes of its inputs from outside the run, and the versions of fp8pipe, of the packages that affect results,
and of the stage's engine. A file's hash is cached, and reused while its size and modification time do not change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fp8pipe.artifact import MANIFEST_NAME, Manifest, sha256_file
from fp8pipe.artifact.manifest import canonical_digest
from fp8pipe.core.version import __version__
from pipeline.workflow.recipe import StageSpec, replace_references

__all__ = ["VERSIONS", "SourceDigests", "file_states", "stage_key"]

# Packages that affect the output of stages.
VERSIONS: Final = (
    "torch", "transformers", "tokenizers", "safetensors", "timm", "numpy", "onnx", "onnx-ir", "onnxscript",
    "onnxruntime", "tensorrt-rtx", "tensorrt",
)  # fmt: skip

_PREFIXES: Final = ("images:", "artifact:")
# Folders of a model directory that are not part of the model.
_SKIPPED: Final = (".git", ".cache", "__pycache__")


def stage_key(
    spec: StageSpec, contents: Mapping[str, str], sources: Mapping[str, str], versions: Mapping[str, str]
) -> str:
    """The key of a stage.

    Args:
        spec: the stage. References to other stages are left out of its settings, so the key does not depend on the
            names of these stages, but only on their contents.
        contents: content digests of the outputs of the stages it reads, by the setting that references them.
        sources: digests of its inputs from outside the run, by setting.
        versions: versions of the packages and engines that it uses, by name.
    """
    settings = replace_references(spec.settings, lambda prefix, stage: None)
    fields = {"command": spec.command, "settings": settings, "reads": dict(contents), "sources": dict(sources)}
    return canonical_digest({**fields, "version": __version__, "versions": dict(versions)})


def file_states(path: Path) -> dict[str, tuple[int, int]]:
    """Size (bytes) and modification time (ns) of every file below a directory, by relative path.

    If `path` is a file, the result has the single key `.`.
    """
    if path.is_file():
        state = path.stat()
        return {".": (state.st_size, state.st_mtime_ns)}
    found = {}
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if name not in _SKIPPED)
        for name in sorted(names):
            file = Path(folder) / name
            found[file.relative_to(path).as_posix()] = (file.stat().st_size, file.stat().st_mtime_ns)
    return found


class SourceDigests:
    """Digests of a user's inputs.

    Args:
        memory: the JSON file in which hashes are cached; if it cannot be read, everything is hashed again.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            self._known: dict[str, list[Any]] = dict(json.loads(memory.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def digest(self, source: str) -> str:
        """The digest of an input.

        Args:
            source: a setting's value: a path, optionally with the prefix `images:` or `artifact:`, or a name.

        Returns:
            The content digest of an artifact, or a digest of the bytes of another file or directory, after the prefix;
            or `source` itself if there is no such path.
        """
        for prefix in _PREFIXES:
            if source.startswith(prefix):
                return prefix + self.digest(source.removeprefix(prefix))
        path = Path(source).expanduser()
        if (path / MANIFEST_NAME).is_file():
            manifest = path / MANIFEST_NAME
            return Manifest.from_json(manifest.read_bytes(), where=str(manifest)).content
        if path.is_file() or path.is_dir():
            return self._bytes_of(path)
        return source

    def save(self) -> None:
        """Save the cached hashes for the next run."""
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        partial = self._memory.with_suffix(".partial")
        partial.write_text(json.dumps(self._known), encoding="utf-8")
        os.replace(partial, self._memory)

    def _bytes_of(self, path: Path) -> str:
        states = canonical_digest(file_states(path))
        known = self._known.get(str(path.absolute()))
        if known is None or known[0] != states:
            files = [path] if path.is_file() else [path / name for name in file_states(path)]
            named = [[file.relative_to(path).as_posix(), sha256_file(file)] for file in files]
            known = self._known[str(path.absolute())] = [states, canonical_digest(named)]
        return str(known[1])
