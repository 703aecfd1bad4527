"""Every family of vision transformers at a random small size, for the tests of all packages.

Built like any other model, from an `Architecture`; then every parameter gets a random value, since initial ones
would hide mistakes (heads of zeros, layer scales of 1e-5, position biases of zero).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp8pipe.models.vision.architecture import Architecture, build
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.sources import VisionModel

CLASSES = ("ant", "bee", "cat", "dog", "elk")


@dataclass(frozen=True)
class Family:
    """One family and what its structure must be.

    Attributes:
        first: (tokens, prefix tokens, grid, windows, queries) of the first attention.
        last: the same of the last one.
        heads: names of the classifying linears.
        linears: number of linears with the patch embedding.
        shared: how many linears read a tensor that an earlier one has read.
        mask: whether an attention adds something to its logits.
        constants: how many linears give the same for all pixels.
    """

    name: str
    architecture: Architecture
    first: tuple[int, int, tuple[int, int], int, int]
    last: tuple[int, int, tuple[int, int], int, int]
    heads: tuple[str, ...]
    linears: int
    shared: int = 0
    mask: bool = False
    constants: int = 0


def _timm(name: str, model: str, size: tuple[int, int], *, backbone: bool = False, **arguments: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {} if "depths" in arguments else {"embed_dim": 32, "depth": 2, "num_heads": 4}
    arguments = plain | {"num_classes": 0 if backbone else 5, "img_size": list(size)} | arguments
    return _family(name, "timm", model, arguments, size, backbone)


def _transformers(
    name: str, cls: str, size: tuple[int, int], *, backbone: bool = False, **arguments: Any
) -> dict[str, Any]:
    if not backbone:
        arguments["num_labels"] = len(CLASSES)
    return _family(name, "transformers", cls, arguments, size, backbone)


def _family(name: str, library: Any, model: str, arguments: Any, size: Any, backbone: bool) -> dict[str, Any]:
    architecture = Architecture(
        library=library,
        name=model,
        arguments=arguments,
        image_size=size,
        classes=None if backbone else CLASSES,
        head="features" if backbone else "classifier",
    )
    return {"name": name, "architecture": architecture}


def _plain(grid: tuple[int, int], prefix: int) -> dict[str, Any]:
    """Global self-attention in every layer."""
    tokens = grid[0] * grid[1] + prefix
    site = (tokens, prefix, grid, 1, tokens)
    return {"first": site, "last": site}


_SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_DINO = {key: value for key, value in _SMALL.items() if key != "intermediate_size"}
_SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
_WINDOWS = {"first": (16, 0, (4, 4), 4, 16), "last": (16, 0, (4, 4), 1, 16), "mask": True}
_SIX_WINDOWS = {"first": (16, 0, (4, 4), 6, 16), "last": (16, 0, (4, 4), 2, 16), "mask": True}
_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
         "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
_HEAD = ("classifier",)
_SWIN_TIMM = "swin_tiny_patch4_window7_224"
_EVA = "eva_giant_patch14_224"

FAMILIES = [
    Family(**_timm("timm-vit", "vit_tiny_patch16_224", (32, 48), patch_size=8),
           **_plain((4, 6), 1), heads=("head",), linears=10),
    Family(**_timm("timm-vit-qk-norm", "vit_tiny_patch16_224", (32, 32), patch_size=8, qk_norm=True, backbone=True),
           **_plain((4, 4), 1), heads=(), linears=9),
    Family(**_timm("timm-vit-average", "vit_tiny_patch16_224", (20, 20), patch_size=5, global_pool="avg",
                   class_token=False), **_plain((4, 4), 0), heads=("head",), linears=10),
    Family(**_timm("timm-vit-registers", "vit_tiny_patch16_224", (32, 32), patch_size=8, reg_tokens=3),
           **_plain((4, 4), 4), heads=("head",), linears=10),
    Family(**_timm("timm-rope-mixed", "vit_small_patch16_rope_mixed_224", (32, 48), patch_size=8),
           **_plain((4, 6), 1), heads=("head",), linears=10),
    Family(**_timm("timm-deit", "deit_tiny_patch16_224", (32, 32), patch_size=8),
           **_plain((4, 4), 1), heads=("head",), linears=10),
    Family(**_timm("timm-deit-distilled", "deit_tiny_distilled_patch16_224", (32, 32), patch_size=8),
           **_plain((4, 4), 2), heads=("head", "head_dist"), linears=11, shared=0),
    Family(**_timm("timm-dinov2", "vit_small_patch14_dinov2", (28, 42), backbone=True),
           **_plain((2, 3), 1), heads=(), linears=9),
    Family(**_timm("timm-dinov2-registers", "vit_small_patch14_reg4_dinov2", (42, 42)),
           **_plain((3, 3), 5), heads=("head",), linears=10),
    Family(**_timm("timm-beit", "beit_base_patch16_224", (32, 32), patch_size=8),
           **_plain((4, 4), 1), heads=("head",), linears=10, mask=True),
    Family(**_timm("timm-eva", _EVA, (28, 42)), **_plain((2, 3), 1), heads=("head",), linears=10),
    Family(**_timm("timm-eva02-rope", "eva02_tiny_patch14_224", (28, 42)),
           **_plain((2, 3), 1), heads=("head",), linears=10),
    Family(**_timm("timm-eva02-split", "eva02_base_patch14_224", (28, 28)),
           **_plain((2, 2), 1), heads=("head",), linears=16, shared=6),
    Family(**_timm("timm-siglip", "vit_base_patch16_siglip_224", (48, 32)),
           first=(6, 0, (3, 2), 1, 6), last=(6, 0, (3, 2), 1, 1), heads=("head",), linears=15),
    Family(**_timm("timm-swin", _SWIN_TIMM, (32, 32), embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4),
           **_WINDOWS, heads=("head.fc",), linears=19),
    Family(**_timm("timm-swin-wide", _SWIN_TIMM, (32, 48), embed_dim=16, depths=(2, 2), num_heads=(2, 4),
                   window_size=4, backbone=True), **_SIX_WINDOWS, heads=(), linears=18),
    Family(**_timm("timm-relpos", "vit_relpos_base_patch16_clsgap_224", (32, 48), patch_size=8),
           **_plain((4, 6), 1), heads=("head",), linears=10, mask=True, constants=4),
    Family(**_timm("timm-relpos-shared", "vit_srelpos_small_patch16_224", (32, 32), patch_size=8),
           **_plain((4, 4), 0), heads=("head",), linears=10, mask=True, constants=2),
    Family(**_timm("timm-dinov3", "vit_small_patch16_dinov3", (32, 48)),
           **_plain((2, 3), 5), heads=("head",), linears=10),
    Family(**_transformers("hf-vit", "ViTForImageClassification", (32, 48), **_SMALL | {"image_size": [32, 48]}),
           **_plain((4, 6), 1), heads=_HEAD, linears=14, shared=4),
    Family(**_transformers("hf-vit-backbone", "ViTModel", (32, 32), backbone=True, **_SMALL),
           **_plain((4, 4), 1), heads=(), linears=14, shared=4),
    Family(**_transformers("hf-deit", "DeiTForImageClassification", (32, 32), **_SMALL),
           **_plain((4, 4), 2), heads=_HEAD, linears=14, shared=4),
    Family(**_transformers("hf-deit-distilled", "DeiTForImageClassificationWithTeacher", (32, 32), **_SMALL),
           **_plain((4, 4), 2), heads=("cls_classifier", "distillation_classifier"), linears=15, shared=4),
    Family(**_transformers("hf-dinov2", "Dinov2ForImageClassification", (32, 32), **_DINO),
           **_plain((4, 4), 1), heads=_HEAD, linears=14, shared=4),
    Family(**_transformers("hf-dinov2-other-size", "Dinov2Model", (24, 40), backbone=True, **_DINO),
           **_plain((3, 5), 1), heads=(), linears=13, shared=4),
    Family(**_transformers("hf-dinov2-registers", "Dinov2WithRegistersForImageClassification", (32, 32), **_DINO),
           **_plain((4, 4), 5), heads=_HEAD, linears=14, shared=4),
    Family(**_transformers("hf-dinov3", "DINOv3ViTModel", (32, 48), backbone=True,
                           **_SMALL | {"num_register_tokens": 3}), **_plain((4, 6), 4), heads=(), linears=13, shared=4),
    Family(**_transformers("hf-beit", "BeitForImageClassification", (32, 32),
                           **_SMALL | {"use_relative_position_bias": True}),
           **_plain((4, 4), 1), heads=_HEAD, linears=14, shared=4, mask=True),
    Family(**_transformers("hf-swin", "SwinForImageClassification", (32, 32), **_SWIN, image_size=32),
           **_WINDOWS, heads=_HEAD, linears=27, shared=8),
    Family(**_transformers("hf-swin-wide", "SwinModel", (32, 48), backbone=True, **_SWIN, image_size=[32, 48]),
           **_SIX_WINDOWS, heads=(), linears=26, shared=8),
    Family(**_transformers("hf-clip", "CLIPForImageClassification", (32, 32), vision_config=_SMALL, text_config=_TEXT),
           **_plain((4, 4), 1), heads=_HEAD, linears=14, shared=4),
    Family(**_transformers("hf-clip-backbone", "CLIPVisionModel", (32, 32), backbone=True, **_SMALL),
           **_plain((4, 4), 1), heads=(), linears=13, shared=4),
    Family(**_transformers("hf-siglip", "SiglipForImageClassification", (32, 32), vision_config=_SMALL,
                           text_config=_TEXT), **_plain((4, 4), 0), heads=_HEAD, linears=14, shared=4),
    Family(**_transformers("hf-siglip-backbone", "SiglipVisionModel", (32, 32), backbone=True, **_SMALL),
           first=(16, 0, (4, 4), 1, 16), last=(16, 0, (4, 4), 1, 1), heads=(), linears=19, shared=5),
]  # fmt: skip
NAMES = [family.name for family in FAMILIES]
# Those that the matrix of families exports to TensorRT, too.
TO_TENSORRT = ("timm-vit", "timm-siglip", "timm-relpos", "timm-dinov3", "timm-eva02-split", "hf-dinov2", "hf-clip",
               "hf-siglip-backbone")  # fmt: skip


@dataclass(frozen=True)
class Refused:
    """An architecture that is refused when it is read, and a part of what the refusal says."""

    architecture: Architecture
    says: str


def _refused(says: str, parts: dict[str, Any]) -> Refused:
    return Refused(parts["architecture"], says)


_OWN = "of its own, outside nn.Linear and torch's scaled_dot_product_attention"
_STEM = "only patches cut without overlap are read"
REFUSED = {
    "timm-cait": _refused(_OWN, _timm("", "cait_xxs24_224", (32, 32), patch_size=8, depth=1)),
    "timm-sam": _refused(_OWN, _timm("", "samvit_base_patch16", (64, 64))),
    "timm-swinv2": _refused(_OWN, _timm("", "swinv2_tiny_window8_256", (32, 32), embed_dim=16, depths=(1, 1),
                                        num_heads=(2, 4), window_size=4)),
    "timm-differential": _refused("more than one attention in a forward",
                                  _timm("", "vit_dlittle_patch16_reg1_gap_256", (32, 32), patch_size=8)),
    "timm-hybrid": _refused(_STEM, _timm("", "vit_small_r26_s32_224", (64, 64))),
    "timm-xcit": _refused(_STEM, _timm("", "xcit_nano_12_p8_224", (32, 32))),
    "hf-swinv2": _refused(_OWN, _transformers("", "Swinv2ForImageClassification", (32, 32), **_SWIN, image_size=32)),
    "hf-segformer": _refused(_STEM, _transformers("", "SegformerForImageClassification", (64, 64))),
    "hf-ijepa": _refused("expected one vector per image",
                         _transformers("", "IJepaModel", (32, 32), backbone=True, **_SMALL)),
}  # fmt: skip


def family(name: str) -> Family:
    """The family of that name."""
    return next(one for one in FAMILIES if one.name == name)


def build_family(one: Family, seed: int = 0) -> nn.Module:
    """The prepared model with random parameters, every one away from zero and one."""
    model = build(one.architecture)
    randomize(model, seed)
    return model


def vision_family(one: Family, seed: int = 0) -> VisionModel:
    """The same as a loaded `VisionModel`."""
    size = one.architecture.image_size
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(resize=size, crop=size, mean=half, std=half)
    return VisionModel.of(build_family(one, seed).state_dict(), one.architecture, preprocessing, f"family:{one.name}")


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Gives every parameter a random value of a size that keeps activations near one."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if "bias_table" in name:
            parameter.copy_(noise)  # position biases: as large as the logits
        elif parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(max(1, parameter[0].numel())) if "weight" in name else noise * 0.5)
        elif name.endswith(("gamma", "lambda1", "weight")) or "gamma_" in name:
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.2 * noise)


def random_pixels(one: Family, count: int, seed: int = 1) -> Tensor:
    """(count, 3, H, W) standard normal."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *one.architecture.image_size, generator=random)
