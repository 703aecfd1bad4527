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

method = SimpleNamespace(activations=Activations(Granularity.TOKEN))
x, ids, weights = torch.randn(6, 32), torch.arange(6)[:, None] % 2, torch.rand(6, 1)
w13, w2 = torch.randn(2, 32, 32), torch.randn(2, 32, 16)
layer = SimpleNamespace(w13_weight=w13, w2_weight=w2, activation=MoEActivation.SILU)

def run(x, weights, on_input):
    layer.apply_router_weight_on_input = on_input
    return experts.CpuFp8MoEMethod._rounded(method, layer, x, weights, ids)

inputs = run(x, weights, True)
found["inputs"] = torch.equal(inputs, run(x * weights, torch.ones(6, 1), False))
found["outputs"] = torch.equal(run(x, weights, False), run(x, torch.ones(6, 1), False) * weights)
found["same"] = torch.allclose(inputs, run(x, weights, False))
print(json.dumps(found))
"""


@pytest.mark.vllm
def test_activations_and_routing_weights_are_vllms_and_others_refused_at_load(in_vllm: Callable[..., Any]) -> None:
    found = in_vllm(SCRIPT, FP8PIPE_VLLM_ACTIVATIONS="quant")
    # Products of three numbers up to 50, in another order of multiplication: a few roundings in fp32.
    assert found["silu"] < 1e-4
    assert found["swigluoai"] < 1e-4
    assert "silu and swigluoai, not with gelu" in found["refused"]
    assert found["inputs"]  # routing weights of Llama 4 multiply what an expert reads
    assert found["outputs"]
    assert not found["same"]
