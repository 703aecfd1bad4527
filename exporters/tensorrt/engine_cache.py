"""Provides an engine that fits this machine: the export's own, or one rebuilt from its graph.

An engine is a cache, so a stale, damaged or missing one does not make the export invalid: it is rebuilt from
`model.onnx`, with a notice. The new engine is stored in the cache (`$FP8PIPE_CACHE/engines`, named after its recipe's
digest), never in the export, whose files must match its manifest, so the result of `fp8pipe verify` does not change.
Everything else in the export must be intact: an export whose graph differs from its manifest is refused.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from pydantic import Field

from exporters.graph.formats import MODEL_FILE
from exporters.tensorrt.builder import SETTINGS, Shapes, build_enterprise, build_rtx, check_enterprise, shapes
from exporters.tensorrt.engines import ENGINES
from exporters.tensorrt.listing import PrecisionReport, read_precision
from exporters.tensorrt.program import read_program
from exporters.tensorrt.recipe import PACKED_SUFFIX, EngineRecipe, cache_folder, installed_builder, unpack_engine
from exporters.tensorrt.target import KIND, BuiltEngine, EnterpriseSettings, TrtDetails, TrtFormat
from fp8pipe.artifact import Artifact, check_file, open_artifact, sha256_file, translate_disk_full
from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError, MissingCapabilityError

logger = logging.getLogger(__name__)

_PRODUCTS: Final = ("MatMul", "Conv", "Gemm")


class EngineSource(StrEnum):
    """Where an engine came from."""

    EXPORT = "export"
    CACHE = "cache"
    BUILT = "built"


@dataclass(frozen=True, slots=True)
class ReadyEngine:
    """An engine that can be loaded on this machine."""

    path: Path  # the uncompressed file
    recipe: EngineRecipe  # what it was built from
    source: EngineSource  # the export, the cache, or a new build
    precisions: Mapping[str, int]  # number of matrix multiplications by precision, as listed
    reasons: tuple[str, ...]  # why the export's own engine was not used; empty if it was


class _Kept(FrozenConfig):
    """The record beside an engine in the cache, stored as JSON."""

    recipe: EngineRecipe = Field(description="what the engine was built from")
    sha256: str = Field(description="digest of the engine's file")
    precisions: dict[str, int] = Field(description="number of matrix multiplications by precision")


def ready_engine(export: Path, capability: str, *, on_build: Callable[[str], None] | None = None) -> ReadyEngine:
    """The engine of an export for one GPU, rebuilt from the export's graph if the stored engine cannot be used.

    `capability` is the GPU's compute capability, for example "8.9"; the export may lack an engine for it. `on_build` is
    called with a notice before an engine is built; without it the notice is logged.

    Raises:
        BadArtifactError: anything other than an engine is missing or damaged.
        ConfigurationError: the builder does not know the capability, or the cache cannot be written to.
        MissingCapabilityError: an engine must be built, and no builder is installed.
        GateFailedError: the builder refuses the graph, or uses another precision than the export requires.
        OutOfMemoryError: the disk is full.
    """
    artifact = open_artifact(export, kind=KIND, caches=ENGINES)
    wanted = _wanted(artifact, capability)
    entry = artifact.manifest.details_of(TrtDetails).engines.get(capability)
    reasons = _stale(artifact, entry, wanted, capability)
    if entry is not None and not reasons and not entry.engine.endswith(PACKED_SUFFIX):
        return ReadyEngine(artifact.root / entry.engine, wanted, EngineSource.EXPORT, entry.precisions, ())
    if entry is not None and not reasons:  # unpacked into the cache, under a name with the packed file's digest
        packed = next(file.sha256 for file in artifact.manifest.files if file.path == entry.engine)

        def unpack(path: Path) -> Mapping[str, int]:
            unpack_engine(artifact.root / entry.engine, path)
            return entry.precisions

        if _from_cache(wanted, packed) is None:
            _keep(wanted, unpack, packed)
        return ReadyEngine(_place(wanted, packed), wanted, EngineSource.EXPORT, entry.precisions, ())
    kept = _from_cache(wanted)
    if kept is not None:
        return ReadyEngine(_place(wanted), wanted, EngineSource.CACHE, kept.precisions, reasons)
    notice = f"rebuilding the engine of {artifact.root} for compute capability {capability}: {'; '.join(reasons)}"
    if on_build is not None:
        on_build(notice)
    else:
        logger.warning("%s", notice)
    precisions = _keep(wanted, lambda path: _build(artifact, wanted, path))
    return ReadyEngine(_place(wanted), wanted, EngineSource.BUILT, precisions, reasons)


def engine_precisions(export: Artifact, engine: ReadyEngine) -> PrecisionReport | None:
    """The precision in which an engine runs the export's matrix multiplications, read from the engine file itself.

    None for engines of TensorRT, whose file format is not documented: only its inspector on a GPU can read them.

    Raises:
        BadArtifactError: the engine holds no readable program.
    """
    if engine.recipe.builder == "enterprise":
        return None
    return read_precision(_products(export), read_program(engine.path))


def _products(artifact: Artifact) -> list[str]:
    """Nodes of the graph that are matrix multiplications or convolutions."""
    import onnx_ir as ir

    return [str(node.name) for node in ir.load(artifact.root / MODEL_FILE).graph if node.op_type in _PRODUCTS]


def profiles_of(artifact: Artifact) -> dict[str, Shapes]:
    """Shapes of an export's inputs that its engines are built for."""
    details = artifact.manifest.details_of(TrtDetails)
    for entry in details.engines.values():
        if entry.recipe is not None:
            return dict(entry.recipe.profiles)
    sides = [int(side) for side in details.input.shape[1:]]
    return {details.input.name: shapes((int(count), *sides) for count in artifact.manifest.config["batch"])}


