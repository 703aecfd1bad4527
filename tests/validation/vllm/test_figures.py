"""Figures of a validation by themselves: counts of differing elements, and the noise of a form."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from held_weights import held_weights
from language_models import ARCHITECTURES, build
from safetensors.torch import load_file

from validation.vllm.expected import count_differences
from validation.vllm.held import Expected
from validation.vllm.reference import Reference, _rounded, served_figures


def test_a_tensor_of_another_shape_differs_wholly() -> None:
    found = torch.zeros(3, 4)
    assert count_differences(Expected("codes", torch.zeros(4, 3), torch.ones(1), False), found) == (12, 12)
    assert count_differences(Expected("floats", torch.zeros(4, 3), None, False), found) == (12, 0)


def test_the_noise_of_a_form_does_not_depend_on_how_much_text_was_read() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.log_softmax(torch.randn(3, 40, generator=generator), -1)
    form = torch.log_softmax(exact + 0.01 * torch.randn(3, 40, generator=generator), -1)
    told = [{str(token): float(value) for token, value in enumerate(row)} for row in form[:-1]]
    once, often = (served_figures([exact] * n, [form] * n, [told] * n) for n in (1, 20))
    assert once["noise_kl"] == pytest.approx(often["noise_kl"])
    assert once["noise_kl"] > 0


def test_rows_are_rounded_by_their_own_scale_and_small_ones_by_the_smallest() -> None:
    """vLLM's kernel takes no scale below 1 / (448 * 512), so that rows of tiny values are not spread over the grid."""
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [30.0], [1e-3], [1e-7]]
    )
    scales = np.maximum(np.abs(rows.numpy()).max(-1, keepdims=True) / np.float32(448), np.float32(1 / (448 * 512)))
    codes = (rows.numpy() / scales).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(_rounded(rows).numpy(), codes.astype(np.float32) * scales)


def test_of_stacked_experts_each_projection_is_a_layer_of_its_own(tmp_path: Path) -> None:
    """Inputs of experts are rounded where those layers are; a stack has no place for it."""
    build(ARCHITECTURES["qwen3_moe"]).save_pretrained(tmp_path)
    reference = Reference(tmp_path, held_weights(load_file(tmp_path / "model.safetensors")))
    assert isinstance(reference.model.get_submodule("model.layers.1.mlp.experts.1.down_proj"), torch.nn.Linear)
