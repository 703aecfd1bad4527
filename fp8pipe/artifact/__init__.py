"""Artifacts: directories of weights with a manifest that describes them and lists every file with its digest.

A stage reads artifacts and writes exactly one. It writes the files, and then the manifest, into `NAME.partial/`. The
result is reopened and hashed again, and only then renamed to `NAME/`. A directory with its final name is therefore
always complete.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8pipe.artifact.gate import Comparison, Gate, Verdict, at_most, none_of
    from fp8pipe.artifact.manifest import (
        MANIFEST_NAME,
        SCHEMA_VERSION,
        Encoding,
        FileEntry,
        LayerRecord,
        Manifest,
        NumberFormat,
        Parent,
        ScaleRule,
    )
    from fp8pipe.artifact.reader import (
        CHECKSUM_NAME,
        Artifact,
        check_file,
        open_artifact,
        read_manifest,
        sha256_file,
        staged,
    )
    from fp8pipe.artifact.record import check_checksum, checksum_path, read_checked, remove_checked, write_checked
    from fp8pipe.artifact.writer import CHECKPOINT_PREFIX, ArtifactWriter, check_place, installed_versions
    from fp8pipe.core.machine import disk_guard, translate_disk_full

__all__ = [
    "CHECKPOINT_PREFIX", "CHECKSUM_NAME", "MANIFEST_NAME", "SCHEMA_VERSION", "Artifact", "ArtifactWriter",
    "Comparison", "Encoding", "FileEntry", "Gate", "LayerRecord", "Manifest", "NumberFormat", "Parent", "ScaleRule",
    "Verdict", "at_most", "check_checksum", "check_file", "check_place", "checksum_path", "disk_guard",
    "installed_versions", "none_of", "open_artifact", "read_checked", "read_manifest", "remove_checked",
    "sha256_file", "staged", "translate_disk_full", "write_checked",
]  # fmt: skip

# The modules that define the names of `__all__`. Each imports only modules before it in this list, so that looking up a
# name imports nothing beyond the module that defines it, which keeps `--help` fast.
_HOMES = ("artifact.record", "artifact.gate", "artifact.manifest", "artifact.reader", "artifact.writer", "core.machine")


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` from the module that defines it, when it is first used."""
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"fp8pipe.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
