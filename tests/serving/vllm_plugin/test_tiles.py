"""A model too small for any product in AMX before its first attention answers in bf16, whatever the processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fp8pipe.models.compat import import_transformers

# One process for all, so that nobody else asks for AMX before. The kernel's answer is the mask of what may be used.
SCRIPT = """
import ctypes, json, os, pathlib
from vllm import LLM, SamplingParams
engine = LLM(os.environ["MODEL"], dtype="bfloat16", max_model_len=64, max_num_seqs=1, enforce_eager=True,
             skip_tokenizer_init=True)
sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
answer = engine.generate([{"prompt_token_ids": [1, 2, 3]}], sampling, use_tqdm=False)[0].outputs[0].token_ids
mask = ctypes.c_uint64(0)
ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask))
has = " amx_tile" in pathlib.Path("/proc/cpuinfo").read_text()
print(json.dumps({"tokens": len(answer), "has": has, "allowed": bool(mask.value >> 18 & 1)}))
"""


@pytest.mark.vllm
def test_a_tiny_model_answers_in_bf16(in_vllm: Callable[..., Any], tmp_path: Path) -> None:
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    found = in_vllm(SCRIPT, MODEL=str(tmp_path / "model"), VLLM_CPU_KVCACHE_SPACE="1")
    assert found["tokens"] == 4
    assert found["allowed"] == found["has"]