def _wanted(artifact: Artifact, capability: str) -> EngineRecipe:
    """The recipe by which an engine for this compute capability would be built on this machine."""
    config = artifact.manifest.config
    entry = artifact.manifest.details_of(TrtDetails).engines.get(capability)
    stored = None if entry is None else entry.recipe
    builder: Literal["rtx", "enterprise"] = "enterprise" if config["builder"] == "enterprise" else "rtx"
    # If no builder is installed, the stored engine's version cannot be checked, so that version is assumed.
    version = installed_builder(builder) or (stored.version if stored else "none installed")
    return EngineRecipe(
        builder=builder, version=version, capability=capability,
        graph_sha256=sha256_file(artifact.root / MODEL_FILE), profiles=profiles_of(artifact),
        settings=dict(config["enterprise"] if builder == "enterprise" else SETTINGS),
    )  # fmt: skip


def _stale(artifact: Artifact, entry: BuiltEngine | None, wanted: EngineRecipe, capability: str) -> tuple[str, ...]:
    """Why the export's own engine cannot be used; empty if it can."""
    if entry is None:
        return (f"the export has no engine for compute capability {capability}",)
    stored = entry.recipe
    if stored is None:
        return ("the export was written by an older version that did not record what its engines were built from",)
    differences = stored.differences(wanted)
    listed = next((file for file in artifact.manifest.files if file.path == entry.engine), None)
    damage = "the manifest does not list it" if listed is None else check_file(artifact.root, listed)
    return (*differences, damage) if damage else differences


def _place(recipe: EngineRecipe, packed: str = "") -> Path:
    """The path of an engine in the cache; `packed` is the digest of the file it is unpacked from, if any."""
    return cache_folder() / f"{recipe.digest[:32]}{'-' if packed else ''}{packed[:32]}.engine"


def _from_cache(recipe: EngineRecipe, packed: str = "") -> _Kept | None:
    """The cache record of an engine of this recipe whose file is undamaged; None if there is none."""
    path = _place(recipe, packed)
    try:
        kept = _Kept.model_validate_json(path.with_suffix(".json").read_bytes())
        whole = kept.recipe == recipe and sha256_file(path) == kept.sha256
    except (OSError, ValueError):
        return None
    return kept if whole else None


def _keep(recipe: EngineRecipe, make: Callable[[Path], Mapping[str, int]], packed: str = "") -> dict[str, int]:
    """Put the engine that `make` writes into the cache: first its file, atomically, then the record that validates it.

    Returns:
        The number of matrix multiplications by precision, from `make`.
    """
    place = _place(recipe, packed)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with translate_disk_full(place.parent), tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            engine, record = Path(scratch) / "engine", Path(scratch) / "record"
            precisions = dict(make(engine))
            kept = _Kept(recipe=recipe, sha256=sha256_file(engine), precisions=precisions)
            record.write_text(kept.model_dump_json(indent=1) + "\n", encoding="utf-8")
            os.replace(engine, place)
            os.replace(record, place.with_suffix(".json"))
    except PermissionError as error:
        raise ConfigurationError(
            f"engines cannot be cached in {place.parent}",
            why=str(error),
            fix="set FP8PIPE_CACHE to a writable directory",
        ) from error
    return precisions


def _build(artifact: Artifact, recipe: EngineRecipe, path: Path) -> dict[str, int]:
    """Build an engine; returns its number of matrix multiplications by precision."""
    graph = artifact.root / MODEL_FILE
    if recipe.builder == "enterprise":
        machine = check_enterprise()
        if machine.capability != recipe.capability:
            raise MissingCapabilityError(
                f"no engine for compute capability {recipe.capability} can be built here",
                why=f"TensorRT builds for the GPU it runs on, whose compute capability is {machine.capability}",
                fix="build on the machine where the engine will run",
            )
        settings = EnterpriseSettings.model_validate(recipe.settings)
        built = build_enterprise(graph, path, machine, recipe.profiles, settings)
    else:
        built = build_rtx(graph, path, [recipe.capability], recipe.profiles)
    if built.version != recipe.version:
        raise BadArtifactError(
            f"the builder reports version {built.version}",
            why=f"the installed package has version {recipe.version}",
            fix="reinstall the package",
        )
    # The rebuilt engine must meet the same requirement on precision as the engines of the export.
    report = read_precision(_products(artifact), built.layers)
    details = artifact.manifest.details_of(TrtDetails)
    format = TrtFormat(details.format)
    required = artifact.manifest.config["require"] and not format.weight_only
    other = report.not_in(details.products) if required else ()
    if other:
        counts = json.dumps(report.counts())
        raise GateFailedError(
            f"the engine for {recipe.capability} does not multiply in {format}",
            why=f"{len(other)} matrix multiplication(s) in another precision ({counts}), the first: {other[0]}",
            fix="use the version of TensorRT that the export was made with",
        )
    return report.counts()
