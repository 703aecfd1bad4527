"""Tiny FP8 checkpoints of a real architecture, written by hand: every format, with its exact values beside it.

A Llama of 2 layers with grouped-query attention. Head and block sizes are such that 128x128 blocks cut between
the parts of fused layers. Parts have very different magnitudes, so that an engine that requantizes q/k/v to a
common scale is far off. Nothing of the product is used here: the oracle is `codes * scale`, written out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8pipe.models.compat import import_transformers

BLOCK = 128
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
# Magnitude of each part: fused neighbours differ a hundredfold.
SPREAD = {"q_proj": 0.06, "k_proj": 0.2, "v_proj": 0.002, "gate_proj": 0.15, "up_proj": 0.01}


def make_model(seed: int = 3) -> Any:
    """The unquantized model, fp32."""
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=256 + len(SPECIALS),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-2]
        std = SPREAD.get(leaf, 0.05)
        if parameter.ndim == 2:
            parameter.data.normal_(0.0, 1.0 if "embed" in name else std)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        parameter.data = parameter.data.to(torch.bfloat16).float()  # values a bf16 checkpoint can hold
    return model


def write_tokenizer(root: Path) -> None:
    """A byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(root / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "bos_token": "<|end|>",
        "model_max_length": 256,
    }
    (root / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (root / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def write_plain(root: Path, model: Any) -> Path:
    """A bf16 Hugging Face directory."""
    model.to(torch.bfloat16).save_pretrained(root)
    model.float()
    write_tokenizer(root)
    return root


@dataclass(frozen=True)
class Format:
    """One FP8 checkpoint format.

    Attributes:
        name: for messages.
        weights: tensor, channel or block.
        family: compressed-tensors or fp8.
        activations: None, dynamic or static.
    """

    name: str
    weights: str
    family: str
    activations: str | None

    @property
    def scale_name(self) -> str:
        return "weight_scale_inv" if self.family == "fp8" and self.weights == "block" else "weight_scale"


FORMATS = (
    Format("ct-tensor-dynamic", "tensor", "compressed-tensors", "dynamic"),
    Format("ct-tensor-static", "tensor", "compressed-tensors", "static"),
    Format("ct-channel-dynamic", "channel", "compressed-tensors", "dynamic"),
    Format("ct-block-dynamic", "block", "compressed-tensors", "dynamic"),
    Format("ct-tensor-w8a16", "tensor", "compressed-tensors", None),
    Format("ct-channel-w8a16", "channel", "compressed-tensors", None),
    Format("ct-block-w8a16", "block", "compressed-tensors", None),
    Format("fp8-tensor-dynamic", "tensor", "fp8", "dynamic"),
    Format("fp8-tensor-static", "tensor", "fp8", "static"),
    Format("fp8-block-dynamic", "block", "fp8", "dynamic"),
)
INPUT_SCALE = 0.05


def quantization_config(form: Format) -> dict[str, object]:
    """The block of config.json."""
    if form.family == "fp8":
        block = {"weight_block_size": [BLOCK, BLOCK]} if form.weights == "block" else {}
        return {
            "quant_method": "fp8",
            "activation_scheme": form.activations,
            "ignored_layers": ["lm_head"],
            **block,
        }
    float8 = {"num_bits": 8, "type": "float", "symmetric": True}
    weights: dict[str, object] = {**float8, "strategy": form.weights, "dynamic": False}
    if form.weights == "block":
        weights["block_structure"] = [BLOCK, BLOCK]
    group: dict[str, object] = {"targets": ["Linear"], "weights": weights}
    if form.activations == "static":
        group["input_activations"] = {**float8, "strategy": "tensor", "dynamic": False}
    elif form.activations == "dynamic" and form.weights == "block":
        group["input_activations"] = {**float8, "strategy": "group", "group_size": BLOCK, "dynamic": True}
    elif form.activations == "dynamic":
        group["input_activations"] = {**float8, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized" if form.activations is None else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def quantize(weight: Tensor, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale as stored, and the exact fp32 values they stand for."""
    if granularity == "tensor":
        scale = weight.abs().amax() / 448.0
        spread = scale
    elif granularity == "channel":
        scale = weight.abs().amax(dim=1, keepdim=True) / 448.0
        spread = scale
    else:
        rows, columns = weight.shape
        tiles = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = tiles.abs().amax(dim=(1, 3)) / 448.0
        spread = torch.kron(scale, torch.ones(BLOCK, BLOCK))
    codes = (weight / spread).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * spread


def write_fp8(root: Path, model: Any, form: Format) -> dict[str, Tensor]:
    """Write the checkpoint; return the exact fp32 values by checkpoint name."""
    root.mkdir(parents=True)
    exact: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            stored[name], exact[name] = value.to(torch.bfloat16), value.clone()
            continue
        codes, scale, exact[name] = quantize(value, form.weights)
        prefix = name.removesuffix("weight")
        stored[name] = codes
        stored[prefix + form.scale_name] = scale.clone()
        if form.activations == "static":
            stored[prefix + "input_scale"] = torch.tensor(INPUT_SCALE)
    save_file(stored, root / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads(model.config.to_json_string(use_diff=False)), "dtype": "bfloat16"}
    config["architectures"] = ["LlamaForCausalLM"]
    config["quantization_config"] = quantization_config(form)
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(root)
    return exact
