"""What a trained layer stores of its base weight, and what the manifest says of what is deployed, by precision."""

from __future__ import annotations

from torch import Tensor

from fp8pipe.artifact import Encoding
from fp8pipe.artifact import ScaleRule as Rule
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.structure import ModelStructure
from fp8pipe.numerics.grids import E4M3, Scale, quantize_stacked
from fp8pipe.numerics.kinds import ScaleRule
from fp8pipe.numerics.nvfp4 import BLOCK
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.rules import FinalMerge, UpdateRule


def form_of(precision: str | None, rule: UpdateRule) -> Fp8Form:
    """The form of the precision `fp8` or `nvfp4`, for an update rule."""
    return Nvfp4Form(rule) if precision == "nvfp4" else Fp8Form(rule)


class Fp8Form:
    """E4M3 codes of W and A with one scale.

    Args:
        rule: the update rule.
    """

    def __init__(self, rule: UpdateRule) -> None:
        self._rule = rule

    def check(self, structure: ModelStructure) -> None:
        """Refuse a model whose trained layers cannot be stored in the format; every one can in FP8.

        Raises:
            ConfigurationError: it is refused.
        """

    def code_bytes(self, rows: int, width: int, rank: int) -> int:
        """Bytes that `quantize` returns for a weight `(rows, width)` and an A of that rank."""
        return (rows + rank) * width

    def quantize(self, weight: Tensor, a: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight, `(rows, width)`, and of its A, `(rank, width)` fp32.

        W and A share one scale; A's values are far smaller, so W gets the same codes as if quantized alone.
        """
        codes, scale = quantize_stacked([weight, a], E4M3, self._rule.scale)
        inverse = {} if scale.inverse_scale is None else {"inverse_scale": scale.inverse_scale}
        return {"codes": codes, "scale": scale.value, **inverse}

    def layer(self, found: dict[str, Tensor], rank: int, parts: tuple[int, ...], bias: Tensor | None) -> FalqonLinear:
        """The layer on the tensors that `quantize` returned."""
        scale = Scale(found["scale"], found.get("inverse_scale"))
        how = {"live": self._rule.live, "trains_a": self._rule.trains_a}
        return FalqonLinear(found["codes"], scale, rank=rank, parts=parts, bias=bias, **how)

    def encodings(self) -> tuple[Encoding, Encoding | None]:
        """How deployed weights and their inputs are quantized: with one scale; inputs dynamically."""
        tensorwise = self._rule.scale is ScaleRule.EXACT
        rule = Rule.AMAX if tensorwise else Rule.POWER_OF_TWO
        weight = Encoding(format="e4m3", bits=8, granularity="per-tensor", scale_rule=rule)
        given = {"dynamic": True, "granularity": "per-tensor" if tensorwise else "per-token"}
        return weight, weight.model_copy(update=given)


class Nvfp4Form(Fp8Form):
    """E4M3 codes while B is trained, as in `Fp8Form`; the final merge writes NVFP4.

    Args:
        rule: the update rule.
    """

    def check(self, structure: ModelStructure) -> None:
        """Refuse layers that no export in NVFP4 could write.

        Raises:
            ConfigurationError: an expert, a weight stored as (in, out), or a side that is no multiple of 16.
        """
        for name in structure.trainable:
            shape = structure.shape(name)
            why = (
                "it is an expert, and experts are not exported in NVFP4" if structure.is_expert(name)
                else "its weight is stored as (in, out), for which engines have no block scales"
                if structure.transposed(name)
                else f"its weight is {shape}, and kernels need multiples of {BLOCK}" if any(n % BLOCK for n in shape)
                else None
            )  # fmt: skip
            if why is not None:
                raise ConfigurationError(
                    f"{structure.architecture} cannot be trained in NVFP4", why=f"{name}: {why}",
                    fix="use --precision fp8",
                )  # fmt: skip

    def encodings(self) -> tuple[Encoding, Encoding | None]:
        """Blocks of 16, with scales that the merge chooses by the error of outputs; inputs stay as they are."""
        rule = Rule.CALIBRATED if self._rule.final is FinalMerge.COMPENSATED else Rule.AMAX
        return Encoding(format="nvfp4", bits=4, granularity="per-block", scale_rule=rule), None
