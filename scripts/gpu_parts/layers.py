"""FALQON layers with random weights, identical on the CPU and on a device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3, quantize
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.layer import FalqonLinear


@dataclass(frozen=True, slots=True)
class Case:
    """The shape of a layer, its variant, and the number of input tokens.

    Attributes:
        form: name of the variant, from `FORMS`.
        live: whether the forward pass adds `B A x` to the output.
        rule: how scales are computed.
        trains_a: whether A is trained, too.
        out: output features.
        into: input features.
        rank: rank of A and B.
        tokens: number of input tokens.
    """

    form: str
    live: bool
    rule: ScaleRule
    trains_a: bool
    out: int
    into: int
    rank: int
    tokens: int

    @property
    def name(self) -> str:
        """A readable description of the layer."""
        return f"{self.form}, {self.into} to {self.out}, rank {self.rank}, {self.tokens} tokens"


FORMS: Final = (
    ("live", True, ScaleRule.POWER_OF_TWO, False),
    ("live-both", True, ScaleRule.POWER_OF_TWO, True),
    ("released", False, ScaleRule.EXACT, False),
    ("merged", False, ScaleRule.POWER_OF_TWO, False),
)
# (out, into, rank, tokens). FP8 GEMMs need widths that are multiples of 16; `_ODD` has none, to check padding.
_ALIGNED, _ODD, _WIDE = (192, 256, 16, 64), (50, 36, 7, 13), (4096, 4096, 64, 256)


def cases(tiny: bool) -> list[Case]:
    """The layers to check; without `tiny`, they include layers as wide as those of LLaMA-7B."""
    shapes = (_ALIGNED, _ODD) if tiny else (_ALIGNED, _ODD, _WIDE)
    return [Case(*form, *shape) for shape in shapes for form in FORMS]


def make(case: Case, seed: int = 0) -> tuple[FalqonLinear, Tensor, Tensor]:
    """A layer on the CPU with Gaussian weights, A and B; its input; and the gradient of its output.

    Both are bf16, `(tokens, into)` and `(tokens, out)`, and their tokens differ in magnitude.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    stacked = torch.cat([0.02 * normal(case.out, case.into), 0.005 * normal(case.rank, case.into)])
    codes, scale = quantize(stacked, E4M3, case.rule)
    layer = FalqonLinear(codes, scale, rank=case.rank, live=case.live, trains_a=case.trains_a)
    layer.lora_B.data = 0.02 * normal(case.out, case.rank)
    x, grad = (normal(case.tokens, width) * normal(case.tokens, 1).exp() for width in (case.into, case.out))
    return layer, x.bfloat16(), (1e-3 * grad).bfloat16()


def moved(layer: FalqonLinear, device: torch.device) -> FalqonLinear:
    """A copy of the layer on a device."""
    return copy.deepcopy(layer).to(device)


def exact_updates(layer: FalqonLinear, seed: int = 0) -> None:
    """Set the elements of B to -1/2, 0 or 1/2, so that `B codes(A)` is exact in fp32 in any summation order.

    A's codes are multiples of 2^-9 up to 448, so with a rank of at most 64 the sums are multiples of 2^-10 below 2^14.
    """
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-1, 2, layer.lora_B.shape, generator=random).float() / 2
    layer.lora_B.data.copy_(drawn)


def codes_differing(one: FalqonLinear, other: FalqonLinear) -> int:
    """Number of codes whose bytes differ between two layers of the same shape."""
    return int((one.codes.cpu().view(torch.uint8) != other.codes.cpu().view(torch.uint8)).sum())
