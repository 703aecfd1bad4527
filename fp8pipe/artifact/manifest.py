"""The manifest of an artifact: what the artifact is, what it was made from, and how its weights are stored.

The manifest has a schema version and a kind, which determines the type of `details`. Unknown versions, kinds and fields
are rejected. The manifest states the direction of scales, the quantization of the weight and the input of each linear
layer, every fallback (as a warning), and the gates with their numbers.

Manifests of older schemas are migrated to the current one before they are validated. Schema 1 had no checksum file next
to the manifest. Schema 2 had an untyped dictionary (`extra`) for the fields that depend on the kind, gates without a
comparison, and the encoding of a layer as a sentence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, Field, PrivateAttr, SerializeAsAny, ValidationError

from fp8pipe.artifact.gate import Gate, read_gate
from fp8pipe.artifact.kinds import Details, kind_named
from fp8pipe.artifact.stored_format import StoredFormat
from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError

__all__ = [
    "CHECKSUM_SINCE", "ENCODINGS_SINCE", "MANIFEST_NAME", "SCHEMA_VERSION", "Encoding", "FileEntry", "Gate",
    "Granularity", "LayerRecord", "Manifest", "NumberFormat", "Parent", "ScaleRule", "canonical_digest",
]  # fmt: skip

D = TypeVar("D", bound=Details)

# Schema 2 added a checksum file next to the manifest. Schema 3 added typed details, encodings of layers, and
# comparisons of gates.
SCHEMA_VERSION = 3
CHECKSUM_SINCE = 2
ENCODINGS_SINCE = 3
MANIFEST_NAME = "manifest.json"
Granularity = Literal["per-tensor", "per-channel", "per-token", "per-block"]


class ScaleRule(StrEnum):
    """How a scale was chosen."""

    AMAX = "amax"
    """The largest magnitude is mapped to the largest code."""
    POWER_OF_TWO = "power-of-two"
    """Like `AMAX`, but rounded to a power of two."""
    PERCENTILE = "percentile"
    """The scale is a power of two with which a few of the calibration values are clipped."""
    MSE = "mse"
    """The scale has the smallest mean squared error: over the calibration values, of powers of two; or for a weight in
    NVFP4 over each block, of the E4M3 numbers near amax / 6."""
    CALIBRATED = "calibrated"
    """The scale has the smallest error on calibration data."""
    LEARNED = "learned"
    """The scale is first calibrated, and then trained together with the weights."""


class Encoding(FrozenConfig):
    """How a tensor is quantized; `dequantized = code * scale`."""

    format: Literal["e4m3", "e5m2", "int", "nvfp4"] = Field(description="the grid of its codes")
    bits: int | None = Field(
        default=None, ge=2, le=8, description="width of a code; none where an older manifest did not record it"
    )
    granularity: Granularity = Field(description="what shares one scale")
    scale_rule: ScaleRule | None = Field(
        default=None, description="where the scale comes from; none where it is not recorded"
    )
    dynamic: bool = Field(
        default=False, description="computed from each input while the model runs (true), or stored (false)"
    )

    def __str__(self) -> str:
        rule = f", {self.scale_rule}" if self.scale_rule else ""
        width = "" if self.bits is None else f"{self.bits}-bit "
        return f"{width}{self.format}, {self.granularity}{rule}{', dynamic' if self.dynamic else ''}"


class LayerRecord(FrozenConfig):
    """How the weight and the input of a linear layer are quantized."""

    name: str = Field(description="the layer's name in the checkpoint, without '.weight'")
    shape: tuple[int, int] | None = Field(default=None, description="(out, in); none where it has no matrix")
    weight: Encoding | None = Field(default=None, description="how its weight is stored; none where it stays float")
    activation: Encoding | None = Field(
        default=None, description="how its input is quantized; none where it stays float"
    )
    reason: str = Field(default="", description="why it stays float, or what else is special about it")

    @property
    def converted(self) -> bool:
        """Whether the weight is quantized."""
        return self.weight is not None


def _inside(path: str) -> str:
    """Validate that a path is relative and stays inside the artifact's directory."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise ValueError("must be a relative path inside the artifact")
    return path


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(FrozenConfig):
    """One file of the artifact."""

    path: Annotated[str, AfterValidator(_inside)] = Field(description="relative, '/' separated")
    size: int = Field(ge=0, description="bytes")
    sha256: Sha256 = Field(description="digest of the file's bytes, hexadecimal")
    volatile: bool = Field(
        default=False, description="true where the bytes hold times, or a compiler's free choices: a rerun may differ"
    )


