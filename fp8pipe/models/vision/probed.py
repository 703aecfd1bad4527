"""A backbone with a linear classifier on top: the class token and the mean of the patches, side by side.

Neither library has this head for every backbone, and it is the strong and cheap one for features that were
learned without labels (DINOv2, arXiv 2304.07193, reports it). The head is an `nn.Linear` of the model like any
other, so it is quantized with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.structure import read_structure

__all__ = ["ClassAndPatches", "token_features"]


class ClassAndPatches(nn.Module):
    """Logits from `Linear([class token, mean of the patches])`; without prefix tokens, from the mean alone.

    Args:
        backbone: prepared by `prepare_model`, without a head of its own.
        image_size: (height, width), pixels: one pass at this size tells prefix tokens and width.
        classes: number of classes.

    Raises:
        ConfigurationError: the backbone gives no tokens, or has a head.
    """

    def __init__(self, backbone: nn.Module, image_size: tuple[int, int], classes: int) -> None:
        super().__init__()
        structure = read_structure(backbone, image_size)
        if structure.heads:
            raise ConfigurationError(
                "a linear probe needs a backbone, and this model has a head",
                why=f"{structure.heads[0]} gives {structure.classes} classes",
                fix="build the model without a head (timm: num_classes=0; transformers: the ...Model class)",
            )
        self.backbone = backbone
        self.prefix_tokens = structure.attentions[-1].prefix_tokens
        self.num_classes = classes
        parameter = next(backbone.parameters())
        with torch.no_grad():
            features = self.features(torch.zeros(1, 3, *image_size, dtype=parameter.dtype, device=parameter.device))
        self.head = nn.Linear(features.shape[-1], classes)

    def features(self, pixels: Tensor) -> Tensor:
        """What the head reads: (N, 3, H, W) -> (N, 2 x width), or (N, width) without prefix tokens."""
        tokens = token_features(self.backbone, pixels)
        mean = tokens[:, self.prefix_tokens :].mean(dim=1)
        return torch.cat((tokens[:, 0], mean), dim=-1) if self.prefix_tokens else mean

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, classes)."""
        return self.head(self.features(pixels))


def token_features(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """The tokens after the last block and norm: (N, tokens, width), prefix tokens first.

    Raises:
        ConfigurationError: the backbone does not give them.
    """
    tokens: Any
    forward: Any = getattr(backbone, "forward_features", None)  # timm
    if forward is not None:
        tokens = forward(pixels)
        if isinstance(tokens, Tensor) and tokens.ndim == 4:  # Swin: (N, rows, columns, width)
            tokens = tokens.flatten(1, 2)
    else:
        tokens = getattr(backbone(pixels), "last_hidden_state", None)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        raise ConfigurationError(
            f"{type(backbone).__name__} does not give its tokens",
            why="neither forward_features nor last_hidden_state holds (N, tokens, width)",
            fix="use a vision transformer backbone of timm or transformers",
        )
    return tokens
