"""Models that can be divided over several devices, and those that cannot: refused with the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporters.vllm.form import ServingForm
from exporters.vllm.spread import require_fit
from fp8pipe.core.errors import ConfigurationError

# SmolLM2-135M and LLaMA-7B, from their config.json.
SMOL = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30, "intermediate_size": 1536,
        "hidden_size": 576}  # fmt: skip
LLAMA = {"num_attention_heads": 32, "num_hidden_layers": 32, "intermediate_size": 11008, "hidden_size": 4096}
BLOCKS = {"quantization_config": {"config_groups": {"group_0": {"weights": {"block_structure": [128, 128]}}}}}
FP4 = {"quantization_config": {"config_groups": {"group_0": {"weights": {"group_size": 16}}}}}


def refusal(folder: Path, config: dict[str, Any], tensor: int, pipeline: int = 1) -> str:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    form = ServingForm(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    try:
        require_fit(folder, form)
    except ConfigurationError as error:
        return error.why
    return ""


@pytest.mark.parametrize(
    ("config", "tensor", "pipeline", "said"),
    [
        (SMOL, 3, 1, ""),
        (SMOL, 1, 30, ""),
        (SMOL, 2, 1, "9 attention heads cannot be divided by 2"),
        (SMOL, 1, 31, "30 layers, fewer than 31 pipeline stages"),
        ({"text_config": SMOL}, 2, 1, "9 attention heads"),
        (LLAMA | {"num_key_value_heads": 8}, 16, 1, ""),  # each head of K and V on two devices
        (LLAMA | {"num_attention_heads": 48, "num_key_value_heads": 8}, 12, 1, "8 heads of K and V"),
        (LLAMA | {"num_attention_heads": 36}, 3, 1, "intermediate_size is 11008"),
        ({"n_head": 12, "n_layer": 12}, 5, 13, "12 layers, fewer than 13 pipeline stages; 12 attention heads"),
        ({}, 7, 7, ""),  # left to vLLM
        # 11008 = 86 blocks of 128, so four devices would get 21.5 blocks each.
        (LLAMA | BLOCKS, 2, 1, ""),
        (LLAMA | BLOCKS, 4, 1, "intermediate_size is 11008, of which each device has 2752: not whole blocks of 128"),
        (LLAMA | BLOCKS | {"num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1024}, 4, 1,
         "the width of K and V is 256, of which each device has 64"),
        # Groups of 16 are along inputs: those of the output projection and of the MLP's last layer are divided.
        (LLAMA | FP4 | {"intermediate_size": 1376}, 2, 1, ""),
        (LLAMA | FP4 | {"intermediate_size": 1376}, 8, 1,
         "intermediate_size is 1376, of which each device has 172: not whole groups of 16"),
        (LLAMA | FP4 | {"intermediate_size": 1368}, 8, 1, ""),  # no whole groups: that layer stays in bf16
        (LLAMA | FP4 | {"head_dim": 8}, 32, 1, "the width of Q is 256, of which each device has 8: not whole groups"),
        (LLAMA | FP4 | {"num_key_value_heads": 8, "head_dim": 8}, 8, 1, ""),  # 8 outputs of K and V on each
        (LLAMA | {"intermediate_size": 11008}, 4, 1, ""),  # a scale per row needs no blocks
    ],
)  # fmt: skip
def test_a_model_is_divided_only_as_its_layers_allow(
    config: dict[str, Any], tensor: int, pipeline: int, said: str, tmp_path: Path
) -> None:
    found = refusal(tmp_path, config, tensor, pipeline)
    assert said in found
    assert bool(said) == bool(found), found
