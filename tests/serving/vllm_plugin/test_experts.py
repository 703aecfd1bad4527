"""The plugin's emulation of experts whose inputs are rounded: activations of vLLM, and others refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

SCRIPT = """
import json, torch
from types import SimpleNamespace
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul, SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from fp8pipe_vllm_cpu import experts
from fp8pipe_vllm_cpu.dequantize import Activations, Granularity

joined, found = torch.randn(5, 64) * 8, {}
with set_current_vllm_config(VllmConfig()):
    for kind, layer in ((MoEActivation.SILU, SiluAndMul()), (MoEActivation.SWIGLUOAI, SwigluOAIAndMul())):
        found[kind.value] = (experts._gated(joined, kind) - layer.forward_native(joined)).abs().max().item()
try:
    experts.CpuFp8MoEMethod(SimpleNamespace(activation=MoEActivation.GELU), Activations(Granularity.TOKEN))
except ValueError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.vllm
def test_vllms_activations_are_emulated_and_others_refused_at_load(in_vllm: Callable[..., Any]) -> None:
    found = in_vllm(SCRIPT, FP8PIPE_VLLM_ACTIVATIONS="quant")
    # Products of three numbers up to 50, in another order of multiplication: a few roundings in fp32.
    assert found["silu"] < 1e-4
    assert found["swigluoai"] < 1e-4
    assert "silu and swigluoai, not with gelu" in found["refused"]
