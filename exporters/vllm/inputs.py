"""Scales of inputs in NVFP4 (W4A4): measured on text, written beside the weights, and compared.

An engine rounds each block of 16 neighbouring features of a token to E2M1, with an E4M3 scale that it computes. What it
cannot compute is the global scale of a layer's inputs, which it multiplies into every block scale: that follows from
the largest magnitude in calibration. The checkpoint stores its reciprocal, `LAYER.input_global_scale`, or in ModelOpt's
layout the scale itself, `LAYER.input_scale`; vLLM takes the largest number of the layers that it fuses. As for weights
it is a power of two, with room for twice the largest magnitude seen: so a layer that is doubled by other text does not
saturate, and the products of codes and scales are exact. That room costs no precision, since block scales have 14
binades of normal numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from exporters.text import read_text
from exporters.vllm.blocks import blocks_of
from exporters.vllm.nvfp4 import fused_units, unfit, value_rows
from exporters.vllm.plan import ExportPlan, Unit
from exporters.vllm.reopen_files import none_differing
from exporters.vllm.target import CalibrationFacts
from fp8pipe.artifact import MANIFEST_NAME, Gate, open_artifact
from fp8pipe.artifact.finding import Finding, refuse
from fp8pipe.models.checkpoint.rows import each, read_rows
from fp8pipe.models.checkpoint.tensors import TensorEntry, read_tensor
from fp8pipe.models.language.parts import PartedModel, StoredWeights
from fp8pipe.numerics.nvfp4_weights import global_scale
from fp8pipe.numerics.plain_nvfp4 import global_scale_plain

__all__ = ["Text", "input_findings", "inputs_gate", "measured", "read_calibration", "with_inputs"]

_WRITE_AGAIN: Final = "export the model again"


Text = tuple[CalibrationFacts, list[list[int]]]  # a description of it, and the token ids of its records


def read_calibration(plan: ExportPlan) -> Text | None:
    """Read and tokenize the text of an export whose inputs are calibrated; None if they are not.

    See `read_text`, also for its errors. Records that were held out in training are not used.
    """
    options, root = plan.options, plan.source.root
    if not options.format.calibrated:
        return None
    tuned = open_artifact(root, verify=False) if (root / MANIFEST_NAME).is_file() else None
    otherwise = ", or export with --format nvfp4, which leaves inputs as they are"
    found = read_text(
        root, tuned, options.calibration_data, options.calibration_records, heldout=False, otherwise=otherwise
    )
    return found.facts, [list(one.input_ids) for one in found.calibration]


def measured(plan: ExportPlan, text: Text) -> ExportPlan:
    """The plan with scales of inputs, from the largest magnitudes when the source's weights run on a text, in fp32.

    One part of the weights is in memory at a time, and each part is read once.

    Raises:
        LintFindingsError: an input is not finite, was never computed, or is too large for NVFP4 (`input-range`).
    """
    facts, sequences = text
    units = {unit.entry.name: unit for unit in plan.units}
    weights = StoredWeights({name: unit.entry for name, unit in units.items()}, lambda name: _values(units[name]))
    parted = PartedModel(plan.source.root, weights)
    amax: dict[str, float] = {}
    modules = dict(parted.model.named_modules())
    for unit in (unit for unit in units.values() if unit.packed):
        modules[unit.module or ""].register_forward_pre_hook(partial(_observe, amax, unit.entry.name))
    body: Any = getattr(parted.model, "base_model", parted.model)  # the output head is not quantized

    @torch.inference_mode()
    def run(ids: list[int]) -> Tensor:
        body(input_ids=torch.tensor([ids]), use_cache=False)
        return torch.empty(0)

    parted.run([partial(run, ids) for ids in sequences])
    return with_inputs(plan, {name: amax.get(name, math.nan) for name, unit in units.items() if unit.packed}, facts)


def with_inputs(plan: ExportPlan, amax: Mapping[str, float], facts: CalibrationFacts | None) -> ExportPlan:
    """The plan with the scales that follow from the largest magnitudes by weight; layers that are fused share one.

    Raises:
        LintFindingsError: see `measured`.
    """
    scales: dict[str, float] = {}
    findings = []
    for group in fused_units(plan):
        worst = max((unit.entry.name for unit in group), key=lambda name: _order(amax.get(name, math.nan)))
        try:
            stored = plan.layout.stored(global_scale(amax.get(worst, math.nan)))
        except ValueError as error:
            why = f"its inputs in calibration: {str(error).removeprefix('weights ')}"
            findings.append(Finding("input-range", worst, why, "export with --format nvfp4, or fp8"))
            continue
        scales |= {plan.layout.input_name(unit.entry.name): stored for unit in group}
    refuse(findings, str(plan.source.root))
    return replace(plan, inputs=dict(amax), input_scales=scales, calibration=facts)


def inputs_gate(plan: ExportPlan, written: Mapping[str, TensorEntry]) -> Gate:
    """Gate: every stored scale follows from the largest magnitude of the layers that the engine fuses, bit for bit."""
    wrong = []
    for group in fused_units(plan):
        largest = max(plan.inputs.get(unit.entry.name, math.inf) for unit in group)
        scale = global_scale_plain(largest) if math.isfinite(largest) else math.nan
        expected = 1.0 / scale if plan.layout.divides else scale
        names = (plan.layout.input_name(unit.entry.name) for unit in group)
        wrong += [name for name in names if name not in written or _stored(plan, written[name]) != expected]
    return none_differing("input-scales", wrong, f"{len(plan.input_names)} scale(s) of inputs, by what calibration saw")


def input_findings(plan: ExportPlan, written: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    """Findings about the scales of inputs in a checkpoint, from the files alone: missing, no scale, or unequal."""
    for name in sorted(plan.input_names):
        if name not in written:
            yield Finding("missing-input-scale", name, "the format declares it, and the files lack it", _WRITE_AGAIN)
            continue
        if why := unfit(_stored(plan, written[name]), plan.layout):
            yield Finding("input-scale", name, why, _WRITE_AGAIN)
    for group in fused_units(plan):
        by_value: dict[float, list[str]] = defaultdict(list)
        names = [plan.layout.input_name(unit.entry.name) for unit in group]
        for name in (name for name in names if name in written):
            by_value[_stored(plan, written[name])].append(name)
        if len(by_value) > 1:
            said = ", ".join(f"{name} {number:g}" for number, same in by_value.items() for name in same)
            why = f"the engine fuses these layers and uses the largest scale for the inputs of all: {said}"
            yield Finding("fused-input-scale", next(iter(by_value.values()))[0], why, _WRITE_AGAIN)


def _values(unit: Unit) -> Iterator[Tensor]:
    """The source's values of a weight, fp32, in blocks of rows."""

    def block(rows: range) -> Tensor:
        values = value_rows(unit, rows, read_rows(unit.entry, rows))
        return values.float() if values.is_floating_point() else values

    return each(block, blocks_of(unit))


def _observe(amax: dict[str, float], name: str, module: Any, args: tuple[Tensor, ...]) -> None:
    amax[name] = max(float(args[0].abs().max()), amax.get(name, 0.0), key=_order)


def _order(value: float) -> tuple[bool, float]:
    """Sorts NaN above every number."""
    return math.isnan(value), value


def _stored(plan: ExportPlan, entry: TensorEntry) -> float:
    """The stored number; NaN for a tensor of another dtype or shape."""
    return float(read_tensor(entry)) if entry.dtype == "F32" and entry.shape == plan.layout.shape else math.nan
