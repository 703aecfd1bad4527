"""One random stream per image: what an image becomes depends on the seed and its number, not on its batch."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def image_stream(seed: int, image: int, attempt: int = 0) -> torch.Generator:
    """The generator of image number `image`; `attempt` counts its restarts."""
    digest = hashlib.sha256(f"{seed} {image} {attempt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(streams: list[torch.Generator], *shape: int) -> Tensor:
    """Standard normal values, `(len(streams), *shape)`."""
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams])


def uniform(streams: list[torch.Generator], *shape: int) -> Tensor:
    """Uniform values in [0, 1), `(len(streams), *shape)`."""
    return torch.stack([torch.rand(shape, generator=stream) for stream in streams])
