"""Plans an export: decides how every tensor is converted, from headers alone.

A unit is one source tensor and how it is converted. A plan is made without reading tensor data, so it takes hardly any
time. All later steps (linting, writing, comparing) process the units of the same plan.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from exporters.vllm.kv_cache import scale_tensors
from exporters.vllm.options import CheckpointSchema, ExportFormat, VllmExportOptions, schema_for
from exporters.vllm.source import Source
from exporters.vllm.target import CalibrationFacts, KvScale
from fp8pipe.artifact import Encoding, LayerRecord, ScaleRule
from fp8pipe.models.checkpoint.names import ModelName
from fp8pipe.models.checkpoint.packed import LAYOUTS, PackedEntry, PackedLayout, packed_headers
from fp8pipe.models.checkpoint.stacks import join_entries
from fp8pipe.models.checkpoint.tensors import PLAIN_FLOATS, SCALE_SUFFIX, TensorEntry, TensorHeader, is_scale
from fp8pipe.models.language.ending import Ending
from fp8pipe.models.language.structure import ModelStructure, Role
from fp8pipe.numerics.blocks import block_grid

# FP8 GEMM kernels (cuBLASLt, CUTLASS) require K and N to be multiples of 16.
DIMENSION_MULTIPLE = 16


class Action(StrEnum):
    """How a source tensor is converted."""

    COPY = "copy"  # bytes unchanged
    CODES = "codes"  # codes unchanged; an FP8 scale repeated to one per row or block
    QUANTIZE = "quantize"  # quantized to FP8 or NVFP4 during the export
    DEQUANTIZE = "dequantize"  # FP8 codes -> bf16
    CAST = "cast"  # other floats -> bf16
    DROP = "drop"  # a second copy of a tied tensor


@dataclass(frozen=True, slots=True)
class Unit:
    """One source tensor, how it is converted, and the resulting tensors.

    Attributes:
        entry: the source tensor.
        scale: the source tensor's scale, for FP8 codes.
        action: how it is converted.
        outputs: the weight first, then its scale if there is one; for NVFP4 codes, block scales and the global scale;
            empty for DROP.
        module: the module that the tensor belongs to, as named in the transformers model; None if there is none.
        transposed: whether the weight is stored as `(in, out)`.
        name: the tensor's name in the transformers model, which may differ from its name in the checkpoint.
        block: (rows, columns) of the blocks that share a scale in the export; None for one scale per row, and for
            tensors that are not quantized.
        layout: how the export stores it in NVFP4; None if it does not.
        global_scale: for NVFP4 weights that this export rounds, once it was derived from the values of the group
            (`nvfp4.with_global_scales`); else None.
    """

    entry: TensorEntry
    scale: TensorEntry | None
    action: Action
    outputs: tuple[TensorHeader, ...]
    module: str | None
    transposed: bool
    name: str = ""
    block: tuple[int, int] | None = None
    layout: PackedLayout | None = None
    global_scale: float | None = None

    @property
    def packed(self) -> bool:
        """Whether the export stores it in NVFP4."""
        return self.layout is not None

    @property
    def quantized(self) -> bool:
        """Whether the export stores it as codes."""
        return self.action in {Action.CODES, Action.QUANTIZE}

    @property
    def size_bytes(self) -> int:
        """Total size of the outputs, bytes."""
        return sum(output.size_bytes for output in self.outputs)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The complete export before any byte is written.

    Attributes:
        shards: units by output file, in writing order.
        dropped: units without an output.
        orphans: source tensors that belong to no unit (scales without codes).
        ending: how generation_config.json is changed so that engines stop at the end of an answer.
        kv_cache: scales of the FP8 key/value cache by attention layer; empty without one.
        names: the names in the transformers model, by the source's tensor names.
        inputs: largest magnitude of the inputs of each weight in calibration, by the weight's name in the checkpoint;
            only where their scales are stored, and once they were measured (`inputs.with_inputs`).
        input_scales: what is stored for it, global scales or their reciprocals, by tensor name.
        calibration: the text.
        ignore: entries of `ignore` in config.json's quantization block, spelled as in `spelt`.
        layers: one record per linear layer, named as in `spelt`.
    """

    source: Source
    structure: ModelStructure
    options: VllmExportOptions
    schema: CheckpointSchema
    shards: tuple[tuple[Unit, ...], ...]
    dropped: tuple[Unit, ...]
    orphans: tuple[TensorEntry, ...]
    names: Mapping[str, ModelName]
    ignore: tuple[str, ...]
    layers: tuple[LayerRecord, ...]
    ending: Ending = field(default_factory=Ending)
    kv_cache: Mapping[str, KvScale] = field(default_factory=dict)
    inputs: Mapping[str, float] = field(default_factory=dict)
    input_scales: Mapping[str, float] = field(default_factory=dict)
    calibration: CalibrationFacts | None = None

    def stopping_as(self, added: int | None) -> ExportPlan:
        """The plan that fits an existing export, given its manifest's `stop_token_added`.

        If that is None, the export kept the source's generation_config.json, as those of earlier versions did.
        """
        return self if added is not None else replace(self, ending=Ending())

    @property
    def units(self) -> tuple[Unit, ...]:
        """Units that have an output, in writing order."""
        return tuple(unit for shard in self.shards for unit in shard)

    @property
    def stored(self) -> dict[str, TensorEntry]:
        """Source tensors by name in the transformers model, except those that it combines with others into one."""
        return {known.name: self.source.tensors[name] for name, known in self.names.items() if known.whole}

    @property
    def spelt(self) -> dict[str, str]:
        """The name of every linear layer in the checkpoint, by its name in the transformers model."""
        return {module: module for module in self.structure.projections} | spell(self.names)

    @property
    def layout(self) -> PackedLayout:
        """How weights in NVFP4, and tensors of one number, are named and stored."""
        return LAYOUTS[self.options.layout]

    @property
    def kv_tensors(self) -> dict[str, float]:
        """The scales of the key/value cache by tensor name, fp32, in the layout's shape."""
        return scale_tensors(self.kv_cache, beside_projections=self.options.layout == "modelopt")

    @property
    def added_tensors(self) -> dict[str, float]:
        """Tensors without a source, fp32, in the layout's shape, by name; they belong to the last shard."""
        return {**self.kv_tensors, **self.input_scales}

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of `input_scales`, which are known before they are measured."""
        calibrated = self.options.format.calibrated
        return tuple(self.layout.input_name(unit.entry.name) for unit in self.units if unit.packed and calibrated)

    @property
    def payload_bytes(self) -> int:
        """Bytes of tensor data in the whole export."""
        return sum(unit.size_bytes for unit in self.units) + 4 * (len(self.kv_tensors) + len(self.input_names))


def build_plan(source: Source, structure: ModelStructure, options: VllmExportOptions) -> ExportPlan:
    """Decide how every tensor is converted; reads headers only.

    Raises:
        ConfigurationError: `options.vllm_version` is not one of the declared versions.
    """
    if not options.format.quantized and not source.holds_codes:  # nothing is done to single experts: stacks stay stacks
        source = replace(source, tensors=join_entries(source.tensors))
    names = structure.naming.table(source.tensors)
    schema = schema_for(options.vllm_version)
    planner = _Planner(source, structure, options.format, LAYOUTS[options.layout], schema, names)
    units = [
        planner.unit(entry)
        for name, entry in sorted(source.tensors.items(), key=lambda item: _natural(item[0]))
        if not is_scale(name, source.tensors)
    ]
    orphans = tuple(u.entry for u in units if u.entry.name.endswith(".weight" + SCALE_SUFFIX))
    kept = [u for u in units if u.action is not Action.DROP and u.entry not in orphans]
    quantized = {u.module for u in kept if u.quantized and u.module}
    projections, spelt = structure.projections, spell(names)
    plain = (spelt.get(module, module) for module in projections.keys() - quantized)
    return ExportPlan(
        source=source,
        structure=structure,
        options=options,
        schema=schema,
        shards=_shards(kept, options.max_shard_bytes),
        dropped=tuple(u for u in units if u.action is Action.DROP),
        orphans=orphans,
        names=names,
        ignore=tuple(sorted(plain, key=_natural)) if options.format.quantized else (),
        layers=tuple(planner.layer(module, quantized) for module in sorted(projections, key=_natural)),
    )


def spell(names: Mapping[str, ModelName]) -> dict[str, str]:
    """Checkpoint names of the modules that transformers renames, by their names in the transformers model."""
    renamed = ((name, known) for name, known in names.items() if known.renamed and known.whole)
    return {known.name.rpartition(".")[0]: name.rpartition(".")[0] for name, known in renamed}


def fused_siblings(modules: Iterable[str], groups: Iterable[frozenset[str]]) -> list[tuple[str, ...]]:
    """Groups of modules that the engine concatenates: children of one parent with leaf names in one of `groups`."""
    by_parent: dict[str, dict[str, str]] = defaultdict(dict)
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        by_parent[parent][leaf] = module
    pairs = ((leaves, group) for leaves in by_parent.values() for group in groups)
    present = (tuple(sorted(leaves[leaf] for leaf in group & leaves.keys())) for leaves, group in pairs)
    return [modules for modules in present if len(modules) > 1]


@dataclass(frozen=True)
class _Planner:
    """Decides on conversions, given the source, the model's structure, and the export's format, layout and schema."""

    source: Source
    structure: ModelStructure
    format: ExportFormat
    layout: PackedLayout
    schema: CheckpointSchema
    names: Mapping[str, ModelName]

    @cached_property
    def spelt(self) -> dict[str, str]:
        """See `spell`."""
        return spell(self.names)

    @cached_property
    def stored(self) -> frozenset[str]:
        """The names of the source's tensors in the transformers model."""
        return frozenset(known.name for known in self.names.values() if known.whole)

    @cached_property
    def refused(self) -> dict[str, str]:
        """Linear layers whose float weight must stay unquantized, each with the reason."""
        reasons: dict[str, str] = {}
        for module in self.structure.projections:
            shape = self.structure.stored_shape(module)
            if module == self.structure.output_head:
                reasons[module] = "output head: the engine builds it without a quantization scheme"
            elif self.structure.roles[module] is Role.ROUTER:
                reasons[module] = "router: it decides which experts a token goes to"
            elif not self.structure.in_decoder(module):
                reasons[module] = "outside the text decoder"
            elif any(size % DIMENSION_MULTIPLE for size in shape):
                reasons[module] = f"shape {shape} is not a multiple of {DIMENSION_MULTIPLE}"
        for group in fused_siblings(self.structure.projections, self.schema.fused_groups):
            blocked = [m for m in group if m in reasons]
            for module in group:
                if blocked and module not in reasons:
                    reasons[module] = f"the engine fuses it with {blocked[0]}, which stays unquantized"
        return reasons

    def unit(self, entry: TensorEntry) -> Unit:
        """Decide how a source tensor is converted, and into which output tensors."""
        known = self.names[entry.name]
        module = self.structure.owner(known.name) if known.whole else None
        role = self.structure.roles.get(module or "") if known.name.endswith(".weight") else None
        scale = self.source.tensors.get(entry.name + SCALE_SUFFIX) if entry.name.endswith(".weight") else None
        transposed = role is Role.CONV1D
        action = self._action(entry, known.name, module, role)
        coded = action in {Action.CODES, Action.QUANTIZE} and len(entry.shape) == 2
        dtype = "F8_E4M3" if coded else "BF16" if action in {Action.DEQUANTIZE, Action.CAST} else entry.dtype
        outputs = [] if action is Action.DROP else [TensorHeader(entry.name, dtype, entry.shape)]
        # Without blocks where there cannot be any: the linter refuses these weights (`block-scale`).
        fits = coded and not transposed and not self.structure.is_expert(module)
        block = self.format.block if fits and _takes_blocks(entry, scale, self.format) else None
        if fits and self.format.packed:
            parts = packed_headers(entry.name, entry.shape, self.layout)
            return Unit(entry, scale, action, parts, module, transposed, known.name, layout=self.layout)
        if coded:
            rows = entry.shape[1 if transposed else 0]
            by_row = (1, rows) if transposed and self.structure.is_expert(module) else (rows, 1)
            shape = by_row if block is None else block_grid(entry.shape, block)
            outputs.append(TensorHeader(entry.name + SCALE_SUFFIX, "F32", shape))
        return Unit(entry, scale, action, tuple(outputs), module, transposed, known.name, block)

    def _action(self, entry: TensorEntry, name: str, module: str | None, role: Role | None) -> Action:
        # How a tensor is converted, by its dtype, the export's format, and its role in the model.
        if self.structure.tied.get(name) in self.stored:
            return Action.DROP
        if isinstance(entry, PackedEntry):
            return Action.CODES
        if entry.dtype == "F8_E4M3":
            kept = Action.QUANTIZE if self.format.packed else Action.CODES
            return kept if self.format.quantized else Action.DEQUANTIZE
        if entry.dtype not in PLAIN_FLOATS:
            return Action.COPY
        if not self.format.quantized:
            return Action.COPY if entry.dtype == "BF16" else Action.CAST
        projection = role in {Role.LINEAR, Role.CONV1D} and len(entry.shape) == 2
        fits = projection and module not in self.refused and not self.source.holds_codes
        return Action.QUANTIZE if fits else Action.COPY

    def layer(self, module: str, quantized: set[str]) -> LayerRecord:
        """The manifest's record of a linear layer; `quantized` are the modules that the export stores as codes."""
        shape = self.structure.shape(module)
        if module not in quantized:
            reason = self.refused.get(module, "not quantized in the source, or not requested")
            return LayerRecord(name=self.spelt.get(module, module), reason=reason, shape=shape)
        before = self.source.encoding_of(self.spelt.get(module, module))
        kept = before is not None and before.format == self.format.codes  # else the export chooses the scales
        own = ScaleRule.MSE if self.format.packed else ScaleRule.AMAX
        rule = before.scale_rule if before is not None and kept else own
        weight = Encoding(
            format=self.format.codes, bits=4 if self.format.packed else 8, granularity=self.format.weight_granularity,
            scale_rule=rule,
        )  # fmt: skip
        activation = self.format.activations
        return LayerRecord(name=self.spelt.get(module, module), shape=shape, weight=weight, activation=activation)


def _takes_blocks(entry: TensorEntry, scale: TensorEntry | None, form: ExportFormat) -> bool:
    """Whether the source's scale is one per tensor or per block; float weights, which have none, take blocks too."""
    return scale is None or form.block is None or scale.shape in {(), (1,), block_grid(entry.shape, form.block)}


def _shards(units: list[Unit], max_bytes: int) -> tuple[tuple[Unit, ...], ...]:
    """Distribute units to files in order, each of at most `max_bytes` or a single unit; scales stay with weights."""
    shards: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if shards[-1] and size + unit.size_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.size_bytes
    return tuple(tuple(shard) for shard in shards)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Natural sort key: layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
