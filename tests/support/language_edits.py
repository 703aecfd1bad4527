"""Edits of language artifacts for tests."""

from __future__ import annotations

import torch


def even(tensors: dict[str, torch.Tensor]) -> None:
    """One scale for all layers, as joined ones that were trained have; a power of two."""
    for name in [n for n in tensors if n.endswith("weight_scale")]:
        weight = name.removesuffix("_scale")
        values = tensors[weight].float() * tensors[name]
        tensors[name] = torch.tensor(2.0**-11)
        tensors[weight] = (values / tensors[name]).to(torch.float8_e4m3fn)


def uneven(tensors: dict[str, torch.Tensor]) -> None:
    """Scales as the default rule trains them, but those of what leaves a block twice as large: no two kinds alike."""
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        weight = name.removesuffix("_scale")
        factor = 2.0 if ".o_proj." in name else 1.0
        scale = torch.exp2(torch.ceil(torch.log2(tensors[name]))) * factor
        values = tensors[weight].float() * tensors[name]
        tensors[name], tensors[weight] = scale, (values / scale).to(torch.float8_e4m3fn)
