"""Which tokens of an attention are patches, and how they lie."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from fp8pipe.core.errors import ConfigurationError

__all__ = ["token_layout"]


def token_layout(
    name: str, module: nn.Module, tokens: int, windows: int, patch_grid: tuple[int, int]
) -> tuple[int, tuple[int, int]]:
    """Prefix tokens, and the grid of the others.

    A global attention over at least as many tokens as there are patches has the rest in front of them. One
    over fewer tokens, or in windows, has patches (merged ones in later stages) alone.

    Args:
        name: the attention, for the message.
        module: the attention; its `window_size` tells the sides of a window that is no square.
        tokens: keys of the attention.
        windows: attentions an image takes.
        patch_grid: (rows, columns) of the patch embedding.

    Returns:
        The prefix tokens, and (rows, columns) of the others.

    Raises:
        ConfigurationError: the tokens are no square, and the module does not say what else.
    """
    area = patch_grid[0] * patch_grid[1]
    if windows == 1 and tokens >= area:
        return tokens - area, patch_grid
    said = _window_size(module)
    if said is not None and said[0] * said[1] == tokens:
        return 0, said
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConfigurationError(
            f"the windows of the attention {name} cannot be read",
            why=f"{tokens} tokens are no square, and the module does not name its window",
            fix="choose an image size that gives square windows",
        )
    return 0, (side, side)


def _window_size(module: nn.Module) -> tuple[int, int] | None:
    size: Any = getattr(module, "window_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return int(size[0]), int(size[1])
    return None
