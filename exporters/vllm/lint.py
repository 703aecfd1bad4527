"""Checks of an export before anything is written: every rule runs, and all findings are reported.

Some rules check values, in one pass over the source with a few blocks of rows in memory at a time. Others need only
names, shapes and the model's structure, and predict what vLLM will do with the checkpoint: which layers it fuses, which
names it expects, which layers it leaves unquantized. They catch checkpoints that would load but produce garbage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from exporters.vllm.blocks import by_unit
from exporters.vllm.divided import part_rows
from exporters.vllm.nvfp4 import packed_findings
from exporters.vllm.plan import DIMENSION_MULTIPLE, ExportPlan, Unit, fused_siblings
from exporters.vllm.values import count_bad, value_findings
from fp8pipe.artifact.finding import Finding
from fp8pipe.models.checkpoint.packed import PackedEntry
from fp8pipe.models.checkpoint.rows import read_rows, same_values
from fp8pipe.models.checkpoint.stacks import stack_name
from fp8pipe.models.checkpoint.tensors import header_entries, read_tensor
from fp8pipe.models.language.experts import EXPERTS_PER_TOKEN
from fp8pipe.models.language.structure import Role
from fp8pipe.numerics.blocks import block_grid

_ADAPTER_FILE: Final = "adapter.safetensors"
_USE_BF16: Final = "export with --format bf16"
_USE_ROWS: Final = "export with --format fp8, which has one scale per row"
_WRITE_AGAIN: Final = "write the artifact again"
_OTHER_CONFIG: Final = "use the config.json that belongs to these weights"
_FIXES: Final = {
    "orphan-scale": _WRITE_AGAIN,
    "adapter-not-flushed": "finish the run so that the buffer is merged into the weights",
    "nothing-quantized": _USE_BF16,
    "unknown-matrix": _USE_BF16,
    "weight-format": _WRITE_AGAIN,
    "missing-scale": _WRITE_AGAIN,
    "trained-in-nvfp4": "export with --target vllm --format nvfp4, which writes these codes; for TensorRT-LLM, add "
    "--layout modelopt, the layout that it reads",
    "weight-shape": _OTHER_CONFIG,
    "tied-missing": "complete the checkpoint",
    "not-linear": _USE_BF16,
    "dimension-multiple": _USE_BF16,
    "block-size": _USE_ROWS,
    "block-scale": _USE_ROWS,
    "fused-group": "quantize all layers of the group or none, or " + _USE_BF16,
    "ignore-incomplete": "add the module to the ignore list",
    "ignore-stale": "remove it from the ignore list",
    "transposed-weight": _USE_BF16,
    "orientation": _OTHER_CONFIG,
    "scale-shape": _WRITE_AGAIN,
    "missing-weight": "complete the checkpoint, or correct tie_word_embeddings in config.json",
    "engine-leaves-unquantized": "do not quantize this layer, or " + _USE_BF16,
    "engine-lacks-model": "use a model that vLLM implements",
    "experts-per-token": "use a model with num_experts_per_tok = 1, as all published ones are",
    "ignore-wrong": "remove it from the ignore list",
    "ignore-covers": "export with --layout compressed-tensors",
    "tied-differs": "set tie_word_embeddings to false in config.json, or remove the wrong copy",
}


def _found(rule: str, tensor: str, why: str) -> Finding:
    """A finding together with its rule's fix."""
    return Finding(rule, tensor, why, _FIXES[rule])


def lint(plan: ExportPlan, advance: Callable[[], None] = lambda: None) -> list[Finding]:
    """All findings on an export, structural ones first; reads the source once, and calls `advance` once per tensor."""
    findings = lint_structure(plan)
    for unit, bad in by_unit((*plan.units, *plan.dropped), lambda unit, rows: count_bad(read_rows(unit.entry, rows))):
        findings += value_findings(unit, sum(bad))
        advance()
    return [*findings, *lint_others(plan)]


def lint_others(plan: ExportPlan) -> list[Finding]:
    """Findings about values that are read but not exported as they are: tied tensors, the adapter, NVFP4 scales."""
    return [*_tied(plan), *_adapter(plan), *packed_findings(plan)]


