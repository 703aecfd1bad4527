"""Tiny models whose processors lay images out in other ways than those of `tiny_pictures`, with random weights.

LLaVA-NeXT and Idefics 3 cut an image into tiles, whose number depends on its size, and pad them over the batch; Mistral
3 pads pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from tiny_pictures import _NAMES, _TEXT, _TOWER, _tokenizer

from fp8pipe.models.compat import import_transformers

__all__ = ["IMAGE_FAMILIES", "write_image_family"]

_PIXELS: Final = {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
_GRIDS: Final = [[56, 112], [112, 56], [112, 112]]
_IMAGE: Final = 258  # id of the token that stands for an image


def _llava_next(transformers: Any) -> tuple[Any, Any]:
    tokenizer = _tokenizer(transformers, _NAMES["image"], image_token=_NAMES["image"])
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={"model_type": "clip_vision_model", **_TOWER, **_PIXELS, "image_size": 56, "projection_dim": 64},
        image_token_index=_IMAGE, image_grid_pinpoints=_GRIDS, image_seq_length=16,
    )  # fmt: skip
    pixels = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=_GRIDS
    )
    return config, transformers.LlavaNextProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        image_token=_NAMES["image"], num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    )  # fmt: skip


def _idefics3(transformers: Any) -> tuple[Any, Any]:
    tokenizer = _tokenizer(transformers, "<image>", image_token=_NAMES["image"])
    marks = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_special_tokens({"extra_special_tokens": marks})
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **_TEXT, "vocab_size": 288},
        vision_config={**_TOWER, **_PIXELS, "image_size": 56},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
    )  # fmt: skip
    pixels = transformers.Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    return config, transformers.Idefics3Processor(
        image_processor=pixels, tokenizer=tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )


def _mistral3(transformers: Any) -> tuple[Any, Any]:
    tokenizer = _tokenizer(transformers, _NAMES["image"], image_token=_NAMES["image"])
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **_TEXT, "head_dim": 32},
        vision_config={"model_type": "pixtral", **_TOWER, **_PIXELS, "image_size": 112, "head_dim": 32},
        image_token_index=_IMAGE, spatial_merge_size=2,
    )  # fmt: skip
    pixels = transformers.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    return config, transformers.PixtralProcessor(
        image_processor=pixels, tokenizer=tokenizer, patch_size=14, spatial_merge_size=2, image_token=_NAMES["image"],
        image_break_token=_NAMES["video"], image_end_token=_NAMES["end"], chat_template=tokenizer.chat_template,
    )  # fmt: skip


IMAGE_FAMILIES: Final[dict[str, Callable[[Any], tuple[Any, Any]]]] = {
    "LlavaNext": _llava_next, "Idefics3": _idefics3, "Mistral3": _mistral3,
}  # fmt: skip


def write_image_family(root: Path, name: str) -> Path:
    """The checkpoint of one of `IMAGE_FAMILIES`, bf16, with its processor."""
    transformers = import_transformers()
    torch.manual_seed(3)
    config, processor = IMAGE_FAMILIES[name](transformers)
    model = getattr(transformers, f"{name}ForConditionalGeneration")._from_config(config)
    for key, parameter in model.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.02 if "embed" in key else 0.1))
    model.to(torch.bfloat16).save_pretrained(root)
    processor.save_pretrained(root)
    return root
