"""The quantization block: minimal, accepted by compressed-tensors' strict schemes, no unknown engines."""

from __future__ import annotations

import pytest
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from exporters.vllm.options import SCHEMAS, ExportFormat, VllmExportOptions, quantization_config, schema_for
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError

SCHEMA = schema_for("0.32.0")
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


def test_fp8_block_is_exactly_this() -> None:
    assert quantization_config(ExportFormat.FP8, ["lm_head"], SCHEMA) == {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**FLOAT8, "strategy": "channel", "dynamic": False},
                "input_activations": {**FLOAT8, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    }


def test_w8a16_declares_no_activations() -> None:
    block = quantization_config(ExportFormat.W8A16, [], SCHEMA)
    assert block is not None
    assert block["format"] == "naive-quantized"
    assert set(block["config_groups"]["group_0"]) == {"targets", "weights"}  # type: ignore[index]


@pytest.mark.parametrize("export_format", [ExportFormat.FP8, ExportFormat.W8A16])
def test_compressed_tensors_accepts_it_without_extras(export_format: ExportFormat) -> None:
    block = quantization_config(export_format, ["lm_head"], SCHEMA)
    assert block is not None
    parsed = QuantizationConfig.model_validate(block)
    group = parsed.config_groups["group_0"]
    assert isinstance(group, QuantizationScheme)  # this model forbids extra keys
    assert group.weights is not None
    assert (group.weights.strategy, group.weights.dynamic) == ("channel", False)
    assert (group.input_activations is not None) == (export_format is ExportFormat.FP8)


def test_bf16_has_no_block() -> None:
    assert quantization_config(ExportFormat.BF16, [], SCHEMA) is None


def test_unknown_version_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError) as caught:
        schema_for("9.9.9")
    assert all(version in str(caught.value) for version in SCHEMAS)


def test_options_refuse_unknown_keys_and_bad_values() -> None:
    with pytest.raises(ConfigurationError) as caught:
        build_config(VllmExportOptions, {"fromat": "fp8", "max_shard_bytes": 0})
    assert "fromat" in str(caught.value)
    assert "max_shard_bytes" in str(caught.value)
