"""How an engine's FP8 key/value cache enters a validation: its scales in the torch model, and an engine without it."""

from __future__ import annotations

import json
from pathlib import Path

from exporters.vllm.form import ServingForm, declared_cache
from exporters.vllm.plan import ExportPlan
from exporters.vllm.target import KvScale, VllmDetails
from exporters.vllm.writer import CONFIG_NAME
from fp8pipe.artifact import Artifact

__all__ = ["NO_SCALES", "cache_scales", "scales_of", "without_fp8_cache"]

NO_SCALES = (
    "that the FP8 key/value cache of this form costs little: the export has no scales for it, so that vLLM uses 1 "
    "(export with --kv-cache fp8)"
)


def scales_of(artifact: Artifact, plan: ExportPlan | None) -> dict[str, KvScale]:
    """The scales by attention layer: those that follow from the source, or, without it, the manifest's."""
    return dict(plan.kv_cache) if plan is not None else artifact.manifest.details_of(VllmDetails).kv_cache or {}


def cache_scales(form: ServingForm, scales: dict[str, KvScale]) -> dict[int, tuple[float, float]] | None:
    """Scales of keys and values by layer index; None if the form stores keys and values in its compute dtype."""
    return {scale.layer: (scale.k, scale.v) for scale in scales.values()} if form.rounds_cache else None


def without_fp8_cache(export: Path) -> list[str]:
    """vLLM's arguments that keep keys and values in the compute dtype, whatever the checkpoint declares.

    `--kv-cache-dtype auto` would follow the checkpoint, and vLLM has no name for a cache in fp32.
    """
    if not declared_cache(export):
        return []
    block = json.loads((export / CONFIG_NAME).read_bytes())["quantization_config"]
    block = {key: value for key, value in block.items() if key != "kv_cache_scheme"}
    return ["--hf-overrides", json.dumps({"quantization_config": block})]