def lint_structure(plan: ExportPlan) -> list[Finding]:
    """Findings about names, shapes and the model's structure; reads no tensor."""
    rules = [_scales, _adapter_state, _shapes, _tied_is_stored, _implemented, _routing]
    if plan.options.format.quantized:
        rules += [_something_quantized, _known_names, _placement, _dimensions, _blocks, _fused, _ignore]
        rules += [_covered, _transposed]
    return [finding for rule in rules for finding in rule(plan)]


def _tied(plan: ExportPlan) -> Iterator[Finding]:
    stored = plan.stored
    for unit in plan.dropped:
        original = stored.get(plan.structure.tied[unit.name])
        if original is not None and not same_values(unit.entry, original):
            yield _found(
                "tied-differs", unit.entry.name, f"config.json ties it to {original.name}, but their values differ"
            )


def _adapter(plan: ExportPlan) -> Iterator[Finding]:
    # Findings on adapter tensors with updates that are not merged into the weights.
    path = plan.source.root / _ADAPTER_FILE
    if not plan.source.holds_codes or not path.is_file():
        return
    for name, entry in header_entries(path).items():
        if name.endswith(".lora_B") and (pending := int(read_tensor(entry).count_nonzero())):
            yield _found(
                "adapter-not-flushed", name, f"{pending} non-zero value(s) that are not merged into the weights"
            )


def _scales(plan: ExportPlan) -> Iterator[Finding]:
    # FP8 weights must be E4M3 with a scale of the right shape, and no other tensor may have a scale.
    for entry in plan.orphans:
        yield _found("orphan-scale", entry.name, "a scale without its weight")
    for unit in plan.units:
        entry, scale = unit.entry, unit.scale
        if isinstance(entry, PackedEntry) and not plan.options.format.packed:
            why = f"its weight is in NVFP4, which the format {plan.options.format} does not hold"
            yield _found("trained-in-nvfp4", entry.name, why)
        if entry.dtype == "F8_E5M2":
            yield _found("weight-format", entry.name, "weights are E4M3, not E5M2")
        if entry.dtype != "F8_E4M3":
            if scale is not None:
                yield _found("orphan-scale", scale.name, f"its weight is {entry.dtype}, not FP8")
            continue
        rows = entry.shape[-1 if unit.transposed else 0] if entry.shape else 0
        if scale is None:
            yield _found("missing-scale", entry.name, "FP8 codes without weight_scale")
            continue
        by_row = (1, rows) if unit.transposed and plan.structure.is_expert(unit.module) else (rows, 1)
        wanted = by_row if unit.block is None else block_grid(entry.shape, unit.block)
        if scale.dtype != "F32" or scale.shape not in {(), (1,), wanted}:
            yield _found("scale-shape", scale.name, f"{scale.dtype} {scale.shape}; expected F32 () or {wanted}")


def _adapter_state(plan: ExportPlan) -> Iterator[Finding]:
    state = plan.source.adapter
    if plan.source.holds_codes and state != "flushed":
        why = f"the artifact's adapter is {state!r}: the buffer holds updates that are not merged into the weights"
        yield _found("adapter-not-flushed", _ADAPTER_FILE, why)


def _shapes(plan: ExportPlan) -> Iterator[Finding]:
    """Weights must have the shape that config.json declares, and none may be missing."""
    structure = plan.structure
    seen: set[str] = set()
    for unit in plan.units:
        if unit.module is None or unit.module not in structure.roles or not unit.name.endswith(".weight"):
            continue
        seen.add(unit.module)
        declared = structure.stored_shape(unit.module)
        if unit.entry.shape != declared:
            why = f"{unit.entry.shape}, but config.json declares {declared}"
            yield _found("weight-shape", unit.entry.name, why)
    stored = {unit.name for unit in plan.units}  # in bf16 stacks stay whole
    for module in structure.projections.keys() - seen:
        if (
            f"{module}.weight" not in structure.tied
            and stack_name(structure.model_type, f"{module}.weight") not in stored
        ):
            yield _found("missing-weight", f"{module}.weight", "the model has it, the checkpoint lacks it")


def _tied_is_stored(plan: ExportPlan) -> Iterator[Finding]:
    stored = plan.stored
    for name, original in plan.structure.tied.items():
        if original not in stored and name not in stored:
            yield _found("tied-missing", original, f"{name} is tied to it, and neither is stored")


