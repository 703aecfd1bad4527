"""Tiny models of many language architectures, and what is expected of each on its way to an engine.

Random weights, hidden size 64, two layers, the byte tokenizer of `tiny_checkpoints`. `docs/architectures.md` is
written from this table by `python tests/support/architecture_table.py`, and
`tests/pipeline/finetune/test_architectures.py` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import write_tokenizer

from fp8pipe.models.compat import import_transformers

__all__ = ["ARCHITECTURES", "Architecture", "build", "llama_like", "write"]

_IDS = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
_SMALL: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, **_IDS,
}  # fmt: skip
_STACKED = "unknown-matrix"  # experts and states that are no linear layers: how an engine holds them is not known
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table.

    Attributes:
        kind: class of the model in transformers.
        config: class of its configuration.
        settings: of the configuration.
        trained: linears that FALQON trains.
        left_out: end of a linear's name -> why it is not trained, besides output heads and towers.
        refused: lint rule by which FP8 and w8a16 exports refuse the tuned model; empty where they are written.
        rare: tried in a long run alone.
    """

    kind: str
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained: int = 14
    left_out: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""
    rare: bool = False


def llama_like(
    name: str,
    trained: int = 14,
    refused: str = "",
    left_out: Mapping[str, str] | None = None,
    config: str = "",
    **more: Any,
) -> Architecture:
    """A row of the table whose settings have the names of Llama's."""
    config = config or f"{name}Config"
    return Architecture(f"{name}ForCausalLM", config, {**_SMALL, **more}, trained, left_out or {}, refused)


def _partial(factor: float) -> dict[str, Any]:
    return {**_ROPE, "partial_rotary_factor": factor}


