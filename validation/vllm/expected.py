"""The weights that the engine should have: every tensor of an export with its digests, one in memory at a time.

The expected values are computed from the source of the export by an independent implementation (`reopen`), so that a
wrong number is detected even if the export's manifest was rewritten to match it. Without the source, the values are
read from the export itself, which proves only that the engine reads the files correctly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from exporters.vllm.blocks import blocks_of, scale_of
from exporters.vllm.export import plan_export
from exporters.vllm.kv_cache import is_kv_scale
from exporters.vllm.nvfp4 import stored_layout, with_global_scales
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import Action, ExportPlan, Unit
from exporters.vllm.reopen import BF16_ERROR_BOUND, E4M3_ERROR_BOUND, expected_blocks, source_values
from exporters.vllm.reopen_nvfp4 import NVFP4_ERROR_BOUND, rounded
from exporters.vllm.target import VllmDetails
from exporters.vllm.verify import with_known_inputs
from fp8pipe.artifact import Artifact
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.names import ModelName
from fp8pipe.models.checkpoint.packed import COMPRESSED_TENSORS, PackedEntry, join_packed
from fp8pipe.models.checkpoint.rows import read_rows
from fp8pipe.models.checkpoint.stacks import ExpertEntry, split_stacks
from fp8pipe.models.checkpoint.tensors import SCALE_SUFFIX, is_scale, read_tensor, weight_entries
from fp8pipe.models.language.parts import StoredWeights
from fp8pipe.models.language.structure import ModelStructure, read_structure
from fp8pipe.numerics.blocks import block_grid
from fp8pipe.numerics.kinds import NVFP4_BLOCK
from fp8pipe.numerics.plain import block_scales_plain, row_errors
from fp8pipe.numerics.plain_nvfp4 import block_errors
from validation.vllm.held import Expected, Holding
from validation.vllm.record import WeightReport


class ExpectedWeights:
    """The expected tensors of an export; iterating yields them one at a time, to limit memory.

    Args:
        export: the opened export.
        plan: how the export must have been made from its source; None if the source is not available.

    Raises:
        BadArtifactError: the export's weights cannot be read.
    """

    def __init__(self, export: Artifact, plan: ExportPlan | None) -> None:
        self.export, self.plan = export, plan
        self.entries = join_packed(weight_entries(export.root))
        self.layout = stored_layout(export)
        details = export.manifest.details_of(VllmDetails)
        self.transposed, self.block = set(details.transposed), ExportFormat(details.format).block
        self.units: dict[str, Unit] = {} if plan is None else {unit.entry.name: unit for unit in plan.units}
        self.names = [*self.units, *self.scales] if plan is not None else [
            name for name in self.entries if not is_scale(name, self.entries)
        ]  # fmt: skip

    def __iter__(self) -> Iterator[Expected]:
        return (self.read(name) for name in self.names)

    def read(self, name: str) -> Expected:
        """The expected tensor of this name."""
        if name in self.scales:
            return Expected(name, self.scales[name], None, False, wide=True)
        unit = self._unit(name)
        value = StoredWeights({name: unit.entry}, lambda _: expected_blocks(unit)).read(name).float()
        stored = unit.outputs[1] if len(unit.outputs) > 1 else unit.scale
        shape = None if stored is None else stored.shape
        scale, divisor = _packed_scale(unit) if unit.packed else (_scale_of(unit), None)
        block = (1, NVFP4_BLOCK) if unit.packed else unit.block
        return Expected(
            name, value, scale, unit.transposed, scale_shape=shape, block=block, divisor=divisor, layout=unit.layout
        )

    def read_held(self, name: str, holding: Holding) -> Expected:
        """The expected tensor that an engine stores under this name: a weight, its codes, or its scales."""
        base = name
        if name not in self.entries or is_scale(name, self.entries):
            base = name.removesuffix(self.layout.whole).removesuffix(SCALE_SUFFIX)
        return next(held for held in self.read(base).held(holding) if held.name == name)

    @cached_property
    def stored(self) -> StoredWeights:
        """The values of the weights alone, for a torch model; stacked experts one by one (`split_stacks`)."""
        units = {name: self._unit(name) for name in self.names if name not in self.scales}
        entries = split_stacks(self._structure.model_type, {name: unit.entry for name, unit in units.items()})
        units |= {
            name: replace(units[entry.stack.name], entry=entry)
            for name, entry in entries.items() if isinstance(entry, ExpertEntry) and name not in units
        }  # fmt: skip
        return StoredWeights(entries, lambda name: expected_blocks(units[name]))

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """The scales of the key/value cache and of inputs by tensor name, fp32, in the layout's shape."""
        if self.plan is None:
            names = (name for name in self.entries if is_kv_scale(name) or name.endswith(self.layout.inputs))
            return {name: read_tensor(self.entries[name]).float() for name in names}
        added = self.plan.added_tensors.items()
        return {name: torch.full(self.layout.shape, scale, dtype=torch.float32) for name, scale in added}

    @property
    def input_divisors(self) -> dict[str, float]:
        """The reciprocals of the global scales of inputs in NVFP4, by the model's module; empty without any."""
        named = {name: self.scales.get(self.layout.input_name(name)) for name in self.quantized}
        found = {self.module(name): float(scale) for name, scale in named.items() if scale is not None}
        divisor = COMPRESSED_TENSORS.stored
        return {module: scale if self.layout.divides else divisor(scale) for module, scale in found.items()}

    @property
    def reference(self) -> Literal["source", "export"]:
        """Where the expected values come from."""
        return "source" if self.units else "export"

    @property
    def group(self) -> int | None:
        """Number of neighbouring features of a quantized input that share a scale; None for one scale per token."""
        return None if self.block is None else self.block[1]

    def row_error(self, name: str, value: Tensor) -> float:
        """Largest rounding error of a row or block of `value`, relative to its bound.

        The error is measured against the source's floats; 0 for tensors that the export copies without rounding.
        """
        unit = self.units.get(name)
        if unit is None or unit.action in {Action.COPY, Action.CODES}:
            return 0.0
        if unit.packed:
            return block_errors(value, source_values(unit), unit.global_scale or 1.0) / NVFP4_ERROR_BOUND
        bound = E4M3_ERROR_BOUND if unit.action is Action.QUANTIZE else BF16_ERROR_BOUND
        return row_errors(value, source_values(unit), transposed=unit.transposed, block=unit.block) / bound

    def is_discarded(self, name: str) -> bool:
        """Whether the architecture ignores this tensor of the checkpoint (for example GPT-2's stored causal mask)."""
        return self._structure.is_discarded(name)

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """Names of the weights that the export stores as codes."""
        if self.units:
            return tuple(name for name, unit in self.units.items() if unit.quantized)
        return tuple(name for name in self.names if self._unit(name).quantized)

    def module(self, name: str) -> str:
        """Name of the model's module that a weight of the checkpoint belongs to."""
        return self._names[name].name.rpartition(".")[0]

    @cached_property
    def _names(self) -> Mapping[str, ModelName]:
        return self._structure.naming.table(self.entries)

    @cached_property
    def _structure(self) -> ModelStructure:
        return read_structure(self.export.root) if self.plan is None else self.plan.structure

    def _unit(self, name: str) -> Unit:
        """How the values follow from the source, or from the export itself."""
        if name in self.units:
            return self.units[name]
        entry, scale = self.entries[name], self.entries.get(name + SCALE_SUFFIX)
        layout = entry.layout if isinstance(entry, PackedEntry) else None
        own, block = (Action.COPY, None) if scale is None else (Action.CODES, self.block)
        action = own if layout is None else Action.CODES
        return Unit(entry, scale, action, (), None, name in self.transposed, block=block, layout=layout)


