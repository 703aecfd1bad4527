"""The memory of vision towers, counted without values, against what torch's profiler sees of a real pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.structure import model_class
from pipeline.dry_run.towers import tower_bytes

TEXT = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}


def gemma(transformers: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.Gemma3Config(
        text_config=TEXT | {"head_dim": 32}, vision_config=TOWER | {"image_size": 224, "patch_size": 14},
        mm_tokens_per_image=16, architectures=["Gemma3ForConditionalGeneration"],
    )  # fmt: skip
    return config, {"pixel_values": torch.randn(4, 3, 224, 224), "token_type_ids": torch.zeros(4, 48).long()}


def qwen(transformers: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    tower = {"depth": 2, "hidden_size": 128, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": 64}
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=tower | {"fullatt_block_indexes": [1]},
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )  # fmt: skip
    grid = torch.tensor([[1, 32, 32], [1, 16, 16]])
    return config, {"pixel_values": torch.randn(1280, 1176), "image_grid_thw": grid}


def idefics(transformers: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=TOWER | {"image_size": 28, "patch_size": 14},
        scale_factor=2, architectures=["Idefics3ForConditionalGeneration"],
    )  # fmt: skip
    return config, {"pixel_values": torch.randn(1, 1, 3, 28, 28)}


def seen(config: Any, dtype: torch.dtype, inputs: dict[str, torch.Tensor]) -> int:
    """The most bytes that are allocated at once in a real pass through the tower."""
    model = model_class(config)._from_config(config, dtype=dtype).eval()
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()
             if key != "token_type_ids"}  # fmt: skip
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model.get_image_features(**given)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [gemma, qwen])
def test_a_tower_takes_what_was_counted(family: Any, dtype: torch.dtype) -> None:
    """Within 2 %: sizes and positions of patches, which are computed and not counted, take a few kB."""
    config, inputs = family(import_transformers())
    counted = tower_bytes(config, dtype, inputs)
    assert counted is not None
    pixels = sum(value.nbytes for value in inputs.values())  # there before, in fp32
    assert counted - pixels == pytest.approx(seen(config, dtype, inputs), rel=0.02)


def test_a_tower_that_looks_at_pixels_is_not_counted() -> None:
    config, inputs = idefics(import_transformers())
    assert seen(config, torch.float32, inputs) > 0  # it runs
    assert tower_bytes(config, torch.float32, inputs) is None
