"""What an export of a language model would write, from headers and the manifest: for dry runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from exporters.tensorrt.language.options import LanguageExportOptions, LanguageFormat
from exporters.tensorrt.language.source import LANGUAGE_KIND
from exporters.vllm.export import plan_export
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.plan import Action
from exporters.vllm.source import SourceKind
from fp8pipe.artifact import MANIFEST_NAME, open_artifact

__all__ = ["LANGUAGE_KIND", "LanguagePlan", "is_language_artifact", "plan_language"]


@dataclass(frozen=True, slots=True)
class LanguagePlan:
    """A dry run's answer.

    Attributes:
        layers: linears with FP8 codes.
        others: linears without.
        text: what scales would be measured on; none where nothing is named.
        need_bytes: of codes and float tensors, once; engines are not in it.
        engines: compute capabilities to compile for.
        elements: of all tensors.
    """

    layers: int
    others: int
    text: str | None
    need_bytes: int
    engines: tuple[str, ...]
    elements: int


def is_language_artifact(source: Path) -> bool:
    """Whether a directory is a language model's artifact; False for anything else.

    That of a baseline is one too: the export then says that its weights are no FP8 codes.
    """
    if not (source / MANIFEST_NAME).is_file():
        return False
    return open_artifact(source, verify=False).kind in (SourceKind.FALQON, SourceKind.LORA_MERGED)


def plan_language(source: Path, options: LanguageExportOptions) -> LanguagePlan:
    """Plan an export; headers and the manifest are read, no weights.

    Raises:
        ConfigurationError: a source that cannot be used.
        BadArtifactError: an unfinished or corrupt artifact.
    """
    plan = plan_export(source, VllmExportOptions())
    artifact = open_artifact(source, kind=LANGUAGE_KIND, verify=False)
    converted = [unit for unit in plan.units if unit.action is Action.CODES]
    graph = options.format is LanguageFormat.FP8
    text = options.calibration_data or artifact.manifest.config.get("data")
    return LanguagePlan(
        layers=len(converted),
        others=sum(not layer.converted for layer in plan.layers),
        text=None if text is None else str(text),
        need_bytes=sum(unit.entry.size_bytes for unit in plan.units),
        engines=options.compute_capabilities if graph and options.builder == "rtx" else (),
        elements=sum(math.prod(unit.entry.shape) for unit in plan.units),
    )