class Parent(FrozenConfig):
    """An artifact or model that this artifact was made from."""

    kind: str = Field(description="the parent's kind, or 'model' for a checkpoint without a manifest")
    digest: str = Field(description="the parent's manifest digest; of a model, a digest of its files")
    path: str = Field(
        description="its path when it was read; a file found there later is identified by its digest alone"
    )
    content: Sha256 | None = Field(
        default=None, description="the parent's content digest, which a rerun keeps; a language model's is its digest"
    )

    stored: StoredFormat | None = Field(
        default=None, description="how it stored its weights; none for an artifact, and for weights in floating point"
    )

    @property
    def outdated(self) -> str:
        """Why the digest cannot be compared with digests that are computed today; empty if it can."""
        why = "written by an earlier fp8pipe, whose model digests did not cover tokenizer and chat template"
        return why if self.kind == "model" and self.content is None else ""


class NumberFormat(FrozenConfig):
    """How quantized tensors are to be dequantized."""

    name: str = Field(description="the grid, for instance 'e4m3'")
    granularity: Literal["per-tensor", "per-channel", "per-block"] = Field(
        description="one scale per tensor, per row, or per block; for nvfp4 per block of a row beside one per tensor "
        "(their product)"
    )
    scale_direction: Literal["dequantized = code * scale"] = Field(
        default="dequantized = code * scale", description="the only direction an artifact may hold"
    )


class Manifest(FrozenConfig):
    """An artifact's manifest: fields common to all kinds, and `details`, whose type depends on the kind."""

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1, description="version of this schema")
    kind: str = Field(description="what the artifact is; a registered kind")
    stage: str = Field(description="the command or stage that wrote it")
    created: str = Field(description="UTC time of writing, ISO 8601")
    tool_version: str = Field(description="fp8pipe's version")
    versions: dict[str, str] = Field(default_factory=dict, description="versions of libraries that matter")
    config: dict[str, Any] = Field(default_factory=dict, description="the resolved configuration")
    seed: int | None = Field(default=None, description="the seed, where there was one")
    parents: list[Parent] = Field(default_factory=list, description="what it was made from")
    files: list[FileEntry] = Field(default_factory=list, description="every file but the manifest")
    number_format: NumberFormat | None = Field(default=None, description="none for unquantized weights")
    preprocessing: dict[str, Any] | None = Field(default=None, description="input preparation, as data")
    runtime: dict[str, Any] = Field(default_factory=dict, description="the runtime it was checked against")
    layers: list[LayerRecord] = Field(default_factory=list, description="every layer that was considered")
    gates: list[Gate] = Field(default_factory=list, description="measured checks")
    warnings: list[str] = Field(default_factory=list, description="fallbacks and findings, in words")
    details: SerializeAsAny[Details] = Field(description="facts of the kind, in the kind's own model")

    # The data as read from the file. The digest is computed from it, and so does not change if a later schema adds or
    # renames fields.
    _stored: dict[str, Any] | None = PrivateAttr(default=None)

    def to_json(self) -> str:
        """The manifest as indented JSON text that ends with a newline; infinities and NaN are written as strings."""
        return json.dumps(self.plain(), indent=2, ensure_ascii=False) + "\n"

    def plain(self) -> dict[str, Any]:
        """The manifest as JSON-compatible data in the current schema, without fields that are None."""
        found: dict[str, Any] = json.loads(self.model_dump_json(exclude_none=True))
        return found

    def details_of(self, model: type[D]) -> D:
        """`details` as an instance of `model`.

        Raises:
            BadArtifactError: the details are of another type, because the artifact is of another kind.
        """
        if not isinstance(self.details, model):
            raise BadArtifactError(
                f"an artifact of kind {self.kind!r} has no {model.__name__}",
                why=f"its details are {type(self.details).__name__}", fix="give an artifact of the right kind",
            )  # fmt: skip
        return self.details

    @property
    def digest(self) -> str:
        """sha256 (hexadecimal) of the manifest as canonical JSON, see `canonical_digest`."""
        return canonical_digest(self._as_stored())

    @property
    def content(self) -> str:
        """Content digest: sha256 (hexadecimal) of the reproducible part, which is the same for a rerun on any machine.

        It covers kind, configuration, seed, the content digests of the parents, number format, preprocessing, layers,
        and the bytes of every file that is not volatile. Times, paths, versions and measurements are excluded.
        """
        stored = self._as_stored()
        kept: dict[str, Any] = {
            name: stored.get(name) for name in ("kind", "config", "seed", "number_format", "preprocessing", "layers")
        }
        kept["parents"] = [[parent.kind, parent.content or parent.digest] for parent in self.parents]
        kept["files"] = [[entry.path, entry.sha256] for entry in self.files if not entry.volatile]
        return canonical_digest(kept)

    @property
    def stored_version(self) -> int:
        """The schema version in the file, whereas `schema_version` is the current one after a migration."""
        return int(self._as_stored().get("schema_version", 1))

    def _as_stored(self) -> dict[str, Any]:
        return self.plain() if self._stored is None else self._stored

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str) -> Manifest:
        """Parse a manifest of the current schema or an older one.

        Args:
            text: the JSON text.
            where: the manifest's path, for error messages.

        Raises:
            BadArtifactError: it is not JSON, has a newer schema or an unknown kind, or fields are invalid.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise _bad(where, f"it is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise _bad(where, f"its top level is a {type(data).__name__}, not an object")
        version = data.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BadArtifactError(
                f"{where} was written by a newer fp8pipe",
                why=f"its schema version is {version}; this fp8pipe reads up to {SCHEMA_VERSION}",
                fix="upgrade fp8pipe, or write the artifact again with this version",
            )
        try:
            manifest = cls.model_validate(_typed(data, where))
        except ValidationError as error:
            items = error.errors(include_url=False)
            findings = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in items]
            raise _bad(where, "; ".join(findings)) from error
        manifest._stored = data
        return manifest


def _typed(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Migrate a manifest to the current schema if it is older, and validate `details` with the type of its kind."""
    name = data.get("kind")
    if not isinstance(name, str):
        return data  # validation refuses it
    kind = kind_named(name, where)
    if isinstance(version := data.get("schema_version", 1), int) and version < SCHEMA_VERSION:
        try:
            data = kind.migrate(_migrated(data)) | {"schema_version": SCHEMA_VERSION}
        except (KeyError, TypeError, AttributeError) as error:
            raise _bad(where, f"its schema is {version}, and it lacks {error}") from error
        kind = kind_named(data["kind"], where)
    return {**data, "details": kind.details.model_validate(data.get("details", {}))}


