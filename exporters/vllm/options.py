"""The options of a vLLM export, and how config.json declares them to the engine: the `quantization_config` block.

The block here is that of compressed-tensors; ModelOpt's is in `modelopt`. Released versions of vLLM reject unknown
keys, and the format of the block gains keys without having a version number. So the block is written here key by key,
with only those that the declared vLLM version needs, and vLLM versions that are not in the table are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from fp8pipe.artifact.manifest import Encoding, Granularity, ScaleRule
from fp8pipe.core.config import CONFIG_ONLY, Flag, FrozenConfig, Size
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.numerics.kinds import FP8_BLOCK, NVFP4_BLOCK


class ExportFormat(StrEnum):
    """How the linear layers of the export are stored and run.

    `fp8`: E4M3 weights, one scale per row, activations quantized per token at run time (W8A8).
    `fp8-block`: E4M3 weights, one scale per block of 128 x 128, activations quantized at run time with one scale per
        128 features of a token (the preset FP8_BLOCK of llm-compressor).
    `w8a16`: the weights of `fp8`; activations stay in the model's dtype.
    `bf16`: no quantization; FP8 weights are dequantized and rounded once to bf16.
    `nvfp4`: E2M1 weights with an E4M3 scale for every 16 inputs of a row (NVFP4), rounded by the export; activations
        stay in the model's dtype.
    `nvfp4-w4a4`: the weights of `nvfp4`; activations quantized to NVFP4 at run time, with a global scale for each
        layer that follows from calibration on text.
    """

    FP8 = "fp8"
    FP8_BLOCK = "fp8-block"
    W8A16 = "w8a16"
    BF16 = "bf16"
    NVFP4 = "nvfp4"
    NVFP4_W4A4 = "nvfp4-w4a4"

    @property
    def quantized(self) -> bool:
        """Whether linear weights are stored as codes, of FP8 or NVFP4."""
        return self is not ExportFormat.BF16

    @property
    def packed(self) -> bool:
        """Whether linear weights are stored in NVFP4."""
        return self in (ExportFormat.NVFP4, ExportFormat.NVFP4_W4A4)

    @property
    def calibrated(self) -> bool:
        """Whether each quantized layer has a global scale of its inputs, which follows from text."""
        return self is ExportFormat.NVFP4_W4A4

    @property
    def codes(self) -> Literal["e4m3", "nvfp4"]:
        """The number format of quantized weights, as manifests name it."""
        return "nvfp4" if self.packed else "e4m3"

    @property
    def block(self) -> tuple[int, int] | None:
        """(rows, columns) of the blocks of E4M3 codes that share a scale; None without blocks."""
        return FP8_BLOCK if self is ExportFormat.FP8_BLOCK else None

    @property
    def weight_granularity(self) -> Literal["per-channel", "per-block"]:
        """What shares one scale of a quantized weight."""
        return "per-channel" if self.block is None and not self.packed else "per-block"

    @property
    def activations(self) -> Encoding | None:
        """What vLLM does with the inputs of quantized layers; None if they stay in the model's dtype."""
        granularity: dict[ExportFormat, Granularity] = {
            ExportFormat.FP8: "per-token", ExportFormat.FP8_BLOCK: "per-block", ExportFormat.NVFP4_W4A4: "per-block",
        }  # fmt: skip
        if self not in granularity:
            return None
        bits, rule = 4 if self.packed else 8, ScaleRule.AMAX
        return Encoding(format=self.codes, bits=bits, granularity=granularity[self], scale_rule=rule, dynamic=True)


# compressed-tensors' names for formats, where they differ from that of FP8.
_FORMATS: Final = {
    ExportFormat.W8A16: "naive-quantized",
    **dict.fromkeys((form for form in ExportFormat if form.packed), "nvfp4-pack-quantized"),
}
_RECORDS: Final = 128
# An FP8 key/value cache as compressed-tensors declares it: one static scale per layer for keys, and one for values.
KV_CACHE_SCHEME: Final[dict[str, Any]] = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False,
}  # fmt: skip


class VllmExportOptions(FrozenConfig):
    """Options of one export, recorded completely in its manifest."""

    format: ExportFormat = Field(
        default=ExportFormat.FP8,
        description="fp8 (W8A8, per-row scales), fp8-block (W8A8, a scale per block of 128 x 128), w8a16 (weight-only "
        "FP8, per-row scales), bf16 (dequantized), nvfp4 (weight-only FP4, a scale per 16 inputs, rounded here) or "
        "nvfp4-w4a4 (inputs in FP4, too)",
    )
    calibration_data: Annotated[str | None, Flag(default="the training data")] = Field(
        default=None, description="Text to calibrate on"
    )
    calibration_records: int = Field(default=_RECORDS, ge=1, description="Records to calibrate on")
    layout: Literal["compressed-tensors", "modelopt"] = Field(
        default="compressed-tensors",
        description="How NVFP4 is stored; modelopt: NVIDIA ModelOpt's layout, for TensorRT-LLM and vLLM",
    )
    kv_cache: Annotated[Literal["fp8"] | None, Flag(default="the compute dtype")] = Field(
        default=None, description="How engines store keys and values; fp8: E4M3 with calibrated scales"
    )
    max_shard_bytes: Annotated[Size, Flag("max-shard-size")] = Field(
        default=5_000_000_000,
        description="Largest amount of tensor data in one file, for instance 5GB; a larger tensor gets its own file",
    )
    vllm_version: str = Field(
        default="0.32.0", description="vLLM version whose checkpoint schema is written (one of the declared versions)"
    )
    force: Annotated[bool, CONFIG_ONLY] = Field(default=False, description="Replace an existing output directory")

    @model_validator(mode="after")
    def _declared(self) -> Self:
        if self.kv_cache is not None and not self.format.quantized:
            raise ValueError("kv_cache is declared beside quantized weights: choose another format than bf16")
        if self.layout == "modelopt" and not self.format.packed:
            raise ValueError(
                f"layout modelopt: the format {self.format} is stored as compressed-tensors defines it; choose nvfp4 "
                "or nvfp4-w4a4, or for FP8 --target trt --format modelopt-checkpoint"
            )
        if not self.format.calibrated and (self.calibration_data is not None or self.calibration_records != _RECORDS):
            raise ValueError(f"calibration: the format {self.format} has no scales that follow from text")
        return self


