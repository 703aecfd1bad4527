"""Lint rules that need names, shapes and the model's structure, but no tensor data.

The rules predict what the engine will do with the checkpoint: which layers it fuses, which names it asks for,
which it leaves unquantized. A checkpoint that loads and then serves noise is the failure they exist for.
"""

from __future__ import annotations

from collections.abc import Iterator

from exporters.vllm.plan import DIMENSION_MULTIPLE, ExportPlan, fused_siblings, tied_original
from exporters.vllm.source import SourceKind
from fp8pipe.artifact.finding import Finding
from fp8pipe.models.language.structure import Role

__all__ = ["lint_structure"]

USE_BF16 = "export with --format bf16"


def lint_structure(plan: ExportPlan) -> list[Finding]:
    """All findings that headers alone reveal, for any format.

    Args:
        plan: the planned export.

    Returns:
        Findings, empty when there are none.
    """
    rules = [_scales, _adapter_state, _shapes, _tied]
    if plan.options.format.quantized:
        rules += [_something_quantized, _known_names, _placement, _dimensions, _fused, _ignore, _transposed]
    return [finding for rule in rules for finding in rule(plan)]


def _scales(plan: ExportPlan) -> Iterator[Finding]:
    for entry in plan.orphans:
        yield Finding("orphan-scale", entry.name, "a scale without its weight", "write the artifact again")
    for unit in plan.units:
        entry, scale = unit.entry, unit.scale
        if entry.dtype == "F8_E5M2":
            yield Finding("weight-format", entry.name, "weights are E4M3, not E5M2", "write the artifact again")
        if entry.dtype != "F8_E4M3":
            if scale is not None:
                yield Finding(
                    "orphan-scale",
                    scale.name,
                    f"its weight is {entry.dtype}, not FP8",
                    "write the artifact again",
                )
            continue
        rows = entry.shape[-1 if unit.transposed else 0] if entry.shape else 0
        if scale is None:
            yield Finding("missing-scale", entry.name, "FP8 codes without weight_scale", "write the artifact again")
        elif scale.dtype != "F32" or scale.shape not in {(), (1,), (rows, 1)}:
            yield Finding(
                "scale-shape",
                scale.name,
                f"{scale.dtype} {scale.shape}; expected F32 () or ({rows}, 1)",
                "write the artifact again",
            )


def _adapter_state(plan: ExportPlan) -> Iterator[Finding]:
    state = plan.source.adapter
    if plan.source.kind == SourceKind.FALQON and state != "flushed":
        yield Finding(
            "adapter-not-flushed",
            "adapter.safetensors",
            f"the artifact's adapter is {state!r}: the buffer holds updates the weights lack",
            "finish the run so that the buffer is merged into the weights",
        )


def _shapes(plan: ExportPlan) -> Iterator[Finding]:
    """Weights must have the shape config.json declares, and none may be missing."""
    structure = plan.structure
    seen: set[str] = set()
    for unit in plan.units:
        if unit.module not in structure.roles or not unit.entry.name.endswith(".weight"):
            continue
        seen.add(unit.module)
        if unit.entry.shape != structure.shapes[unit.module]:
            yield Finding(
                "weight-shape",
                unit.entry.name,
                f"{unit.entry.shape}, but config.json declares {structure.shapes[unit.module]}",
                "use the config.json that belongs to these weights",
            )
    if plan.options.format.quantized:
        for module in structure.projections.keys() - seen:
            if f"{module}.weight" not in structure.tied:
                yield Finding(
                    "missing-weight",
                    f"{module}.weight",
                    "the model has it, the checkpoint has not",
                    "complete the checkpoint, or correct tie_word_embeddings in config.json",
                )


def _tied(plan: ExportPlan) -> Iterator[Finding]:
    for name, original in plan.structure.tied.items():
        if tied_original(original, plan.source, plan.structure) is None and name not in plan.source.tensors:
            yield Finding(
                "tied-missing",
                original,
                f"{name} is tied to it, and neither is stored",
                "complete the checkpoint",
            )


def _something_quantized(plan: ExportPlan) -> Iterator[Finding]:
    if not any(unit.quantized for unit in plan.units):
        yield Finding("nothing-quantized", str(plan.source.root), "no layer would be FP8", USE_BF16)


