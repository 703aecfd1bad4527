"""Tiny models of pictures and text with everything that an engine asks for: weights, tokenizer, processor, template.

Random weights under the names of published checkpoints, two layers. A picture is put through the processor of the real
architecture, a small one, so that few tokens stand for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fp8pipe.models.compat import import_transformers

__all__ = ["PICTURED", "write_pictured"]

_IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 256}
_MARKS = {"image": 258, "video": 259, "start": 260, "end": 261}
_NAMES = {"image": "<|image|>", "video": "<|video|>", "start": "<|start|>", "end": "<|stop|>"}
# vLLM's attention for CPUs takes no heads of fewer than 32.
_TEXT: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, **_IDS,
}  # fmt: skip
_TOWER = {"hidden_size": 64, "intermediate_size": 96}
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}PICTURE{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PICTURED = ("qwen25vl", "gemma3_mm")


def write_pictured(root: Path, name: str) -> Path:
    """The checkpoint, bf16."""
    transformers = import_transformers()
    torch.manual_seed(3)
    kind, config, processor = (_qwen if name == "qwen25vl" else _gemma)(transformers)
    model = getattr(transformers, kind)._from_config(config)
    for key, parameter in model.named_parameters():  # no two equal, and answers that tell models apart
        # Gemma multiplies its embeddings, which are its head, too: large ones would answer with the last token again.
        parameter.data.add_(torch.randn_like(parameter) * (0.02 if "embed_tokens" in key else 0.1))
    model.to(torch.bfloat16).save_pretrained(root)
    processor.save_pretrained(root)
    if name == "gemma3_mm":
        _as_published(root / "model.safetensors")
    return root


def _as_published(file: Path) -> None:
    """transformers has dropped a level of the vision tower's names since Gemma 3 was published."""
    found = load_file(file)
    names = {name: name.replace("vision_tower.", "vision_tower.vision_model.", 1) for name in found}
    save_file({names[name]: value for name, value in found.items()}, file, metadata={"format": "pt"})


def _tokenizer(transformers: Any, picture: str, **named: str) -> Any:
    """Bytes, what marks pictures, and the line breaks that vLLM's class for Gemma 3 asks the vocabulary for."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(["<|begin|>", "<|end|>", *_NAMES.values()])
    found.add_tokens([AddedToken("\n" * count, normalized=False) for count in (1, 2, 3, 4)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|begin|>",
        chat_template=_TEMPLATE.replace("PICTURE", picture), model_max_length=512, extra_special_tokens=named,
    )  # fmt: skip


def _qwen(transformers: Any) -> tuple[str, Any, Any]:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                  "mrope_section": [4, 6, 6]}},
        vision_config={**_TOWER, "depth": 2, "num_heads": 2, "out_hidden_size": 128, "fullatt_block_indexes": [1]},
        image_token_id=_MARKS["image"], video_token_id=_MARKS["video"], vision_start_token_id=_MARKS["start"],
        vision_end_token_id=_MARKS["end"],
    )  # fmt: skip
    tokenizer = _tokenizer(
        transformers, _NAMES["start"] + _NAMES["image"] + _NAMES["end"], image_token=_NAMES["image"],
        video_token=_NAMES["video"],
    )  # fmt: skip
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16),
        tokenizer=tokenizer, video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return "Qwen2_5_VLForConditionalGeneration", config, processor


def _gemma(transformers: Any) -> tuple[str, Any, Any]:
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "head_dim": 32, "sliding_window": 16,
                     "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={**_TOWER, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
                       "vision_use_head": False},
        mm_tokens_per_image=4, image_token_index=_MARKS["image"], boi_token_index=_MARKS["start"],
        eoi_token_index=_MARKS["end"],
    )  # fmt: skip
    tokenizer = _tokenizer(
        transformers, _NAMES["start"], image_token=_NAMES["image"], boi_token=_NAMES["start"], eoi_token=_NAMES["end"]
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56}), tokenizer=tokenizer,
        chat_template=tokenizer.chat_template, image_seq_length=4,
    )  # fmt: skip
    return "Gemma3ForConditionalGeneration", config, processor
