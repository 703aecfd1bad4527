"""Report on the kernels of quantized layers in the serving engine: stored weights, input quantization and GEMM errors.

The probe returns its findings for each layer; this module compares them with what the serving options and the
checkpoint require.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field

from fp8pipe.artifact import Comparison, Gate
from fp8pipe.artifact.gate import none_of
from fp8pipe.core.config import FrozenConfig

__all__ = ["KernelReport", "kernel_report"]


class KernelReport(FrozenConfig):
    """Findings on the kernels of quantized layers. Each layer was run on test inputs; a fused layer counts once."""

    layers: int = Field(ge=0, description="layers of the engine with quantized weights")
    kernels: dict[str, int] = Field(description="number of layers by class of their kernel")
    devices: dict[str, int] = Field(description="number of layers by device of their weight")
    holds: dict[str, int] = Field(
        description="number of layers by what they store: FP8 codes, codes in the kernel's own order, or numbers"
    )
    rounding: int = Field(
        ge=0, description="layers whose outputs are those of inputs rounded to E4M3, one scale per token, or to NVFP4"
    )
    codes: int = Field(ge=0, description="number of codes of inputs that could be read from kernels")
    codes_differing: int = Field(ge=0, description="number of those codes that differ from the expected ones")
    ways: dict[str, int] = Field(
        description="number of layers by how their kernel computes codes of inputs, where these could be read"
    )
    worst_product: float = Field(
        description="largest error of an output, relative to its bound; NaN if one is not finite"
    )
    worst_layer: str = Field(description="layer with that error")
    not_examined: list[str] = Field(description="quantized tensors that belong to no examined layer")
    other_holding: list[str] = Field(description="layers that do not store what these serving settings require")
    other_rounding: list[str] = Field(description="layers that round their inputs but should not, or should but do not")
    other_codes: list[str] = Field(description="layers with differing codes of inputs")

    @property
    def packed(self) -> bool:
        """Whether the kernel of any layer stores its codes in a packed layout that cannot be read as bytes."""
        return self.holds.get("packed", 0) > 0

    @property
    def gates(self) -> list[Gate]:
        """The gates on these results."""
        worst = f"relative to the kernel's error bound; in {self.worst_layer}, the worst of {self.layers} layers"
        return [
            none_of("quantized tensors in no examined layer, as served", len(self.not_examined),
                    _first(self.not_examined)),
            none_of("layers that hold another thing than their form, as served", len(self.other_holding),
                    _first(self.other_holding)),
            none_of("layers that round inputs otherwise than their form, as served", len(self.other_rounding),
                    _first(self.other_rounding)),
            none_of("codes of activations differing, as served", self.codes_differing,
                    f"of {self.codes}" + (f"; in {_first(self.other_codes)}" if self.other_codes else "")),
            Gate(name="error of products, as served", value=self.worst_product, comparison=Comparison.AT_MOST,
                 threshold=1.0, detail=worst),
        ]  # fmt: skip


def kernel_report(
    found: Mapping[str, Mapping[str, Any]], quantized: Collection[str], rounded: Collection[str], *, codes: bool
) -> KernelReport:
    """Compare the findings of the probe with what the serving options require.

    Args:
        found: the findings by the layer's name in the engine (`readback.Reading.layers`).
        quantized: checkpoint names of all quantized weights.
        rounded: names of the weights in layers that must quantize their inputs with these serving options.
        codes: whether layers must store FP8 codes; otherwise they must store dequantized weights.
    """
    counts = {key: Counter(str(layer[key]) for layer in found.values()) for key in ("kernel", "device", "holds")}
    holding, rounding, differing, errors, rounds = [], [], [], [("", 0.0)], 0
    for name, layer in found.items():
        called = f"{name} ({layer['kernel']})"
        if codes == (layer["holds"] == "numbers"):
            holding.append(f"{called} holds {layer['holds']}, not {'FP8 codes' if codes else 'numbers'}")
        as_rounded, as_plain = float(layer["error_rounded"]), float(layer["error_plain"])
        wanted, other = (as_rounded, as_plain) if set(layer["tensors"]) <= set(rounded) else (as_plain, as_rounded)
        rounds += as_rounded < as_plain
        if not wanted <= 1 and other <= 1:
            rounding.append(f"inputs of {called} are {'not ' if other == as_plain else ''}rounded")
        errors.append((called, wanted if wanted <= 1 or not other <= 1 else other))
        if layer["codes_differing"]:
            differing.append(f"{called}, closest to {layer['rounding']}")
    worst = max(errors, key=lambda error: (error[1] != error[1], error[1]))  # NaN is the worst
    return KernelReport(
        layers=len(found), kernels=counts["kernel"], devices=counts["device"], holds=counts["holds"], rounding=rounds,
        codes=sum(layer["codes"] for layer in found.values()),
        codes_differing=sum(layer["codes_differing"] for layer in found.values()),
        ways=Counter(layer["rounding"] for layer in found.values() if layer["rounding"]),
        worst_product=worst[1], worst_layer=worst[0],
        not_examined=sorted(set(quantized) - {tensor for layer in found.values() for tensor in layer["tensors"]}),
        other_holding=holding, other_rounding=rounding, other_codes=differing,
    )  # fmt: skip


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