def _packed_scale(unit: Unit) -> tuple[Tensor, float]:
    """The factor of each block's codes, fp32 `(out, in / 16)`, and the divisor, of a weight in NVFP4."""
    if isinstance(unit.entry, PackedEntry):
        divisor = COMPRESSED_TENSORS.stored(unit.entry.read_global_scale())
        return read_tensor(unit.entry.blocks).float() / divisor, divisor

    def part(rows: range) -> Tensor:
        factor = None if unit.scale is None else scale_of(unit.scale, unit, rows)
        return rounded(unit, read_rows(unit.entry, rows), factor).scale.float()

    scale = unit.global_scale or 1.0
    return torch.cat([part(rows) for rows in blocks_of(unit)]) * scale, 1.0 / scale


def _scale_of(unit: Unit) -> Tensor | None:
    """The scale of a tensor, fp32, per block or broadcastable to its value; None for unquantized tensors.

    If the export quantized the tensor, the scale is computed from the amax of the source's rows or blocks.
    """
    if unit.action is Action.QUANTIZE and unit.block is not None:
        return block_scales_plain(read_tensor(unit.entry), unit.block)
    if unit.action is Action.QUANTIZE:
        original = read_tensor(unit.entry).double().abs()
        return (original.amax(0 if unit.transposed else 1, keepdim=True).clamp(min=1e-12) / 448).float()
    if unit.action is not Action.CODES or unit.scale is None:
        return None
    scale = read_tensor(unit.scale)
    if unit.block is not None:
        return scale.expand(block_grid(unit.entry.shape, unit.block)).contiguous()
    return scale.reshape(1, -1) if unit.transposed and scale.ndim == 2 else scale