def _implemented(plan: ExportPlan) -> Iterator[Finding]:
    if (kind := plan.structure.architecture) in plan.schema.refused_models:
        yield _found(
            "engine-lacks-model", "config.json", f"vLLM {plan.schema.vllm_version} does not implement a {kind}"
        )


def _routing(plan: ExportPlan) -> Iterator[Finding]:
    # Where inputs of experts are weighed, the engine starts, and fails with the first request that it computes.
    config, structure = plan.source.config, plan.structure
    text = config.get("text_config", config)
    chosen = text.get(EXPERTS_PER_TOKEN)
    if structure.model_type in plan.schema.single_expert_model_types and isinstance(chosen, int) and chosen > 1:
        why = f"is {chosen}: vLLM {plan.schema.vllm_version} computes a {structure.architecture} with one only"
        yield _found("experts-per-token", EXPERTS_PER_TOKEN, why)


def _something_quantized(plan: ExportPlan) -> Iterator[Finding]:
    if not any(unit.quantized for unit in plan.units):
        yield _found("nothing-quantized", str(plan.source.root), "no layer would be quantized")


def _known_names(plan: ExportPlan) -> Iterator[Finding]:
    """Every matrix of the decoder must belong to a known kind of module, or vLLM's treatment of it is unknown.

    Tensors that the model declares outside the decoder, such as the convolutions and position embeddings of a vision
    tower, are allowed: they are copied and never FP8.
    """
    structure = plan.structure
    for unit in plan.units:
        known = unit.module in structure.roles or structure.is_discarded(unit.entry.name)
        elsewhere = unit.name in structure.tensors and not structure.in_decoder(unit.name)
        shape = unit.entry.shape
        vector = len(shape) < 2 or (len(shape) == 2 and min(shape) == 1)  # such as a router's biases, (1, experts)
        if vector or known or elsewhere:
            continue
        why = (
            f"shape {shape} belongs to no linear layer or embedding of "
            f"{plan.structure.architecture}, so it is unknown how the engine treats it in an FP8 checkpoint"
        )
        yield _found("unknown-matrix", unit.entry.name, why)


def _placement(plan: ExportPlan) -> Iterator[Finding]:
    # FP8 codes may be only in linear layers of the text decoder.
    structure = plan.structure
    for unit in plan.units:
        if not unit.quantized or unit.module is None:
            continue
        role = structure.roles.get(unit.module)
        if role not in {Role.LINEAR, Role.CONV1D}:
            yield _found("not-linear", unit.entry.name, f"FP8 codes in a {role or 'module of unknown kind'}")
        elif not structure.in_decoder(unit.module):
            where = "the output head" if unit.module == structure.output_head else "outside the text decoder"
            why = f"FP8 codes in {where}, which the engine loads without a scale"
            yield _found("engine-leaves-unquantized", unit.entry.name, why)


def _dimensions(plan: ExportPlan) -> Iterator[Finding]:
    for unit in plan.units:
        if unit.quantized and any(size % DIMENSION_MULTIPLE for size in unit.entry.shape):
            why = f"shape {unit.entry.shape}: kernels need multiples of {DIMENSION_MULTIPLE}"
            yield _found("dimension-multiple", unit.entry.name, why)


def _blocks(plan: ExportPlan) -> Iterator[Finding]:
    """With a scale per block, both sides must consist of whole blocks, and trained scales must be scales of blocks.

    vLLM quantizes inputs in groups of a block's width, and concatenates the scales of fused layers. An incomplete block
    of outputs it takes in some layers only. Weights that it divides must have whole blocks in each part.
    """
    block = plan.options.format.block
    if plan.options.format.packed:
        for unit in (unit for unit in plan.units if unit.quantized and not unit.packed):
            yield _found("block-scale", unit.entry.name, _why_no_blocks(plan, unit))
    if block is None:
        return
    for unit in (unit for unit in plan.units if unit.quantized and len(unit.entry.shape) == 2):
        shape = unit.entry.shape
        uneven = [str(size) for size, step in zip(shape, block, strict=True) if size % step]
        if uneven:
            why = f"shape {shape}: blocks of {block[0]} x {block[1]} do not divide {' and '.join(uneven)}"
            yield _found("block-size", unit.entry.name, why)
        elif unit.module in plan.structure.projections and not unit.transposed:
            parts = part_rows(unit.module, plan.structure, plan.source.config)
            if parts is None:
                why = f"vLLM divides its {shape[0]} rows into parts whose sizes the checkpoint does not tell"
                yield _found("block-size", unit.entry.name, why)
            elif cut := [f"{rows} ({part})" for part, rows in parts.items() if rows % block[0]]:
                why = f"vLLM divides its {shape[0]} rows; blocks of {block[0]} do not divide parts of {', '.join(cut)}"
                yield _found("block-size", unit.entry.name, why)
        if unit.block is None:
            yield _found("block-scale", unit.entry.name, _why_no_blocks(plan, unit))


