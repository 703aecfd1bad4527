"""The plugin's emulation of experts whose inputs are rounded: vLLM's own activations, and a refusal of others."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from exporters.vllm.environment import find_vllm_python
from fp8pipe.core.errors import MissingCapabilityError
from validation.vllm.launcher import in_process

PLUGIN = Path(__file__).resolve().parents[3] / "serving" / "vllm_plugin"
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
def test_vllms_activations_are_emulated_and_others_refused_at_load() -> None:
    try:
        python = find_vllm_python()
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    environment = {**in_process(), "PYTHONPATH": str(PLUGIN), "FP8PIPE_VLLM_ACTIVATIONS": "quant"}
    done = subprocess.run(
        [str(python), "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Products of three numbers up to 50, in another order of multiplication: a few roundings in fp32.
    assert found["silu"] < 1e-4
    assert found["swigluoai"] < 1e-4
    assert "silu and swigluoai, not with gelu" in found["refused"]
