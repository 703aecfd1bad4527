"""Experts whose quantized activations the plugin does not emulate are refused while the model loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

SCRIPT = """
import json
from types import SimpleNamespace
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from fp8pipe_vllm_cpu.dequantize import Activations, Granularity
from fp8pipe_vllm_cpu.experts import CpuFp8MoEMethod

found = []
for activation, bias in ((MoEActivation.GELU, False), (MoEActivation.SILU, True)):
    try:
        CpuFp8MoEMethod(SimpleNamespace(activation=activation, has_bias=bias), Activations(Granularity.TOKEN))
    except ValueError as error:
        found.append(str(error))
print(json.dumps(found))
"""


@pytest.mark.vllm
def test_experts_that_are_not_emulated_do_not_load(in_vllm: Callable[..., Any]) -> None:
    other, biased = in_vllm(SCRIPT, FP8PIPE_VLLM_ACTIVATIONS="quant")
    assert "these have gelu. Set it to none" in other
    assert "these have silu and biases" in biased
