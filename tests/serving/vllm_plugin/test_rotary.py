"""Rotary embeddings in vLLM with the plugin, for each layout of queries, against rotations of complex numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

# Prints the largest difference of each case: whether halves are rotated (Llama) or neighbors (DeepSeek), and whether
# heads are merged. As in DeepSeek's attention, the queries are a part of wider rows, and the keys have one head.
SCRIPT = """
import json, torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from fp8pipe_vllm_cpu import rotary

def rotated(x, halves):
    real, imaginary = x.chunk(2, -1) if halves else (x[..., ::2], x[..., 1::2])
    z = torch.complex(real, imaginary) * turns
    return torch.cat((z.real, z.imag), -1) if halves else torch.view_as_real(z).flatten(-2)

rotary.install()
positions = torch.arange(10) * 3
turns = torch.polar(torch.ones(()), positions[:, None] * 100.0 ** (-torch.arange(0, 64, 2) / 64))[:, None]
found = {}
for halves in (False, True):
    with set_current_vllm_config(VllmConfig()):
        base = {"rope_type": "default", "rope_theta": 100.0}
        rope = get_rope(64, 64, rope_parameters=base, is_neox_style=halves, dtype=torch.float32)
    for merged in (False, True):
        query, key = torch.randn(10, 4, 96)[..., 32:], torch.randn(10, 1, 80)[..., 16:]
        expected = [rotated(query, halves), rotated(key, halves)]
        if merged:
            query, key = query.flatten(1), key.flatten(1)
        results = rope.forward_cpu(positions, query, key)
        errors = [(a.reshape(b.shape) - b).abs().max().item() for a, b in zip(results, expected)]
        found[f"halves={halves} merged={merged}"] = max(errors)
print(json.dumps(found))
"""


@pytest.mark.vllm
def test_heads_may_be_apart_or_merged(in_vllm: Callable[..., Any]) -> None:
    found = in_vllm(SCRIPT)
    assert len(found) == 4
    # Values below 5 are rotated in fp32, by sines and cosines of fp32 angles below 30.
    assert max(found.values()) < 5 * 30 * 2**-23 * 2, found
