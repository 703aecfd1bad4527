"""Tiny random decoders of many architectures: each carries positions, masks or state through a row in a way of its own.

Windows are shorter than most examples of the tests, so that a mask without them is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from fp8pipe.models.compat import import_transformers

VOCABULARY = 272  # what `make_base` and its tokenizer have
WINDOW = 16

_IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, **_IDS,
}  # fmt: skip
_OLD = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4, **_IDS}
_WINDOWED = {"head_dim": 16, "sliding_window": WINDOW}


def _small(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(import_transformers(), f"{name}Config")(**(_SMALL | more))


def _other(name: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(import_transformers(), f"{name}Config")(**values)


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": _small("Llama"),
    "gpt2": _other("GPT2", n_embd=64, n_positions=256, **_OLD),
    "gptj": _other("GPTJ", n_embd=64, n_positions=256, rotary_dim=8, **_OLD),
    "mistral": _small("Mistral", sliding_window=WINDOW),
    "gemma2": _small("Gemma2", query_pre_attn_scalar=16, **_WINDOWED),
    "gemma3": _small("Gemma3Text", query_pre_attn_scalar=16, **_WINDOWED),
    "gpt_neo": _other(
        "GPTNeo", vocab_size=VOCABULARY, hidden_size=64, num_layers=2, num_heads=4, window_size=WINDOW,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=256, **_IDS,
    ),
    "llama4": _small(
        "Llama4Text", intermediate_size_mlp=96, head_dim=16, num_local_experts=2, attention_chunk_size=WINDOW
    ),
    "mixtral": _small("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": _small("GptOss", num_local_experts=4, num_experts_per_tok=2, **_WINDOWED),
    "opt": _other(
        "OPT", vocab_size=VOCABULARY, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=64, dropout=0.0, **_IDS,
    ),
    "falcon": _other(
        "Falcon", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, bias=False, **_IDS,
    ),
    "falcon_alibi": _other(
        "Falcon", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True,
        bias=False, **_IDS,
    ),
    "bloom": _other("Bloom", hidden_size=64, **_OLD),
    "mpt": _other("Mpt", vocab_size=VOCABULARY, d_model=64, n_layers=2, n_heads=4, max_seq_len=256, **_IDS),
    "mamba2": _other(
        "Mamba2", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=16,
        n_groups=1, chunk_size=32, **_IDS,
    ),
    "jamba": _small(
        "Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
        num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=16,
    ),
    "lfm2": _small("Lfm2", layer_types=["conv", "full_attention"]),
    "qwen3_next": _small(
        "Qwen3Next", head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, num_experts=0, mlp_only_layers=[0, 1],
        layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip


@cache
def _drawn(name: str) -> nn.Module:
    torch.manual_seed(3)
    model: nn.Module = import_transformers().AutoModelForCausalLM.from_config(DECODERS[name]())
    for key, parameter in model.named_parameters():
        if parameter.ndim >= 2:  # large enough that attention matters as much as in a trained model
            parameter.data.normal_(0, 1.0 if "embed" in key or "wte" in key else 0.1)
    return model.eval()


def tiny_decoder(name: str) -> Any:
    """The model of that name in fp32, one and the same in a process: leave it as it is."""
    return _drawn(name)
