"""The target `vllm`: a compressed-tensors checkpoint for vLLM whose codes equal the artifact's bit for bit."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field

from exporters.target import PLAIN_MODEL, Engine, ExportTarget, Service
from exporters.tensorrt.language.target import CalibrationFacts
from exporters.vllm.options import VllmExportOptions
from fp8pipe.artifact.kinds import TUNED_KINDS, Details
from fp8pipe.artifact.manifest import Encoding
from fp8pipe.core.config import FrozenConfig

__all__ = ["KIND", "TARGET", "CalibrationFacts", "KvScale", "VllmDetails"]

KIND: Final = "vllm-export"


class KvScale(FrozenConfig):
    """Static scales of one layer's key/value cache, fp32; dequantized = code * scale."""

    layer: int = Field(ge=0, description="index of the layer in the cache")
    k: float = Field(gt=0, allow_inf_nan=False, description="scale of the keys")
    v: float = Field(gt=0, allow_inf_nan=False, description="scale of the values")


class VllmDetails(Details):
    """The manifest's details for an export to vLLM."""

    format: str = Field(description="fp8, fp8-block, w8a16, nvfp4, nvfp4-w4a4 or bf16")
    transposed: list[str] = Field(default_factory=list, description="quantized weights stored as (in, out)")
    ignore: list[str] = Field(default_factory=list, description="layers that the engine must not quantize")
    activations: Encoding | None = Field(
        default=None, description="how the engine quantizes inputs of layers; none if it does not"
    )
    trained_activations: Encoding | None = Field(
        default=None,
        description="how training quantized them; none if it did not, or if nothing was trained in FP8",
    )
    quantized_here: bool = Field(default=False, description="whether this export quantized the weights")
    payload_bytes: int = Field(ge=0, description="size of the tensor data in the weight files, bytes")
    stop_token_added: int | None = Field(
        default=None,
        description="end-of-turn token of the chat template that the export added to eos_token_id of "
        "generation_config.json",
    )
    kv_cache: dict[str, KvScale] | None = Field(
        default=None,
        description="scales of the FP8 key/value cache by attention layer, as the checkpoint names it; none where keys "
        "and values are stored in the compute dtype",
    )
    inputs: dict[str, float] | None = Field(
        default=None,
        description="largest magnitude of the inputs of each weight in calibration, by its name; none where no "
        "scales of inputs are stored",
    )
    calibration: CalibrationFacts | None = Field(
        default=None, description="the text that scales of inputs were calibrated on, if there are any"
    )


def _migrate(data: dict[str, Any]) -> dict[str, Any]:
    """Convert manifest data of an older version, which described activations as text.

    For example: `e4m3, dynamic, one scale a token (training: one a tensor)`.
    """
    details = dict(data["details"])
    said = str(details.pop("activations", ""))
    token = {"format": "e4m3", "bits": 8, "granularity": "per-token", "scale_rule": "amax", "dynamic": True}
    trained = {"one a tensor": token | {"granularity": "per-tensor"},
               "one power of two a token": token | {"scale_rule": "power-of-two"}}  # fmt: skip
    details["activations"] = token if said.startswith("e4m3") else None
    details["trained_activations"] = next((trained[key] for key in trained if f"training: {key})" in said), None)
    for layer in data["layers"]:
        if layer.get("weight") is not None and details["activations"] is not None:
            layer["activation"] = token
    return data | {"details": details}


TARGET: Final = ExportTarget(
    name="vllm", kind=KIND, takes=(*TUNED_KINDS, PLAIN_MODEL), options=VllmExportOptions, details=VllmDetails,
    help="a checkpoint for vLLM", export="exporters.vllm.export:export_vllm",
    plan="exporters.vllm.dry_run:plan_vllm",
    verify="exporters.vllm.verify:check_vllm", foresee="exporters.vllm.foresee:foresee",
    engines=(
        Engine(
            "vllm", "validation.vllm.validate:validate_export", "validation.vllm.validate:describe",
            ("against", "vllm_python", "form"),
        ),
    ),
    service=Service(
        "language", serve="serving.language.server:serve_language", plan="validation.plan:plan_vllm",
        bench="validation.bench.speed:bench_language", ask="validation.bench.check:ask_language",
        repository="exporters.triton.repository:write_language", device="exporters.devices:in_vllm",
    ),
    migrate=_migrate,
)  # fmt: skip
