"""The `quantization_config` block of config.json: minimal keys, for a declared vLLM version.

Released engines refuse keys they do not know, and formats grow keys without a version number. So the block is
written here, by hand, with the fewest keys that the declared version needs, and a version that is not in the
table is refused rather than guessed.

Format strings: `float-quantized` for W8A8. A weight-only FP8 checkpoint is what compressed-tensors itself
calls `naive-quantized`; vLLM takes the same branch for both and picks W8A16 because no input activations are
declared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from exporters.vllm.options import ExportFormat
from fp8pipe.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class CheckpointSchema:
    """What one vLLM version reads.

    Attributes:
        vllm_version: the version declared.
        compressed_tensors: the compressed-tensors version it pins.
        tested: whether checkpoints of this schema were loaded in that very version.
        conv1d_model_types: model types whose loader transposes Conv1D weights itself while it passes
            `weight_scale` through, so that FP8 codes stored as `(in, out)` with scales `(out, 1)` load right.
        fused_groups: leaf names that the engine concatenates into one layer; all parts need one scheme.
    """

    vllm_version: str
    compressed_tensors: str
    tested: bool
    conv1d_model_types: frozenset[str] = frozenset({"gpt2"})
    fused_groups: tuple[frozenset[str], ...] = field(
        default=(
            frozenset({"q_proj", "k_proj", "v_proj"}),
            frozenset({"gate_proj", "up_proj"}),
            frozenset({"query", "key", "value"}),
            frozenset({"wq", "wk", "wv"}),
            frozenset({"w1", "w3"}),
            frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
        )
    )


# By declared vLLM version, oldest first.
SCHEMAS = {
    schema.vllm_version: schema
    for schema in (
        CheckpointSchema("0.32.0", compressed_tensors="0.17.0", tested=True),
        # Same pinned compressed-tensors; no checkpoint of ours was loaded in it yet.
        CheckpointSchema("0.33.0", compressed_tensors="0.17.0", tested=False),
    )
}


def schema_for(vllm_version: str) -> CheckpointSchema:
    """The schema of a declared version.

    Raises:
        ConfigurationError: the version is not in the table; the message lists those that are.
    """
    try:
        return SCHEMAS[vllm_version]
    except KeyError:
        raise ConfigurationError(
            f"vLLM {vllm_version} is not a version this exporter writes for",
            why=f"declared versions: {', '.join(SCHEMAS)}",
            fix="choose one of them with --vllm-version",
        ) from None


def quantization_config(
    export_format: ExportFormat, ignore: Sequence[str], schema: CheckpointSchema
) -> dict[str, object] | None:
    """The block for config.json, without null and default; None for an unquantized export.

    `ignore`: full names of linear layers that stay unquantized.
    """
    if not export_format.quantized:
        return None
    float8 = {"num_bits": 8, "type": "float", "symmetric": True}
    group: dict[str, object] = {"targets": ["Linear"], "weights": {**float8, "strategy": "channel", "dynamic": False}}
    if export_format is ExportFormat.FP8:
        group["input_activations"] = {**float8, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if export_format is ExportFormat.FP8 else "naive-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }
