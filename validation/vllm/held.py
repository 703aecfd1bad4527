"""One tensor that the engine should have, in the forms in which engines store it, with its digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from fp8pipe.models.checkpoint.packed import COMPRESSED_TENSORS, PackedLayout
from fp8pipe.models.checkpoint.tensors import SCALE_SUFFIX
from fp8pipe.numerics.blocks import spread_scale
from fp8pipe.numerics.grids import same_bits
from fp8pipe.numerics.plain import grid_numbers
from fp8pipe.numerics.plain_nvfp4 import nearest_e2m1

__all__ = ["Expected", "Holding"]

_PIECE: Final = 1 << 20  # elements that are processed together


@dataclass(frozen=True, slots=True)
class Holding:
    """How an engine stores weights.

    Attributes:
        dtype: the compute dtype; unquantized and dequantized weights are rounded to it once.
        codes: whether quantized weights are stored as codes and scales, or dequantized.
    """

    dtype: torch.dtype
    codes: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """One tensor with its expected value.

    Attributes:
        name: name in the checkpoint.
        value: fp32, in the stored orientation.
        scale: fp32, dequantized = code * scale, broadcastable to `value`, or one per block; None for unquantized
            tensors.
        transposed: whether it is stored as `(in, out)`; the engine has `(out, in)`.
        products: for codes, the digests of the values that a GEMM with one-hot inputs may return for this weight.
        scale_shape: shape of the stored scales; engines have `(1, rows)` if they are stored so, else `(rows, 1)`.
        wide: whether engines keep it in fp32 whatever their dtype: a scale of the key/value cache.
        block: (rows, columns) of the blocks that share a scale, if scales are per block.
        divisor: for a weight in NVFP4, the reciprocal of its global scale; `scale` is the product of both scales.
        layout: how the checkpoint stores such a weight; None for others.
    """

    name: str
    value: Tensor
    scale: Tensor | None
    transposed: bool
    products: tuple[str, ...] = ()
    scale_shape: tuple[int, ...] | None = None
    wide: bool = False
    block: tuple[int, int] | None = None
    divisor: float | None = None
    layout: PackedLayout | None = None

    def numbers(self, values: Tensor) -> Tensor:
        """Values divided by the scale and rounded to numbers that have codes, fp32: those of the expected values."""
        quotients = values / self._factor
        return grid_numbers(quotients) if self.divisor is None else nearest_e2m1(quotients)

    @property
    def _factor(self) -> Tensor:
        """The scale, broadcastable to `value`."""
        if self.scale is None:
            return torch.ones(())
        return self.scale if self.block is None else spread_scale(self.scale, self.block, self.value.shape)

    def held(self, holding: Holding) -> list[Expected]:
        """The tensors that an engine stores for it: the weight rounded once, or codes and their scales.

        Values are fp32, also those of codes and of rounded weights.
        """
        if self.wide:
            return [self]
        if self.scale is None or not holding.codes:
            return [replace(self, value=_rounded(self.value, holding.dtype))]
        codes, factor = self.numbers(self.value), self._factor
        rows = codes.shape[1 if self.transposed else 0]
        # Kernels with packed codes multiply by the scale in fp32, or by the scale rounded to their dtype.
        scales = (factor, factor.to(holding.dtype).float())
        products = tuple(dict.fromkeys(_unsigned((codes * scale).to(holding.dtype).float()) for scale in scales))
        held = replace(self, value=codes, scale=torch.ones(()), products=products, block=None, divisor=None)
        if self.divisor is not None and self.layout is not None:
            whole = torch.full(self.layout.shape, self.layout.stored(COMPRESSED_TENSORS.stored(self.divisor)))
            parts = {self.layout.blocks: self.scale * self.divisor, self.layout.whole: whole}
            return [held, *(Expected(self.name + suffix, part, None, False) for suffix, part in parts.items())]
        scale = self.scale
        if self.block is None:
            shape = (1, rows) if self.scale_shape == (1, rows) else (rows, 1)
            scale = scale.reshape(-1, 1).expand(rows, 1).reshape(shape).contiguous()
        return [held, Expected(self.name + SCALE_SUFFIX, scale, None, False)]

    def digests(self) -> dict[str, Any]:
        """Shape, orientation, sha256 of the fp32 bytes, and sha256 of the same with every -0 replaced by +0."""
        value = self.value.contiguous()
        found: dict[str, Any] = {
            "shape": list(value.shape),
            "transposed": self.transposed,
            "quantized": self.scale is not None,
            "sha256": hashlib.sha256(value.numpy().data).hexdigest(),
            "sha256_unsigned_zero": _unsigned(value),
        }
        return found | ({"products": list(self.products)} if self.products else {})


def _unsigned(value: Tensor) -> str:
    """sha256 of the bytes with every -0 replaced by +0."""
    found = hashlib.sha256()
    for part in _pieces(value):
        found.update((part + 0.0).numpy().data)
    return found.hexdigest()


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a dtype, as fp32; the tensor itself if that changes no bit, since a copy may have gigabytes."""
    if all(same_bits(part, part.to(dtype).float()) for part in _pieces(value)):
        return value
    return value.to(dtype).float()


def _pieces(value: Tensor) -> Iterable[Tensor]:
    pieces: tuple[Tensor, ...] = value.reshape(-1).split(_PIECE)
    return pieces
