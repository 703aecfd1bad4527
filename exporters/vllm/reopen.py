"""Opens a written export independently of its writer: to compare it with its source, or to load it as a model.

The comparison does not use the code that wrote the files: names and shapes come from the written headers, the
quantization block from the written config.json, and the expected weight from the source's numbers, decoded and rounded
by plain arithmetic that shares nothing with the quantizer (`numerics.plain`). Each comparison becomes a gate in the
manifest; a failed gate fails the export. A later validation evaluates the same gates again (`file_gates`).

The loaded model holds `code * scale`, computed in fp32 and rounded once to the requested dtype. It does not quantize
activations, so it is the reference for `w8a16`, for `bf16`, and for engines that dequantize at load time; a W8A8 engine
differs from it by the rounding of activations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporters.vllm.blocks import blocks_of, by_unit, scale_of
from exporters.vllm.inputs import inputs_gate
from exporters.vllm.kv_cache import is_kv_scale, scales_gate
from exporters.vllm.nvfp4 import stored_layout
from exporters.vllm.options import ExportFormat
from exporters.vllm.plan import Action, ExportPlan, Unit
from exporters.vllm.reopen_files import none_differing, other_files
from exporters.vllm.reopen_nvfp4 import NVFP4_ERROR_BOUND, compare_packed, global_scales_gate, rounded
from exporters.vllm.target import KIND, VllmDetails
from fp8pipe.artifact import Comparison, Gate, open_artifact
from fp8pipe.models.checkpoint.packed import join_packed
from fp8pipe.models.checkpoint.rows import each, read_rows
from fp8pipe.models.checkpoint.tensors import SCALE_SUFFIX, TensorEntry, is_scale, read_tensor, weight_entries
from fp8pipe.models.language.structure import build_model
from fp8pipe.numerics.blocks import dequantize_blocks
from fp8pipe.numerics.grids import dequantize_weight, same_bits
from fp8pipe.numerics.plain import dequantize_plain, quantize_plain, round_bf16, row_errors, squares

# Half a unit in the last place, relative: E4M3 has 3 explicit mantissa bits, bf16 has 7. The E4M3 bound holds
# for the norm of all elements that share a scale, a row or a block, because their amax sits at 448, where the grid's
# absolute floor of 2^-10 is negligible; 0.1 % covers the fp32 rounding of the norm and of `code * scale`.
E4M3_ERROR_BOUND = 2.0**-4 * 1.001
BF16_ERROR_BOUND = 2.0**-8 * 1.001


@dataclass(slots=True)
class _Comparison:
    """The differences found so far."""

    weights: list[str] = field(default_factory=list)  # names of weights whose values differ
    copies: list[str] = field(default_factory=list)  # names of copied tensors whose bytes differ
    rounding: float = 0.0  # largest relative error of a row or block that was rounded to E4M3 or NVFP4
    bf16_error: float = 0.0  # largest relative error of a tensor that was rounded to bf16
    amax: dict[str, float] = field(default_factory=dict)  # largest magnitudes of weights in NVFP4, by name
    counts: Counter[Action] = field(default_factory=Counter)  # number of compared tensors by action


@dataclass(frozen=True, slots=True)
class _Block:
    """The result of comparing one block of rows."""

    same: bool  # whether the written values are bit-identical to the expected ones
    row_error: float = 0.0  # the largest relative error of a row, or of a block, for weights rounded to codes
    amax: float = 0.0  # the largest magnitude in the source, for weights rounded to NVFP4
    squares: tuple[float, float] = (0.0, 0.0)  # sums of squares of errors and of values, for weights rounded to bf16


def reopen(
    plan: ExportPlan,
    root: Path,
    advance: Callable[[], None] = lambda: None,
    on_file: Callable[[Path], None] = lambda file: None,
) -> list[Gate]:
    """Compare the written directory with its source, reading each once.

    Args:
        plan: plan of the export.
        root: the written directory.
        advance: called once per weight.
        on_file: called with every weight file, written or of the source, just before its first tensor is read.

    Returns:
        Gates, which may have failed; the caller decides what to do then.

    Raises:
        BadArtifactError: the written files cannot be read at all.
    """
    written = weight_entries(root)
    gates = [_tensor_set(plan, written)]
    if not gates[0].passed:
        return gates
    found, begun = _Comparison(), set[Path]()
    for shard in plan.shards:
        entries = (e for unit in shard for e in (unit.entry, unit.scale, *(written[o.name] for o in unit.outputs)))
        for file in dict.fromkeys(entry.file for entry in entries if entry is not None):
            if file not in begun:
                on_file(file)
                begun.add(file)
        for unit, blocks in by_unit(shard, lambda unit, rows: _compare(unit, rows, written)):
            _add(found, unit, blocks)
            advance()
    gates += _weight_gates(plan, found)
    if plan.options.format.packed:
        gates.append(global_scales_gate(plan, found.amax, written))
    size, detail = (
        sum(entry.size_bytes for entry in written.values()),
        "tensor data written, bytes; must equal the plan",
    )
    payload = Gate(name="payload-bytes", value=float(size), threshold=float(plan.payload_bytes), detail=detail)
    return [*gates, payload, *_added_scales(plan, written), *other_files(plan, root)]


def file_gates(plan: ExportPlan, root: Path) -> list[Gate]:
    """All gates except those on weights: the set of tensors, scales of cache and inputs, other files, and config.json.

    Raises:
        BadArtifactError: the written files cannot be read at all.
    """
    written = weight_entries(root)
    return [_tensor_set(plan, written), *_added_scales(plan, written), *other_files(plan, root)]


def expected_blocks(unit: Unit) -> Generator[Tensor, None, None]:
    """The values that a unit's weight must represent, computed by plain arithmetic, in blocks of rows (first axis).

    Yields:
        fp32, as oriented in the source; non-float tensors with action COPY are returned unchanged.
    """
    return each(lambda rows: _expected(unit, *_source(unit, rows)), blocks_of(unit))


def source_values(unit: Unit) -> Tensor:
    """The values of a unit's weight in the source, fp32; FP8 codes are dequantized."""
    return _values(unit, *_source(unit, _all(unit)))