def _known_names(plan: ExportPlan) -> Iterator[Finding]:
    """Every matrix must belong to a module of known kind: the engine's name for others is a guess."""
    for unit in plan.units:
        known = unit.module in plan.structure.roles or plan.structure.is_discarded(unit.entry.name)
        if len(unit.entry.shape) < 2 or known:
            continue
        yield Finding(
            "unknown-matrix",
            unit.entry.name,
            f"shape {unit.entry.shape} belongs to no linear layer or embedding of "
            f"{plan.structure.architecture}, so how the engine treats it in an FP8 checkpoint is unknown",
            USE_BF16,
        )


def _placement(plan: ExportPlan) -> Iterator[Finding]:
    structure = plan.structure
    for unit in plan.units:
        if not unit.quantized or unit.module is None:
            continue
        role = structure.roles.get(unit.module)
        if role not in {Role.LINEAR, Role.CONV1D}:
            yield Finding("not-linear", unit.entry.name, f"FP8 codes in a {role or 'module of unknown kind'}", USE_BF16)
        elif not structure.in_decoder(unit.module):
            where = "the output head" if unit.module == structure.output_head else "outside the text decoder"
            yield Finding(
                "engine-leaves-unquantized",
                unit.entry.name,
                f"FP8 codes in {where}, which the engine loads without a scale",
                "keep this layer out of the conversion, or " + USE_BF16,
            )


def _dimensions(plan: ExportPlan) -> Iterator[Finding]:
    for unit in plan.units:
        if unit.quantized and any(size % DIMENSION_MULTIPLE for size in unit.entry.shape):
            yield Finding(
                "dimension-multiple",
                unit.entry.name,
                f"shape {unit.entry.shape}: FP8 kernels need multiples of {DIMENSION_MULTIPLE}",
                USE_BF16,
            )


def _fused(plan: ExportPlan) -> Iterator[Finding]:
    quantized = {unit.module for unit in plan.units if unit.quantized}
    for group in fused_siblings(plan.structure.projections, plan.schema.fused_groups):
        plain = [module for module in group if module not in quantized]
        if plain and len(plain) < len(group):
            yield Finding(
                "fused-group",
                group[0],
                f"the engine fuses {', '.join(m.rpartition('.')[2] for m in group)}; "
                f"{', '.join(m.rpartition('.')[2] for m in plain)} not quantized",
                "convert all parts of the group or none, or " + USE_BF16,
            )


def _ignore(plan: ExportPlan) -> Iterator[Finding]:
    """Both ways: every unquantized projection is named, every name is an unquantized projection."""
    ignore, structure = set(plan.ignore), plan.structure
    quantized = {unit.module for unit in plan.units if unit.quantized}
    for unit in plan.units:
        projection = unit.module in structure.projections and unit.entry.name.endswith(".weight")
        if projection and not unit.quantized and unit.module not in ignore:
            yield Finding(
                "ignore-incomplete",
                unit.entry.name,
                "unquantized, but not in the ignore list",
                "add the module to the ignore list",
            )
    for module in sorted(ignore):
        if module not in structure.projections:
            yield Finding("ignore-stale", module, "matches no linear layer", "remove it from the ignore list")
        elif module in quantized:
            yield Finding("ignore-wrong", module, "its weight is FP8 codes", "remove it from the ignore list")


def _transposed(plan: ExportPlan) -> Iterator[Finding]:
    structure, declared = plan.structure, plan.source.transposed
    served = structure.model_type in plan.schema.conv1d_model_types
    for unit in plan.units:
        if not unit.quantized:
            continue
        if unit.transposed and not served:
            yield Finding(
                "transposed-weight",
                unit.entry.name,
                f"stored (in, out), and vLLM {plan.schema.vllm_version}'s loader of {structure.model_type} "
                "is not known to transpose FP8 codes",
                USE_BF16,
            )
        stem = unit.entry.name.removesuffix(".weight")
        if declared is not None and unit.transposed != (stem in declared):
            yield Finding(
                "orientation",
                unit.entry.name,
                f"the artifact says transposed={stem in declared}, the model says {unit.transposed}",
                "use the config.json that belongs to these weights",
            )