def count_differences(expected: Expected, actual: Tensor) -> tuple[int, int]:
    """Count elements whose bits differ, and elements that have another code given the expected scale.

    Args:
        expected: the expected tensor.
        actual: fp32, the engine's tensor.

    Returns:
        Both counts; all elements if the shape differs, and 0 codes for an unquantized tensor.
    """
    total = expected.value.numel()
    if actual.shape != expected.value.shape:
        return total, total if expected.scale is not None else 0
    bits = int((actual.view(torch.int32) != expected.value.contiguous().view(torch.int32)).sum())
    if expected.scale is None:
        return bits, 0
    mine, theirs = (expected.numbers(values) for values in (expected.value, actual))
    return bits, int((mine.view(torch.int32) != theirs.view(torch.int32)).sum())


def weight_report(
    expected: ExpectedWeights, digests: Mapping[str, Any], holding: Holding, result: Mapping[str, Any]
) -> WeightReport:
    """Summarize the weight comparisons of the probe; only tensors that differ are read again.

    Args:
        expected: the expected weights.
        digests: digests of the expected weights by name, as passed to the probe.
        holding: how the engine stores weights.
        result: the result of the probe, see `probe.run`.
    """
    report: dict[str, Any] = dict.fromkeys(("layers", "tensors", "elements", "differing", "differing_codes"), 0)
    different: list[str] = []
    missing: list[str] = []
    discarded: list[str] = []
    read = Counter[str]()
    errors = [digest["row_error"] for digest in digests.values() if "row_error" in digest]
    for name, digest in digests.items():
        finding = result["weights"][name]
        if finding["status"] == "missing":
            (discarded if expected.is_discarded(name) else missing).append(name)
            continue
        if finding["status"] != "match":
            different.append(name)
        if "file" in finding:
            tensor, actual = expected.read_held(name, holding), load_file(finding["file"])["value"]
            bits, codes = count_differences(tensor, actual)
            report["differing"] += bits
            report["differing_codes"] += codes
            exact = holding.dtype is torch.float32 and not holding.codes and expected.plan is not None
            errors += [expected.row_error(name, actual)] if exact else []
        report["elements"] += torch.Size(digest["shape"]).numel()
        report["tensors"] += 1
        report["layers"] += int(digest["quantized"])
        read[finding["read"]] += 1
    named = [name for name in (*different, *missing) if "why" in result["weights"][name]]
    return WeightReport(
        **report, reference=expected.reference, different=different, missing=missing, discarded=discarded,
        gemm_differs=[name for name in digests if result["weights"][name].get("gemm_differs")], read=dict(read),
        why={name: result["weights"][name]["why"] for name in named}, unexplained=result["unexplained"],
        row_error=max(errors, key=lambda error: (error != error, error)) if errors else None,  # NaN is the worst
    )  # fmt: skip


def plan_of(export: Artifact, source: Path) -> ExportPlan:
    """Reconstruct how the export must have been made from `source`, according to its manifest.

    Raises:
        ConfigurationError: `source` is not the parent named in the export's manifest.
        BadArtifactError: `source` is damaged.
    """
    plan = with_global_scales(plan_export(source, VllmExportOptions.model_validate(export.manifest.config)))
    details = export.manifest.details_of(VllmDetails)
    plan = with_known_inputs(plan, details).stopping_as(details.stop_token_added)
    parents = {parent.digest: parent.outdated for parent in export.manifest.parents}
    if plan.source.parent.digest not in parents:
        named = [f"{digest}{outdated and f' ({outdated})'}" for digest, outdated in sorted(parents.items())]
        raise ConfigurationError(
            f"{export.root} was not made from {source}",
            why=f"the export's manifest names {', '.join(named) or 'no parent'}; this is {plan.source.parent.digest}",
            fix="export it again" if any(parents.values()) else "name the artifact that was exported, or leave it out",
        )
    return plan