@dataclass(frozen=True, slots=True)
class CheckpointSchema:
    """The checkpoint format that one vLLM version reads.

    Attributes:
        compressed_tensors: the compressed-tensors version that it pins.
        tested: whether checkpoints of this format were loaded in exactly that version.
        conv1d_model_types: model types whose loader transposes Conv1D weights itself but leaves `weight_scale` as it
            is, so that FP8 codes stored as `(in, out)` with scales `(out, 1)` load correctly.
        stacked_model_types: model types whose loader takes experts one by one with their weights stored as `(in, out)`,
            and transposes weights and scales alike, so that scales are stored as `(1, out)`.
        single_expert_model_types: model types whose router weighs the inputs of experts, which the engine computes for
            one expert per token only.
        refused_models: classes that the engine does not run: Mllama, whose layers attend to images from within.
        dropped_models: classes that the engine once implemented; it may run transformers' code in their place.
        fused_groups: names of sibling modules that the engine concatenates into one layer, so that all of them must be
            quantized in the same way.
    """

    vllm_version: str
    compressed_tensors: str
    tested: bool
    conv1d_model_types: frozenset[str] = frozenset({"gpt2"})
    stacked_model_types: frozenset[str] = frozenset({"gpt_oss"})
    single_expert_model_types: frozenset[str] = frozenset({"llama4", "llama4_text"})
    refused_models: frozenset[str] = frozenset({"MllamaForConditionalGeneration", "MllamaForCausalLM"})
    dropped_models: frozenset[str] = frozenset({
        "AyaVisionForConditionalGeneration", "BambaForCausalLM", "ChameleonForConditionalGeneration",
        "Dots1ForCausalLM", "FuyuForCausalLM", "MiniMaxForCausalLM", "MptForCausalLM", "PersimmonForCausalLM",
        "Phi4MultimodalForCausalLM",
    })  # fmt: skip
    fused_groups: tuple[frozenset[str], ...] = (
        frozenset({"q_proj", "k_proj", "v_proj"}),
        frozenset({"gate_proj", "up_proj"}),
        frozenset({"query", "key", "value"}),
        frozenset({"wq", "wk", "wv"}),
        frozenset({"w1", "w3"}),
        frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
    )


# By declared vLLM version, oldest first. No checkpoint of this project has been loaded in the last one yet.
SCHEMAS = {
    "0.32.0": CheckpointSchema("0.32.0", compressed_tensors="0.17.0", tested=True),
    "0.33.0": CheckpointSchema("0.33.0", compressed_tensors="0.17.0", tested=False),
}


def schema_for(vllm_version: str) -> CheckpointSchema:
    """The schema of a declared version.

    Raises:
        ConfigurationError: the version is not in the table; the message lists the known ones.
    """
    if vllm_version not in SCHEMAS:
        raise ConfigurationError(
            f"vLLM {vllm_version} is not a version this exporter writes for",
            why=f"declared versions: {', '.join(SCHEMAS)}",
            fix="choose one of them with --vllm-version",
        )
    return SCHEMAS[vllm_version]


def quantization_config(
    export_format: ExportFormat, ignore: Sequence[str], schema: CheckpointSchema, kv_cache: str | None = None
) -> dict[str, object] | None:
    """The `quantization_config` block for config.json, without null and default values; None for bf16 exports.

    compressed-tensors itself calls a weight-only FP8 checkpoint `naive-quantized`; vLLM takes the same code path for
    both formats and selects W8A16 because no input activations are declared. `ignore` holds full names of linear
    layers that stay unquantized. With an FP8 `kv_cache`, vLLM stores keys and values in FP8 unless told otherwise.
    """
    if not export_format.quantized:
        return None
    number = {"num_bits": 4 if export_format.packed else 8, "type": "float", "symmetric": True}
    block = export_format.block
    shared: dict[str, object] = {"strategy": "channel"}
    if block is not None:
        shared = {"strategy": "block", "block_structure": list(block)}
    elif export_format.packed:
        shared = {"strategy": "tensor_group", "group_size": NVFP4_BLOCK}
    group: dict[str, object] = {"targets": ["Linear"], "weights": {**number, **shared, "dynamic": False}}
    if export_format.activations is not None:
        inputs: dict[str, object] = {"strategy": "token", "dynamic": True}
        if block is not None:
            inputs |= {"strategy": "group", "group_size": block[1]}
        elif export_format.packed:  # scales of blocks are computed at run time, the global scale is stored
            inputs |= {**shared, "dynamic": "local"}
        group["input_activations"] = {**number, **inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMATS.get(export_format, "float-quantized"),
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        **({} if kv_cache is None else {"kv_cache_scheme": dict(KV_CACHE_SCHEME)}),
    }
