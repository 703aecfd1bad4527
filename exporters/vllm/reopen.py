"""An export is opened as a third party would: compared with its source, bit for bit, or read back as a model.

The comparison does not go through the code that wrote the files: names and shapes come from the written headers, the
quantization block from the written config.json, and the expected weight from the source's own codes and scale. Each
comparison becomes a gate in the manifest; a failed gate fails the export.

The model holds `code * scale`, computed in fp32 and rounded once to the dtype asked for. It quantizes no activations,
so it is the reference for `w8a16`, for `bf16`, and for engines that dequantize at load; a W8A8 engine differs from it
by the rounding of activations.
"""

from __future__ import annotations

import filecmp
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporters.vllm.plan import Action, ExportPlan, Unit
from exporters.vllm.target import KIND, VllmDetails
from exporters.vllm.writer import CONFIG_NAME
from fp8pipe.artifact import Comparison, Gate, open_artifact
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_files
from fp8pipe.models.checkpoint.tensors import SCALE_SUFFIX, TensorEntry, is_scale, read_tensor, weight_entries
from fp8pipe.models.language.structure import build_model
from fp8pipe.numerics.grids import dequantize_weight, quantize_weight, relative_error, same_bits

# Half a unit in the last place, relative: E4M3 has 3 explicit mantissa bits, bf16 has 7. The E4M3 bound holds
# for a row's norm because its amax sits at 448, where the grid's absolute floor of 2^-10 is negligible; 0.1 %
# covers the fp32 rounding of the norm and of the product.
E4M3_ERROR_BOUND = 2.0**-4 * 1.001
BF16_ERROR_BOUND = 2.0**-8 * 1.001


@dataclass(slots=True)
class _Comparison:
    """What differs so far."""

    weights: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    e4m3_error: float = 0.0
    bf16_error: float = 0.0
    counts: Counter[Action] = field(default_factory=Counter)


def reopen(plan: ExportPlan, root: Path, advance: Callable[[], None] = lambda: None) -> list[Gate]:
    """Compare the written directory with its source; `advance` is called once per weight.

    The gates may fail; the caller decides what that means.

    Raises:
        BadArtifactError: the written files cannot be read at all.
    """
    written = weight_entries(root)
    gates = [_tensor_set(plan, written)]
    if not gates[0].passed:
        return gates
    comparison = _Comparison()
    for unit in plan.units:
        _compare(unit, written, comparison)
        comparison.counts[unit.action] += 1
        advance()
    gates += _weight_gates(comparison)
    size, detail = (
        sum(entry.size_bytes for entry in written.values()),
        "tensor data written, bytes; must equal the plan",
    )
    payload = Gate(name="payload-bytes", value=float(size), threshold=float(plan.payload_bytes), detail=detail)
    return [*gates, payload, _files(plan, root), _config(plan, root)]


def _compare(unit: Unit, written: dict[str, TensorEntry], found: _Comparison) -> None:
    exported = read_tensor(written[unit.outputs[0].name])
    original = read_tensor(unit.entry)
    if unit.action is Action.COPY:
        if not same_bits(exported, original):
            found.copies.append(unit.entry.name)
        return
    values = exported
    if unit.quantized:
        scale = read_tensor(written[unit.outputs[1].name])
        values = dequantize_weight(exported, scale, transposed=unit.transposed)
    if not same_bits(values, _expected(original, unit)):
        found.weights.append(unit.entry.name)
    if unit.action is Action.QUANTIZE:
        axis = 0 if unit.transposed else 1  # the worst output row
        error = torch.linalg.vector_norm(original.float() - values, dim=axis)
        norm = torch.linalg.vector_norm(original, dim=axis, dtype=torch.float32)
        found.e4m3_error = max(found.e4m3_error, float((error / norm.clamp(min=1e-30)).max()))
    elif unit.action in {Action.DEQUANTIZE, Action.CAST}:
        found.bf16_error = max(found.bf16_error, relative_error(values, _source_values(original, unit)))


def _source_values(original: Tensor, unit: Unit) -> Tensor:
    """The source's own reading of its weight, fp32."""
    if unit.scale is None:
        return original.float()
    return dequantize_weight(original, read_tensor(unit.scale), transposed=unit.transposed)


def _expected(original: Tensor, unit: Unit) -> Tensor:
    if unit.action is Action.QUANTIZE:
        codes, scale = quantize_weight(original, transposed=unit.transposed)
        return dequantize_weight(codes, scale, transposed=unit.transposed)
    values = _source_values(original, unit)
    return values if unit.action is Action.CODES else values.to(torch.bfloat16)