def _all(unit: Unit) -> range:
    return range(unit.entry.shape[0] if unit.entry.shape else 1)


def _source(unit: Unit, rows: range) -> tuple[Tensor, Tensor | None]:
    """A block of a unit's rows as stored in the source, and its scale."""
    return read_rows(unit.entry, rows), None if unit.scale is None else scale_of(unit.scale, unit, rows)


def _values(unit: Unit, original: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return original.float()
    return dequantize_plain(original, scale, transposed=unit.transposed, block=unit.block)


def _expected(unit: Unit, original: Tensor, scale: Tensor | None) -> Tensor:
    if unit.packed and unit.action is Action.QUANTIZE:
        return rounded(unit, original, scale).values
    if unit.action is Action.QUANTIZE:
        return quantize_plain(original, transposed=unit.transposed, block=unit.block)
    if unit.action is Action.COPY and scale is None:
        return original.float() if original.is_floating_point() else original
    values = _values(unit, original, scale)
    return values if unit.action is Action.CODES else round_bf16(values)


def _compare(unit: Unit, rows: range, written: dict[str, TensorEntry]) -> _Block:
    # Compare one block of a unit's rows in the written file with the values that it must have.
    if unit.packed:
        found = compare_packed(unit, rows, written)
        return _Block(found.same, row_error=found.error, amax=found.amax)
    exported = read_rows(written[unit.outputs[0].name], rows)
    original, scale = _source(unit, rows)
    if unit.action is Action.COPY:
        return _Block(same_bits(exported, original))
    values = _values(unit, exported, scale_of(written[unit.outputs[1].name], unit, rows) if unit.quantized else None)
    same = same_bits(values, _expected(unit, original, scale))
    if unit.action is Action.CODES:
        return _Block(same)
    true = _values(unit, original, scale)
    if unit.action is Action.QUANTIZE:
        return _Block(same, row_error=row_errors(values, true, transposed=unit.transposed, block=unit.block))
    return _Block(same, squares=squares(values, true))


def _add(found: _Comparison, unit: Unit, blocks: list[_Block]) -> None:
    """Add the results of a unit's blocks to the comparison."""
    found.counts[unit.action] += 1
    if not all(block.same for block in blocks):
        (found.copies if unit.action is Action.COPY else found.weights).append(unit.entry.name)
    if unit.packed:
        found.amax[unit.entry.name] = max((block.amax for block in blocks), default=0.0)
    for block in blocks:
        found.rounding = _larger(found.rounding, block.row_error)
    error, norm = (math.fsum(block.squares[part] for block in blocks) for part in (0, 1))
    whole = math.sqrt(error / norm) if norm > 0 else math.inf if error > 0 else error
    found.bf16_error = _larger(found.bf16_error, whole)


def _larger(a: float, b: float) -> float:
    """The larger of two values; NaN if either is NaN."""
    return b if b != b or b > a else a


def _weight_gates(plan: ExportPlan, found: _Comparison) -> list[Gate]:
    count = found.counts
    fresh, rounded = count[Action.QUANTIZE], count[Action.DEQUANTIZE] + count[Action.CAST]
    how = (
        f"{count[Action.CODES]} weight(s) with the source's codes against its code * scale; {fresh} quantized "
        f"here against the source rounded by an independent implementation; {rounded} in bf16 against the source's "
        "values (code * scale for FP8 codes) rounded once to bf16"
    )
    gates = [
        none_differing("weights-bit-exact", found.weights, how),
        none_differing("copied-tensors-identical", found.copies, f"{count[Action.COPY]} tensor(s), byte for byte"),
    ]
    form = plan.options.format
    if fresh:
        detail = f"worst {'row' if form.weight_granularity == 'per-channel' else 'block'}, relative norm"
        bound = NVFP4_ERROR_BOUND if form.packed else E4M3_ERROR_BOUND
        gates.append(_at_most(f"{form.codes}-rounding-error", found.rounding, bound, detail))
    if rounded:
        gates.append(_at_most("bf16-rounding-error", found.bf16_error, BF16_ERROR_BOUND, "worst tensor, relative norm"))
    return gates


def _tensor_set(plan: ExportPlan, written: dict[str, TensorEntry]) -> Gate:
    planned = {output.name: (output.dtype, output.shape) for unit in plan.units for output in unit.outputs}
    planned |= {name: ("F32", plan.layout.shape) for name in (*plan.kv_tensors, *plan.input_names)}
    found = {name: (entry.dtype, entry.shape) for name, entry in written.items()}
    wrong = [name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name)]
    return none_differing("tensors-as-planned", sorted(wrong), f"names, dtypes and shapes of {len(planned)} tensor(s)")


