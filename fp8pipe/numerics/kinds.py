"""Number formats by their names in configurations, command lines and manifests; this module does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from fp8pipe.core.errors import ConfigurationError

# (rows, columns) of the blocks that share a scale in FP8 checkpoints; vLLM's kernels take no other size.
FP8_BLOCK: Final = (128, 128)
NVFP4_BLOCK: Final = 16  # elements along the input dimension that share a scale in NVFP4


class ScaleRule(StrEnum):
    """How FP8 scales are derived from the largest magnitude (amax), see `grids`.

    With `exact`, activations have one scale per tensor, with `power-of-two` one per token.
    """

    EXACT = "exact"
    POWER_OF_TWO = "power-of-two"


class Kind(StrEnum):
    """The number format of codes."""

    INT = "int"
    E4M3 = "e4m3"
    NVFP4 = "nvfp4"


def granularity(kind: Kind) -> Literal["per-channel", "per-block"]:
    """The granularity of a weight's scales for codes of this kind, as named in manifests."""
    return "per-block" if kind is Kind.NVFP4 else "per-channel"


# For the floating-point kinds: the name of the precision on the command line, and the number of bits.
_FLOATING: Final = {Kind.E4M3: ("wfp8afp8", 8), Kind.NVFP4: ("wnvfp4anvfp4", 4)}


@dataclass(frozen=True, slots=True)
class Precision:
    """The precision of weights and activations, written as `w4a8`, `wfp8afp8` or `wnvfp4anvfp4`."""

    weight_bits: int  # 2 to 8
    activation_bits: int  # 2 to 8
    kind: Kind = Kind.INT  # integer, E4M3 or NVFP4, for weights and activations alike

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Parse a precision written as `wXaY` (X bits for weights, Y for activations), `wfp8afp8` or `wnvfp4anvfp4`.

        Raises:
            ConfigurationError: the text has another form, or a number of bits is not from 2 to 8.
        """
        for kind, (name, bits) in _FLOATING.items():
            if text.lower() == name:
                return cls(bits, bits, kind)
        match = re.fullmatch(r"w(\d+)a(\d+)", text.lower())
        if match is None:
            raise ConfigurationError(
                f"{text!r} is not a precision",
                why="it is written wXaY: X bits for weights, Y bits for activations",
                fix="use for instance w4a4, w4a8, w8a8, wfp8afp8 for FP8 (E4M3), or wnvfp4anvfp4",
            )
        weights, activations = int(match[1]), int(match[2])
        if not (2 <= weights <= 8 and 2 <= activations <= 8):
            raise ConfigurationError(
                f"{text} is outside the integer grids",
                why="weights and activations have 2 to 8 bits each",
                fix="use w2a2 to w8a8, wfp8afp8, or wnvfp4anvfp4",
            )
        return cls(weights, activations)

    def __str__(self) -> str:
        found = _FLOATING.get(self.kind)
        return f"w{self.weight_bits}a{self.activation_bits}" if found is None else found[0]
