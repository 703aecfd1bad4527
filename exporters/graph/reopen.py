"""Reads a written graph back and compares every number in it with the artifact, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporters.graph.formats import OnnxFormat
from exporters.graph.layers import ExportedLayer, Operand, StoredWeight
from exporters.graph.trace import ProductKind
from fp8pipe.artifact import Gate, none_of
from fp8pipe.models.vision.quantized import Codes, QuantizedVit, Quantizer
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BlockCodes, BlockQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir


def reopen_gates(
    model: ir.Model, layers: Sequence[ExportedLayer], quantized: QuantizedVit, format: OnnxFormat
) -> list[Gate]:
    """Compare a graph that was read from its file, and its layers, with the artifact's model.

    Returns gates on codes, scales, quantizers and float tensors; each value is a number of differences, and 0 passes.
    """
    by_label = {layer.label: layer for layer in layers}
    codes, scales = _weights(by_label, quantized)
    quantizers = _quantizers(layers, quantized, format)
    floats, copies = _float_tensors(model, by_label, quantized)
    return [
        none_of("weight codes differing", codes, f"of {sum(w.codes.numel() for w in quantized.weights.values())}"),
        none_of("weight scales differing", scales, f"of {sum(w.scale.numel() for w in quantized.weights.values())}"),
        none_of("activation quantizers differing", *quantizers),
        none_of("float tensors differing", *floats),
        none_of("float copies of quantized weights", *copies),
    ]


def _weights(layers: Mapping[str, ExportedLayer], quantized: QuantizedVit) -> tuple[int, int]:
    # Count differing weight codes and weight scales; all of a layer count if it is missing or of another shape.
    codes = scales = 0
    for name, weight in quantized.weights.items():
        layer = layers.get(name)
        stored = None if layer is None else layer.operands[1].weight
        # A patch embedding is stored with four axes or, if it is unfolded, with two.
        theirs, ours = None if stored is None else stored.codes.flatten(1), weight.codes.flatten(1)
        if stored is None or theirs is None or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            codes, scales = codes + weight.codes.numel(), scales + weight.scale.numel()
            continue
        codes += int((theirs.contiguous().view(torch.uint8) != ours.contiguous().view(torch.uint8)).sum())
        scales += _differing_scales(stored, weight)
    return codes, scales


def _differing_scales(stored: StoredWeight | BlockCodes, weight: Codes) -> int:
    if isinstance(stored, BlockCodes) and isinstance(weight, BlockCodes):
        blocks = (scales.block.contiguous().view(torch.uint8) for scales in (stored.scales, weight.scales))
        return int((next(blocks) != next(blocks)).sum()) + int(stored.scales.tensor != weight.scales.tensor)
    return int((stored.scale.view(torch.int32) != weight.scale.contiguous().view(torch.int32)).sum())


def _quantizers(layers: Sequence[ExportedLayer], quantized: QuantizedVit, format: OnnxFormat) -> tuple[int, str]:
    # Count operands whose activation quantizer differs from the artifact's, with a detail for the gate.
    wrong, seen = [], 0
    wanted = quantized.activations if format.quantizes_activations else {}
    for site, operand in operand_at_sites(layers, quantized):
        seen += 1
        expected = wanted.get(site)
        found = None if operand is None else operand.quantizer
        exact = operand is not None and operand.exact_limits
        if operand is None or not exact or not _same(found, expected):
            wrong.append(site)
    return len(wrong), f"of {seen} operands{'; the first: ' + wrong[0] if wrong else ''}"


def _same(found: Quantizer | None, expected: Quantizer | None) -> bool:
    if found is None or expected is None:
        return found is expected
    if isinstance(found, BlockQuantizer) or isinstance(expected, BlockQuantizer):
        return found == expected
    codes = (found.low, found.high) == (expected.low, expected.high) or found.kind is Kind.E4M3
    return codes and (found.scale, found.kind) == (expected.scale, expected.kind)


def operand_at_sites(layers: Sequence[ExportedLayer], quantized: QuantizedVit) -> Iterable[tuple[str, Operand | None]]:
    """Pairs of an activation site and its operand in the file, None if missing; a site occurs once per consumer."""
    by_label = {layer.label: layer for layer in layers}
    for linear in quantized.structure.linears:
        layer = by_label.get(linear.name)
        yield f"{linear.input_group}.input", None if layer is None else layer.operands[0]
    for attention in quantized.structure.attentions:
        for kind, names in ((ProductKind.QK, ("q", "k")), (ProductKind.AV, ("probs", "v"))):
            layer = by_label.get(f"{attention.name}.{kind}")
            for position, what in enumerate(names):
                yield f"{attention.name}.{what}", None if layer is None else layer.operands[position]


def _float_tensors(
    model: ir.Model, layers: Mapping[str, ExportedLayer], quantized: QuantizedVit
) -> tuple[tuple[int, str], tuple[int, str]]:
    """Count stored tensors that differ from the parameter of the same name, and float copies of quantized weights.

    Both counts come with a detail for the gate.
    """
    state = quantized.model.state_dict()
    different, copies, compared = [], [], 0
    for name, value in model.graph.initializers.items():
        if value.const_value is None or value.dtype is None or value.dtype.name not in ("FLOAT", "DOUBLE"):
            continue
        tensor = torch.from_numpy(value.const_value.numpy().copy())
        owner = name.rpartition(".")[0]
        if name in state and name != f"{owner}.weight_scale":
            compared += 1
            different += [] if _equal(tensor, state[name]) else [name]
        copies += [name for weight in quantized.weights.values() if _is_copy(tensor, weight.dequantize())]
    for name, layer in layers.items():
        bias = state.get(f"{name}.bias")
        if bias is not None:
            compared += 1
            different += [] if layer.bias is not None and _equal(layer.bias, bias) else [f"{name}.bias"]
    detail = f"of {compared}{'; the first: ' + different[0] if different else ''}"
    return (len(different), detail), (len(copies), ", ".join(copies[:3]))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.flatten().double(), b.flatten().double())


def _is_copy(tensor: Tensor, weight: Tensor) -> bool:
    # Whether a stored tensor equals a dequantized weight or its transpose.
    if tensor.numel() != weight.numel() or weight.dim() < 2:
        return False
    tensor = tensor.float()
    return any(tensor.shape == form.shape and torch.equal(tensor, form) for form in (weight, weight.mT))
