"""Layer records of a quantized vision transformer, made from its codes and quantizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from fp8pipe.artifact.manifest import Encoding, LayerRecord, ScaleRule
from fp8pipe.models.vision.quantized import Codes, QuantizedVit, Quantizer
from fp8pipe.numerics.kinds import Kind, granularity
from fp8pipe.numerics.nvfp4 import BlockQuantizer

_FORMATS: Final[dict[Kind, Literal["int", "e4m3", "nvfp4"]]] = {
    Kind.INT: "int", Kind.E4M3: "e4m3", Kind.NVFP4: "nvfp4",
}  # fmt: skip


def layer_records(
    quantized: QuantizedVit,
    source: Sequence[LayerRecord] = (),
    rule: ScaleRule | None = None,
    *,
    activations: bool = True,
) -> list[LayerRecord]:
    """One record per linear layer.

    Args:
        quantized: the model.
        source: records of the artifact that it was read from; where scales come from is taken from there.
        rule: where scales come from, for layers that `source` does not have.
        activations: whether inputs are quantized.
    """
    known = {record.name: record for record in source}
    records = []
    for site in quantized.structure.linears:
        weight = quantized.weights.get(site.name)
        quantizer = quantized.activations.get(f"{site.input_group}.input") if activations else None
        before = known.get(site.name)
        rules = [
            e.scale_rule if e is not None else rule
            for e in ((before.weight, before.activation) if before else (None, None))
        ]
        records.append(
            LayerRecord(
                name=site.name, shape=site.shape, reason="" if weight is not None else "no codes in the artifact",
                weight=None if weight is None else _weight(weight, rules[0]),
                activation=None if quantizer is None else _activation(quantizer, rules[1]),
            )
        )  # fmt: skip
    return records


def _weight(weight: Codes, rule: ScaleRule | None) -> Encoding:
    return Encoding(
        format=_FORMATS[weight.kind], bits=weight.bits, granularity=granularity(weight.kind), scale_rule=rule
    )


def _activation(quantizer: Quantizer, rule: ScaleRule | None) -> Encoding:
    if isinstance(quantizer, BlockQuantizer):  # block scales follow from each input; the scale of the tensor is stored
        return Encoding(format="nvfp4", bits=4, granularity="per-block", scale_rule=rule, dynamic=True)
    bits = 8 if quantizer.kind is Kind.E4M3 else (quantizer.levels - 1).bit_length()
    return Encoding(format=_FORMATS[quantizer.kind], bits=max(2, bits), granularity="per-tensor", scale_rule=rule)