def _why_no_blocks(plan: ExportPlan, unit: Unit) -> str:
    if plan.structure.is_expert(unit.module):
        return "an expert's weight: this project's vLLM plugin takes experts with one E4M3 scale per row only"
    if unit.transposed:
        return f"stored (in, out): vLLM {plan.schema.vllm_version} is not known to load block scales of such weights"
    shape = None if unit.scale is None else unit.scale.shape
    return f"its codes have scales of shape {shape}; with a scale per block they would have to be rounded again"


def _fused(plan: ExportPlan) -> Iterator[Finding]:
    # Layers that the engine fuses must be all quantized or all unquantized.
    quantized = {unit.module for unit in plan.units if unit.quantized}
    for group in fused_siblings(plan.structure.projections, plan.schema.fused_groups):
        plain = [module for module in group if module not in quantized]
        if plain and len(plain) < len(group):
            why = (
                f"the engine fuses {', '.join(m.rpartition('.')[2] for m in group)}; "
                f"{', '.join(m.rpartition('.')[2] for m in plain)} not quantized"
            )
            yield _found("fused-group", group[0], why)


def _ignore(plan: ExportPlan) -> Iterator[Finding]:
    """Every unquantized projection must be in the ignore list, and every name in the list must be such a projection."""
    ignore, structure, spelt = set(plan.ignore), plan.structure, plan.spelt
    quantized = {unit.module for unit in plan.units if unit.quantized}
    for unit in plan.units:
        projection = unit.module in structure.projections and unit.name.endswith(".weight")
        if projection and not unit.quantized and spelt[unit.module or ""] not in ignore:
            yield _found("ignore-incomplete", unit.entry.name, "unquantized, but not in the ignore list")
    modules = {spelt[module]: module for module in structure.projections}
    for name in sorted(ignore):
        if name not in modules:
            yield _found("ignore-stale", name, "matches no linear layer")
        elif modules[name] in quantized:
            yield _found("ignore-wrong", name, "its weight is quantized")


def _covered(plan: ExportPlan) -> Iterator[Finding]:
    """In ModelOpt's layout vLLM leaves out every layer whose name contains one of the ignore list."""
    if plan.options.layout != "modelopt":
        return
    for unit in (unit for unit in plan.units if unit.quantized):
        name = plan.spelt[unit.module or ""]
        if (entry := next((entry for entry in plan.ignore if entry in name), None)) is not None and entry != name:
            why = f"its name contains {entry}, which is on the ignore list: vLLM would take its codes for numbers"
            yield _found("ignore-covers", unit.entry.name, why)


def _transposed(plan: ExportPlan) -> Iterator[Finding]:
    # Weights stored (in, out) need a loader that transposes FP8 codes, and an artifact that declares them so.
    structure, declared = plan.structure, plan.source.transposed
    served = structure.model_type in plan.schema.conv1d_model_types
    for unit in plan.units:
        if not unit.quantized:
            continue
        expert = structure.is_expert(unit.module) and structure.model_type in plan.schema.stacked_model_types
        if unit.transposed and not (served or expert):
            why = (
                f"stored (in, out), and vLLM {plan.schema.vllm_version}'s loader of {structure.model_type} "
                "is not known to transpose FP8 codes"
            )
            yield _found("transposed-weight", unit.entry.name, why)
        stem = unit.entry.name.removesuffix(".weight")
        if declared is not None and unit.transposed != (stem in declared):
            why = f"the artifact says transposed={stem in declared}, the model says {unit.transposed}"
            yield _found("orientation", unit.entry.name, why)
