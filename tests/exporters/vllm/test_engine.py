"""Stock vLLM serves the FP8 exports, GPT-2's transposed weights included, with the numbers of the reference.

The reference quantizes activations as the checkpoint's scheme says (E4M3, one scale per token), so what is left
between the two is where single activations round to neighbouring codes.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.reopen import load_torch_model
from fp8pipe.numerics.grids import E4M3

IDS = [5, 9, 17, 33, 60, 2, 7, 80, 41, 12, 3, 22]
CHILD = """
import json, sys
from vllm import LLM, SamplingParams
ids = json.loads(sys.argv[2])
llm = LLM(sys.argv[1], enforce_eager=True, dtype="float32", max_model_len=64)
prompt = {"prompt_token_ids": ids}
out = llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))[0]
print(json.dumps([out.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]))
"""
# These are built for CUDA, cannot load beside a CPU torch, and a text model does not need them.
WITHOUT = """
import sys
for name in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules[name] = None
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_PLUGINS": "",  # stock: nothing that would dequantize at load
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
WIDE = {
    "gpt2": {"n_head": 2, "initializer_range": 0.2},
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2},
}


def vllm_python() -> Path:
    default = Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"
    python = Path(os.environ.get("FP8PIPE_VLLM_PYTHON", default))
    if not python.exists():
        pytest.skip("no vLLM environment (FP8PIPE_VLLM_PYTHON)")
    return python


def quantize_tokens(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scale = inputs[0].abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / E4M3.max
    return (E4M3.cast(inputs[0] / scale).float() * scale, *inputs[1:])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_stock_engine_agrees_with_the_reference(
    family: str, make_model: Callable[..., Path], falqon: Callable[..., Path], tmp_path: Path
) -> None:
    python = vllm_python()
    source = falqon(make_model(family, **WIDE[family]))
    export = export_vllm(source, tmp_path / "export", VllmExportOptions())
    model = load_torch_model(export.root, torch.float32)
    converted = {layer.name for layer in export.manifest.layers if layer.converted}
    for name, module in model.named_modules():
        if name in converted:
            module.register_forward_pre_hook(quantize_tokens)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([IDS])).logits, dim=-1)[0]
    expected = torch.stack([logprobs[i - 1, IDS[i]] for i in range(1, len(IDS))])
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)
    done = subprocess.run(
        [str(python), "-c", CHILD, str(export.root), json.dumps(IDS)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "site")},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    served = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    # A wrong orientation or scale moves these by whole units (they span -3 to -9); one activation that rounds
    # to its neighbour moves them by hundredths.
    assert (served - expected).abs().mean() < 0.1
