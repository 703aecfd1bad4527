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

import filecmp
import json
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exporters.vllm.blocks import blocks_of, by_unit, scale_of
from exporters.vllm.kv_cache import is_kv_scale, scales_gate
from exporters.vllm.options import ExportFormat
from exporters.vllm.plan import Action, ExportPlan, Unit
from exporters.vllm.resume import PROGRESS_NAME
from exporters.vllm.target import KIND, VllmDetails
from exporters.vllm.writer import CONFIG_NAME, export_config
from fp8pipe.artifact import CHECKSUM_NAME, MANIFEST_NAME, Comparison, Gate, open_artifact
from fp8pipe.models.checkpoint.rows import each, read_rows
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_files
from fp8pipe.models.checkpoint.tensors import (
    INDEX_NAME,
    SCALE_SUFFIX,
    TensorEntry,
    is_scale,
    read_tensor,
    shard_names,
    weight_entries,
)
from fp8pipe.models.language.ending import EOS, GENERATION_FILE
from fp8pipe.models.language.structure import build_model
from fp8pipe.numerics.blocks import dequantize_blocks
from fp8pipe.numerics.grids import dequantize_weight, same_bits
from fp8pipe.numerics.plain import dequantize_plain, quantize_plain, round_bf16, row_errors, squares
from fp8pipe.report.card import CARD_FILE

# Half a unit in the last place, relative: E4M3 has 3 explicit mantissa bits, bf16 has 7. The E4M3 bound holds
# for the norm of all elements that share a scale, a row or a block, because their amax sits at 448, where the grid's
# absolute floor of 2^-10 is negligible; 0.1 % covers the fp32 rounding of the norm and of `code * scale`.
E4M3_ERROR_BOUND = 2.0**-4 * 1.001
BF16_ERROR_BOUND = 2.0**-8 * 1.001
# Files of the artifact itself (`.lock`, and the progress during writing), and files that hubs add.
_PASSED_OVER = frozenset((MANIFEST_NAME, CHECKSUM_NAME, ".lock", PROGRESS_NAME, ".gitattributes", ".cache"))


@dataclass(slots=True)
class _Comparison:
    """The differences found so far."""

    weights: list[str] = field(default_factory=list)  # names of weights whose values differ
    copies: list[str] = field(default_factory=list)  # names of copied tensors whose bytes differ
    e4m3_error: float = 0.0  # largest relative error of a row or block that was rounded to E4M3
    bf16_error: float = 0.0  # largest relative error of a tensor that was rounded to bf16
    counts: Counter[Action] = field(default_factory=Counter)  # number of compared tensors by action


@dataclass(frozen=True, slots=True)
class _Block:
    """The result of comparing one block of rows."""

    same: bool  # whether the written values are bit-identical to the expected ones
    row_error: float = 0.0  # the largest relative error of a row, or of a block, for weights rounded to E4M3
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
    size, detail = (
        sum(entry.size_bytes for entry in written.values()),
        "tensor data written, bytes; must equal the plan",
    )
    payload = Gate(name="payload-bytes", value=float(size), threshold=float(plan.payload_bytes), detail=detail)
    return [*gates, payload, *_cache_scales(plan, written), *_other_files(plan, root)]


def file_gates(plan: ExportPlan, root: Path) -> list[Gate]:
    """All gates except those on weights: the set of tensors, scales of the cache, the other files, and config.json.

    Raises:
        BadArtifactError: the written files cannot be read at all.
    """
    written = weight_entries(root)
    return [_tensor_set(plan, written), *_cache_scales(plan, written), *_other_files(plan, root)]


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
    if unit.action is Action.QUANTIZE:
        return quantize_plain(original, transposed=unit.transposed, block=unit.block)
    if unit.action is Action.COPY and scale is None:
        return original.float() if original.is_floating_point() else original
    values = _values(unit, original, scale)
    return values if unit.action is Action.CODES else round_bf16(values)


