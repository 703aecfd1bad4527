"""Artifacts: directories of weights with a manifest that names, hashes and explains every file in them.

A stage reads artifacts and writes exactly one. It writes into `NAME.partial/`; the manifest comes last, the
result is reopened and re-hashed, and only then renamed to `NAME/`. So a directory with its final name is
whole.
"""

from fp8pipe.artifact.checksum import check_seal, read_sealed, remove_sealed, seal_path, write_sealed
from fp8pipe.artifact.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileEntry,
    Gate,
    LayerRecord,
    Manifest,
    NumberFormat,
    Parent,
)
from fp8pipe.artifact.place import CHECKPOINT_PREFIX, check_place
from fp8pipe.artifact.reader import SEAL_NAME, Artifact, check_file, open_artifact, read_manifest, sha256_file
from fp8pipe.artifact.writer import ArtifactWriter, installed_versions
from fp8pipe.core.disk import disk_guard, translate_disk_full

__all__ = [
    "CHECKPOINT_PREFIX",
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "SEAL_NAME",
    "Artifact",
    "ArtifactWriter",
    "FileEntry",
    "Gate",
    "LayerRecord",
    "Manifest",
    "NumberFormat",
    "Parent",
    "check_file",
    "check_place",
    "check_seal",
    "disk_guard",
    "installed_versions",
    "open_artifact",
    "read_manifest",
    "read_sealed",
    "remove_sealed",
    "seal_path",
    "sha256_file",
    "translate_disk_full",
    "write_sealed",
]