def _weight_gates(found: _Comparison) -> list[Gate]:
    count = found.counts
    fresh, rounded = count[Action.QUANTIZE], count[Action.DEQUANTIZE] + count[Action.CAST]
    how = (
        f"{count[Action.CODES]} weight(s) of codes against the source's code * scale in fp32; {fresh} quantized here "
        f"against a second quantization of the source; {rounded} in bf16 against the source's values "
        "(code * scale where it holds codes) rounded once to bf16"
    )
    gates = [
        _none("weights-bit-exact", found.weights, how),
        _none("copied-tensors-identical", found.copies, f"{count[Action.COPY]} tensor(s), byte for byte"),
    ]
    if fresh:
        gates.append(_at_most("e4m3-rounding-error", found.e4m3_error, E4M3_ERROR_BOUND, "worst row, relative norm"))
    if rounded:
        gates.append(_at_most("bf16-rounding-error", found.bf16_error, BF16_ERROR_BOUND, "worst tensor, relative norm"))
    return gates


def _tensor_set(plan: ExportPlan, written: dict[str, TensorEntry]) -> Gate:
    planned = {output.name: (output.dtype, output.shape) for unit in plan.units for output in unit.outputs}
    found = {name: (entry.dtype, entry.shape) for name, entry in written.items()}
    wrong = [name for name in planned.keys() | found.keys() if planned.get(name) != found.get(name)]
    return _none("tensors-as-planned", sorted(wrong), f"names, dtypes and shapes of {len(planned)} tensor(s)")


def _files(plan: ExportPlan, root: Path) -> Gate:
    source = plan.source.root
    names = list(sidecar_files(source, SERVED_FILES))
    wrong = [
        str(name)
        for name in names
        if not (root / name).is_file() or not filecmp.cmp(source / name, root / name, shallow=False)
    ]
    return _none("auxiliary-files-identical", wrong, f"{len(names)} file(s), byte for byte")


def _config(plan: ExportPlan, root: Path) -> Gate:
    """config.json differs from the source's in the keys this exporter owns, and in no other."""
    config = json.loads((root / CONFIG_NAME).read_text(encoding="utf-8"))
    owned = {"quantization_config"} | (set() if plan.options.format.quantized else {"dtype", "torch_dtype"})
    keys = (config.keys() | plan.source.config.keys()) - owned
    wrong = [key for key in sorted(keys) if config.get(key) != plan.source.config.get(key)]
    if plan.options.format.quantized != ("quantization_config" in config):
        wrong.append("quantization_config")
    return _none("config-preserved", wrong, f"config.json, all keys but {', '.join(sorted(owned))}")


def _none(name: str, wrong: list[str], detail: str) -> Gate:
    if wrong:
        detail = f"{detail}; differing: {', '.join(wrong[:5])}" + (" ..." if len(wrong) > 5 else "")
    return Gate(name=name, value=float(len(wrong)), detail=detail)


def _at_most(name: str, value: float, threshold: float, detail: str) -> Gate:
    return Gate(name=name, value=value, comparison=Comparison.AT_MOST, threshold=threshold, detail=detail)


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def iter_weights(export: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an export but its scales, by name, file by file, one in memory at a time.

    Yields:
        fp32 for float tensors (FP8 codes dequantized), the stored dtype for others; in the orientation stored.

    Raises:
        BadArtifactError: not a finished vllm-export, or damaged.
    """
    artifact = open_artifact(export, kind=KIND, verify=False)
    transposed = set(artifact.manifest.details_of(VllmDetails).transposed)
    entries = weight_entries(Path(export))
    for name, entry in entries.items():
        if is_scale(name, entries):
            continue
        tensor, scale = read_tensor(entry), entries.get(name + SCALE_SUFFIX)
        if scale is not None:
            yield name, dequantize_weight(tensor, read_tensor(scale), transposed=name in transposed)
        else:
            yield name, tensor.float() if tensor.is_floating_point() else tensor.clone()


def load_torch_model(export_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model with the export's dequantized weights, in evaluation mode, on the CPU.

    Weights are rounded to `dtype`, that of parameters and compute, once, from fp32.

    Raises:
        BadArtifactError: not a finished vllm-export, or damaged.
        ConfigurationError: an architecture transformers does not know.
    """
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in iter_weights(export_dir)}
    return build_model(Path(export_dir), state, dtype)