def _compare(unit: Unit, rows: range, written: dict[str, TensorEntry]) -> _Block:
    # Compare one block of a unit's rows in the written file with the values that it must have.
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
    for block in blocks:
        found.e4m3_error = _larger(found.e4m3_error, block.row_error)
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
        f"{count[Action.CODES]} weight(s) with FP8 codes against the source's code * scale in fp32; {fresh} quantized "
        f"here against the source rounded by an independent implementation; {rounded} in bf16 against the source's "
        "values (code * scale for FP8 codes) rounded once to bf16"
    )
    gates = [
        _none("weights-bit-exact", found.weights, how),
        _none("copied-tensors-identical", found.copies, f"{count[Action.COPY]} tensor(s), byte for byte"),
    ]
    if fresh:
        detail = f"worst {'block' if plan.options.format.block else 'row'}, relative norm"
        gates.append(_at_most("e4m3-rounding-error", found.e4m3_error, E4M3_ERROR_BOUND, detail))
    if rounded:
        gates.append(_at_most("bf16-rounding-error", found.bf16_error, BF16_ERROR_BOUND, "worst tensor, relative norm"))
    return gates


def _tensor_set(plan: ExportPlan, written: dict[str, TensorEntry]) -> Gate:
    planned = {output.name: (output.dtype, output.shape) for unit in plan.units for output in unit.outputs}
    planned |= {name: ("F32", (1,)) for name in plan.kv_tensors}
    found = {name: (entry.dtype, entry.shape) for name, entry in written.items()}
    wrong = [name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name)]
    return _none("tensors-as-planned", sorted(wrong), f"names, dtypes and shapes of {len(planned)} tensor(s)")


def _cache_scales(plan: ExportPlan, written: dict[str, TensorEntry]) -> list[Gate]:
    return [scales_gate(plan.kv_tensors, written)] if plan.kv_cache else []


def _other_files(plan: ExportPlan, root: Path) -> list[Gate]:
    # Gates on all files besides the weights: none is missing, changed or unexpected.
    source = plan.source.root
    names = {str(path) for path in sidecar_files(source, SERVED_FILES)}
    changed = set() if plan.ending.settings is None else {GENERATION_FILE}
    names -= changed
    wrong = sorted(
        name for name in names if not (root / name).is_file() or not filecmp.cmp(source / name, root / name, False)
    )
    shards = shard_names(len(plan.shards))
    known = names | changed | {CONFIG_NAME, CARD_FILE, *shards} | ({INDEX_NAME} if len(shards) > 1 else set())
    there = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    unexpected = sorted(name for name in there - known if name.split("/")[0] not in _PASSED_OVER)
    detail = f"{len(names)} file(s), byte for byte, and no other that an engine might read"
    gates = [_none("auxiliary-files-identical", [*wrong, *unexpected], detail), _config(plan, root)]
    return gates if plan.ending.settings is None else [*gates, _generation(plan.ending.settings, root)]


def _generation(expected: dict[str, Any], root: Path) -> Gate:
    """Gate: generation_config.json equals the source's, except for an end-of-turn token added to `eos_token_id`."""
    path = root / GENERATION_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    wrong = [f"{GENERATION_FILE}: {key}" for key in _differing(found, expected)]
    return _none("generation-config-preserved", wrong, f"{GENERATION_FILE}, except {EOS}, which is {expected[EOS]}")


def _config(plan: ExportPlan, root: Path) -> Gate:
    """Gate: config.json equals the source's, except for the keys in `changed_on_purpose`."""
    config = json.loads((root / CONFIG_NAME).read_text(encoding="utf-8"))
    wrong = list(_differing(config, export_config(plan)))
    return _none("config-preserved", wrong, f"config.json, except {', '.join(_changed_keys(plan)) or 'nothing'}")


def changed_on_purpose(plan: ExportPlan) -> list[str]:
    """Keys of config.json and of generation_config.json whose values intentionally differ from the source's."""
    return [*_changed_keys(plan), *([] if plan.ending.settings is None else [f"{GENERATION_FILE}: {EOS}"])]


def _changed_keys(plan: ExportPlan) -> list[str]:
    config, before = export_config(plan), plan.source.config
    return sorted(key for key in config.keys() | before.keys() if config.get(key) != before.get(key))


def _differing(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Paths at which two JSON values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            missing = object()
            yield from _differing(found.get(key, missing), expected.get(key, missing), f"{path}.{key}".lstrip("."))
    elif found != expected or isinstance(found, bool) is not isinstance(expected, bool):
        yield path


def _none(name: str, wrong: list[str], detail: str) -> Gate:
    if wrong:
        detail = f"{detail}; differing: {', '.join(wrong[:5])}" + (" ..." if len(wrong) > 5 else "")
    return Gate(name=name, value=float(len(wrong)), detail=detail)


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
    entries = weight_entries(Path(export))
    for name, entry in entries.items():
        if is_scale(name, entries) or is_kv_scale(name):
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