_ROUTER = "router: one code more or less would send tokens to other experts"
_READ = "the model reads its weight without calling it"
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SHORT = {n: f"a side of {n} is too short for FP8 kernels and for an adapter" for n in (1, 2, 8)}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": llama_like("Llama", tie_word_embeddings=False),
    "llama_bias": llama_like("Llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "mistral": llama_like("Mistral", sliding_window=16),
    "qwen2": llama_like("Qwen2", tie_word_embeddings=True),
    "qwen3": llama_like("Qwen3", head_dim=32, tie_word_embeddings=True),
    "gemma2": llama_like("Gemma2", head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**_SMALL, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    ),
    "phi": llama_like("Phi", 12, rope_parameters=_partial(0.5)),
    "phi3": llama_like("Phi3", 8, rope_parameters=_partial(0.5), tie_word_embeddings=False),
    "olmo2": llama_like("Olmo2"),
    "granite": llama_like("Granite"),
    "cohere": llama_like("Cohere"),
    "starcoder2": llama_like("Starcoder2", 12),
    "stablelm": llama_like("StableLm", rope_parameters=_partial(0.25), use_qkv_bias=True),
    "gpt2": Architecture(
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 272, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, 8,
    ),
    "gpt_neox": Architecture(
        "GPTNeoXForCausalLM", "GPTNeoXConfig",
        {k: v for k, v in _SMALL.items() if k not in ("num_key_value_heads", "pad_token_id")}, 8,
    ),
    "opt": Architecture(
        "OPTForCausalLM", "OPTConfig",
        {"vocab_size": 272, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 256, "word_embed_proj_dim": 64, **_IDS}, 12,
    ),
    "bloom": Architecture(
        "BloomForCausalLM", "BloomConfig", {"vocab_size": 272, "hidden_size": 64, "n_layer": 2, "n_head": 4, **_IDS}, 8
    ),
    "mpt": Architecture(
        "MptForCausalLM", "MptConfig",
        {"vocab_size": 272, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, 8,
    ),
    "falcon": Architecture(
        "FalconForCausalLM", "FalconConfig",
        {"vocab_size": 272, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
         "new_decoder_architecture": True, "alibi": False, "bias": False, "parallel_attn": True, **_IDS}, 8,
    ),
    "mixtral": llama_like("Mixtral", 32, "", {"mlp.gate": _ROUTER}, **_EXPERTS),
    "qwen3_moe": llama_like(
        "Qwen3Moe", 32, "", {"mlp.gate": _ROUTER}, head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "gpt_oss": llama_like("GptOss", 24, "", {"mlp.router": _ROUTER}, head_dim=16, sliding_window=16, **_EXPERTS),
    "granitemoe": llama_like("GraniteMoe", 32, "", {"block_sparse_moe.router": _ROUTER}, **_EXPERTS),
    "mamba2": Architecture(
        "Mamba2ForCausalLM", "Mamba2Config",
        {"vocab_size": 272, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16,
         "n_groups": 1, "expand": 2, **_IDS}, 2, {"mixer.out_proj": _READ}, _STACKED,
    ),
    "jamba": llama_like(
        "Jamba", 16, _STACKED, {"mamba.dt_proj": _READ, "feed_forward.router": _ROUTER}, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2, num_experts_per_tok=1,
        mamba_d_state=8, mamba_dt_rank=16,
    ),
    "gemma3_mm": Architecture(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": {**_SMALL, "head_dim": 16, "sliding_window": 16},
         "vision_config": {**_VISION, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
                           "patch_size": 14},
         "mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7},
    ),
    "qwen25vl": Architecture(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"text_config": {**_SMALL, "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
         "vision_config": {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
         "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8},
    ),
    "qwen3_next": llama_like(
        "Qwen3Next", 36, _STACKED,
        {"linear_attn.in_proj_ba": _SHORT[8], "mlp.shared_expert_gate": _SHORT[1], "mlp.gate": _ROUTER},
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "gemma3n": Architecture(
        "Gemma3nForCausalLM", "Gemma3nTextConfig",
        {**_SMALL, "head_dim": 16, "sliding_window": 16, "vocab_size_per_layer_input": 272,
         "hidden_size_per_layer_input": 16, "laurel_rank": 16, "num_kv_shared_layers": 0, "altup_num_inputs": 2,
         "activation_sparsity_pattern": [0.0, 0.0], "layer_types": ["sliding_attention", "full_attention"]}, 25,
        dict.fromkeys(("altup.correction_coefs", "altup.prediction_coefs", "altup.modality_router"), _SHORT[2]),
    ),
}  # fmt: skip


def build(architecture: Architecture) -> Any:
    """The model, bf16."""
    transformers = import_transformers()
    torch.manual_seed(3)
    config = getattr(transformers, architecture.config)(**architecture.settings)
    model = getattr(transformers, architecture.kind)._from_config(config)
    return model.to(torch.bfloat16).eval()


def write(architecture: Architecture, root: Path) -> Path:
    """A checkpoint as transformers saves it, so that its tensors have the names of real ones, and a tokenizer."""
    build(architecture).save_pretrained(root)
    write_tokenizer(root)
    return root


def _rare() -> dict[str, Architecture]:
    """Further ones, each with a part that none above has, or of a family that many use."""
    mixed = ["linear_attention", "full_attention"]
    mla = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    llama4 = {
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
    }
    router = {"feed_forward.router": _ROUTER}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    out = {"mamba.out_proj": _READ}
    found = {
        "glm4": llama_like("Glm4", 12, head_dim=16, rope_parameters=_partial(0.5)),
        "nemotron": llama_like("Nemotron", 12, rope_parameters=_partial(0.5)),
        "smollm3": llama_like("SmolLM3"),
        "ernie4_5": llama_like("Ernie4_5", head_dim=16),
        "exaone4": llama_like("Exaone4", head_dim=16, sliding_window=16,
                               layer_types=["sliding_attention", "full_attention"]),
        "olmo3": llama_like("Olmo3", sliding_window=16),
        "apertus": llama_like("Apertus", 12),
        "gptj": Architecture(
            "GPTJForCausalLM", "GPTJConfig",
            {"vocab_size": 272, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8,
             "bos_token_id": 1, "eos_token_id": 0}, 12,
        ),
        "xglm": Architecture(
            "XGLMForCausalLM", "XGLMConfig",
            {"vocab_size": 272, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4,
             "max_position_embeddings": 256, **_IDS}, 12,
        ),
        "lfm2": llama_like("Lfm2", 12, _STACKED, layer_types=["conv", "full_attention"], conv_L_cache=3),
        "minimax": llama_like("MiniMax", 19, "", {"mlp.gate": _ROUTER}, head_dim=16, num_local_experts=2,
                               num_experts_per_tok=1, block_size=32, layer_types=mixed[::-1]),
        "deepseek_v3": llama_like("DeepseekV3", 28, "", {"mlp.gate": _ROUTER}, num_key_value_heads=4,
                                   moe_intermediate_size=32, first_k_dense_replace=1, **mla, **experts),
        "recurrent_gemma": llama_like("RecurrentGemma", 19, _STACKED, num_hidden_layers=3, lru_width=64,
                                       attention_window_size=32, head_dim=16),
        "bamba": llama_like("Bamba", 11, _STACKED, out, attn_layer_indices=[1], **_MAMBA),
        "llama4": llama_like("Llama4", 26, "", router, config="Llama4TextConfig", **llama4),
        "llama4_mm": Architecture(
            "Llama4ForConditionalGeneration", "Llama4Config",
            {"text_config": {**_SMALL, **llama4}, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7,
             "vision_config": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1,
                               "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projector_input_dim": 32,
                               "projector_output_dim": 32, "vision_output_dim": 32, "pixel_shuffle_ratio": 1.0}},
            26, router,
        ),
        "granitemoeshared": llama_like("GraniteMoeShared", 36, "", {"block_sparse_moe.router": _ROUTER},
                                        shared_intermediate_size=64, **_EXPERTS),
        "granitemoehybrid": llama_like(
            "GraniteMoeHybrid", 33, _STACKED, {**out, "block_sparse_moe.router": _ROUTER}, num_local_experts=4,
            num_experts_per_tok=2, shared_intermediate_size=64, layer_types=["mamba", "attention"], **_MAMBA),
        "falcon_h1": llama_like("FalconH1", 16, _STACKED, out, head_dim=16, mamba_d_ssm=128, **_MAMBA),
        "zamba2": llama_like(
            "Zamba2", 13, _STACKED, out, num_hidden_layers=4, mamba_d_state=16, mamba_headdim=16, n_mamba_heads=8,
            mamba_ngroups=1, layers_block_type=["mamba", "mamba", "hybrid", "mamba"], use_mem_rope=True,
            num_mem_blocks=1, adapter_rank=16),
        "mamba": Architecture(
            "MambaForCausalLM", "MambaConfig",
            {"vocab_size": 272, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "time_step_rank": 16,
             **_IDS}, 2, dict.fromkeys(("mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"), _READ), _STACKED,
        ),
        "rwkv": Architecture(
            "RwkvForCausalLM", "RwkvConfig",
            {"vocab_size": 272, "context_length": 256, "hidden_size": 64, "num_hidden_layers": 2,
             "attention_hidden_size": 64, "intermediate_size": 96, "bos_token_id": 1, "eos_token_id": 0}, 10,
            dict.fromkeys(("attention.output", "feed_forward.value"), _READ), _STACKED,
        ),
    }  # fmt: skip
    return {name: replace(one, rare=True) for name, one in found.items()}


ARCHITECTURES |= _rare()