def canonical_digest(value: Any) -> str:
    """sha256 (hexadecimal) of data as canonical JSON: UTF-8, sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _bad(where: str, why: str) -> BadArtifactError:
    return BadArtifactError(f"{where} is not a valid manifest", why=why, fix="write the artifact again")


_SENTENCE: Final = re.compile(r"(\d+)-bit (int|e4m3|nvfp4)")
_BITS: Final = {"e4m3": 8, "nvfp4": 4}


def _migrated(data: Mapping[str, Any]) -> dict[str, Any]:
    """Migrate the fields that are common to all kinds from schema 1 or 2; `details` remains an untyped dictionary."""
    number_format = data.get("number_format")
    return {
        **{key: value for key, value in data.items() if key != "extra"},
        "layers": [_layer(layer, number_format) for layer in data.get("layers", [])],
        "gates": [read_gate(gate) for gate in data.get("gates", [])],
        "details": dict(data.get("extra", {})),
    }


def _layer(layer: Mapping[str, Any], number_format: Mapping[str, Any] | None) -> dict[str, Any]:
    kept = {key: layer[key] for key in ("name", "shape") if key in layer}
    reason = str(layer.get("reason", ""))
    if not layer.get("converted") or number_format is None:  # stored in floating point (merged into bf16)
        return {**kept, "reason": reason}
    found = _SENTENCE.match(reason)
    name = found[2] if found else str(number_format["name"])
    name = name if name in ("int", *_BITS) else "int"  # manifests of ViTs had a precision here, like w4a8
    bits = int(found[1]) if found else _BITS.get(name)
    weight = {"format": name, "bits": bits, "granularity": number_format["granularity"]}
    return {**kept, "weight": weight, "reason": "" if found else reason}
