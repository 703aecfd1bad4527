"""Checks that a model is a plain vision transformer, by looking at its convolutions; the model is not run."""

from __future__ import annotations

from typing import Final

from torch import nn

from fp8pipe.core.errors import ConfigurationError

__all__ = ["check_plain", "cuts_without_overlap"]

_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELS: Final = 3
_FIX: Final = "use a plain vision transformer, such as ViT, DeiT, BEiT, EVA, DINOv2, CLIP, SigLIP or Swin"


def check_plain(model: nn.Module, name: str) -> None:
    """Reject a model unless its only convolution is a patch embedding of RGB images.

    Args:
        model: the model.
        name: the model's name in error messages.

    Raises:
        ConfigurationError: there is no convolution or more than one, or its patches overlap, or it does not have three
            input channels.
    """
    found = [(place, module) for place, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)]
    beside = [(place, module) for place, module in found if not cuts_without_overlap(module)] or found[1:]
    if beside:
        place, module = beside[0]
        raise ConfigurationError(
            f"{name} is not a plain vision transformer",
            why=f"{place} is {module}, one of {len(found)} convolutions; the only one that is quantized is a patch "
            "embedding that cuts the image without overlap",
            fix=_FIX,
        )
    if not found:
        raise ConfigurationError(
            f"{name} is not a plain vision transformer", why="no convolution cuts images into patches", fix=_FIX
        )
    for place, module in found:
        if module.in_channels != _CHANNELS:
            raise ConfigurationError(
                f"{name} reads images of {module.in_channels} channel(s), and only three are supported",
                why=f"its patch embedding {place} has {module.in_channels}, and pictures are prepared as RGB",
                fix="use a model for RGB images; to convert a model for grey images, repeat the weights of its patch "
                "embedding for three channels and divide them by three",
            )


def cuts_without_overlap(module: nn.Module) -> bool:
    """Whether a module is a convolution that turns non-overlapping patches into tokens."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride
        and module.groups == 1
        and set(module.dilation) == {1}
        and module.padding in {(0, 0), "valid"}
    )