def _added_scales(plan: ExportPlan, written: dict[str, TensorEntry]) -> list[Gate]:
    gates = [scales_gate(plan.kv_tensors, written, plan.layout.shape)] if plan.kv_cache else []
    return [*gates, inputs_gate(plan, written)] if plan.input_names else gates


def _at_most(name: str, value: float, threshold: float, detail: str) -> Gate:
    return Gate(name=name, value=value, comparison=Comparison.AT_MOST, threshold=threshold, detail=detail)


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def iter_weights(export: Path) -> Iterator[tuple[str, Tensor]]:
    """Read the weights of an export, with one tensor in memory at a time.

    Yields:
        Name and values of every weight, without scales, in the stored orientation: fp32 for float tensors (FP8 codes
        are dequantized), the stored dtype for others.

    Raises:
        BadArtifactError: not a finished vllm-export, or damaged.
    """
    artifact = open_artifact(export, kind=KIND, verify=False)
    details = artifact.manifest.details_of(VllmDetails)
    transposed, block = set(details.transposed), ExportFormat(details.format).block
    entries, layout = join_packed(weight_entries(Path(export))), stored_layout(artifact)
    for name, entry in entries.items():
        if is_scale(name, entries) or is_kv_scale(name) or name.endswith(layout.inputs):
            continue
        tensor, scale = read_tensor(entry), entries.get(name + SCALE_SUFFIX)
        if scale is not None:
            factor = read_tensor(scale)
            yield name, (
                dequantize_weight(tensor, factor, transposed=name in transposed) if block is None
                else dequantize_blocks(tensor, factor, block)
            )  # fmt: skip
        else:
            yield name, tensor.float() if tensor.is_floating_point() else tensor.clone()


def load_torch_model(export_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model with the export's dequantized weights, in evaluation mode, on the CPU.

    Weights are rounded once from fp32 to `dtype`, which is used for parameters and computation.

    Raises:
        BadArtifactError: not a finished vllm-export, or damaged.
        ConfigurationError: an architecture that transformers does not know.
    """
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in iter_weights(export_dir)}
    return build_model(Path(export_dir), state, dtype)
