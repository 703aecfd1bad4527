"""Read the written graph back and check its stored numbers and the output of each linear layer.

Stored numbers are compared with those of the artifact, and the outputs of layers with float64 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters.graph.layers import ExportedLayer, StoredWeight, read_layers
from exporters.graph.parity import (
    LayerParity,
    compare_layers,
    cut_layers,
    input_name,
    judge_layers,
    sources_of,
    way_between,
)
from exporters.graph.trace import stored_array
from exporters.tensorrt.language.calibrate import pre_hooks
from exporters.tensorrt.language.chain import release
from exporters.tensorrt.language.graph import TRANSPOSED
from exporters.tensorrt.language.source import LanguageModel
from exporters.tensorrt.language.target import InputScale
from exporters.tensorrt.parity import evaluate_graph, typed_gates
from fp8pipe.artifact import Gate, none_of
from fp8pipe.models.language.text import Encoded
from fp8pipe.numerics.grids import same_bits
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BlockCodes
from fp8pipe.numerics.quantizers import ActivationQuantizer, WeightCodes

_FLOATS: Final = ("FLOAT", "FLOAT16")
# Number of layers that are compared in one session, whose part of the graph must fit into one protobuf message.
_AT_ONCE: Final = 32
_COMPARED: Final = 8  # number of layers whose codes are in memory at once


def number_gates(graph: ir.Model, model: LanguageModel, scales: Mapping[str, InputScale]) -> list[Gate]:
    """Compare the stored tensors of a graph with the artifact, and its activation scales with the calibrated ones.

    Few tensors are in memory at once.

    Args:
        graph: the graph, as read from its file.
        model: the artifact.
        scales: calibrated activation scales by layer; none for weights in NVFP4.

    Returns:
        Gates whose value is a number of differences; 0 passes.
    """
    codes = weight_scales = inputs = total = 0
    names = list(model.weights)
    for start in range(0, len(names), _COMPARED):
        part = names[start : start + _COMPARED]
        by_name = {layer.name: layer for layer in read_layers(graph, part, some=False)}
        for name in part:
            weight = model.weights[name]
            total += weight.codes.numel()
            layer = by_name.get(name)
            if isinstance(weight, BlockCodes):
                differing = (*_differing_blocks(layer, weight), 0)
            else:
                differing = _differing(layer, weight, scales[name].scale)
            codes, weight_scales, inputs = (
                a + b for a, b in zip((codes, weight_scales, inputs), differing, strict=True)
            )
        release(graph.graph.initializers.values())
    different, strays, compared = _float_tensors(graph, model)
    return [
        none_of("weight codes differing", codes, f"of {total} in {len(model.weights)} layers"),
        none_of("weight scales differing", weight_scales, f"of {len(model.weights)} layers"),
        *(
            []
            if model.packed
            else [
                none_of(
                    "activation scales differing", inputs, f"of {len(model.weights)} layers, against the calibration"
                )
            ]
        ),
        none_of("float tensors differing", len(different), f"of {compared}{_first(different)}"),
        none_of("float matrices that are not the artifact's", len(strays), _first(strays).removeprefix("; ")),
    ]


def _differing(layer: ExportedLayer | None, weight: WeightCodes, scale: float) -> tuple[int, int, int]:
    """Codes, scales and input scales of a layer that differ."""
    stored = None if layer is None else layer.operands[1].weight
    if layer is None or not isinstance(stored, StoredWeight) or stored.codes.shape != weight.codes.shape:
        return weight.codes.numel(), 1, 1
    codes = int((stored.codes.contiguous().view(torch.uint8) != weight.codes.view(torch.uint8)).sum())
    quantizer = layer.operands[0].quantizer
    plain = quantizer if isinstance(quantizer, ActivationQuantizer) else None
    wrong = plain is None or plain.kind is not Kind.E4M3 or plain.scale != scale
    unequal = not torch.equal(stored.scale.float(), weight.scale)
    return codes, int(unequal), int(wrong or layer.operands[0].source is None)


def _differing_blocks(layer: ExportedLayer | None, weight: BlockCodes) -> tuple[int, int]:
    """Codes of a layer in NVFP4 that differ, and 1 if its scales do or its input is quantized."""
    stored = None if layer is None else layer.operands[1].weight
    if layer is None or not isinstance(stored, BlockCodes) or stored.codes.shape != weight.codes.shape:
        return weight.codes.numel(), 1
    ours, theirs = stored.scales, weight.scales
    same = same_bits(ours.block, theirs.block) and ours.tensor == theirs.tensor
    plain = layer.operands[0].quantizer is None and layer.operands[0].source is not None
    return int((stored.codes != weight.codes).sum()), int(not (same and plain))


def layer_gates(
    layers: Sequence[ExportedLayer], graph: ir.Model, reference: nn.Module, example: Encoded
) -> tuple[list[Gate], list[LayerParity]]:
    """Run every quantized layer in ONNX Runtime on its input in torch, and compare the outputs with float64 sums.

    Args:
        layers: the quantized layers found in the graph.
        graph: the graph, as read from its file. It is changed in place: stored FP16 tensors become float32, like those
            of `reference`.
        reference: the torch model, from which the inputs of the layers are taken.
        example: the text to run.

    Returns:
        The gates (see `exporters/tensorrt/parity.py`), and the comparison of each layer.
    """
    inputs = _inputs(layers, reference, example)
    report: list[LayerParity] = []
    for start in range(0, len(layers), _AT_ONCE):
        report += compare_part(layers[start : start + _AT_ONCE], graph, inputs)
    return part_gates(report), report


def part_gates(report: Sequence[LayerParity]) -> list[Gate]:
    """Gates on the linears of a decoder; those of weights in NVFP4 read floats, so there are no codes to compare."""
    gates = typed_gates(report)
    return gates if any(layer.codes for layer in report) else gates[1:]


def compare_part(layers: Sequence[ExportedLayer], graph: ir.Model, seen: Mapping[str, Tensor]) -> list[LayerParity]:
    """Run some layers in ONNX Runtime on the inputs that they have in torch, by the layers' names.

    Those with weights in NVFP4 run in ONNX's reference evaluator. `graph` is changed in place: tensors that these
    layers store become float32.
    """
    _widen(layers)
    sources = ((layer.name, layer.operands[0].source) for layer in layers)
    inputs = {input_name(source): seen[name].contiguous().numpy() for name, source in sources if source is not None}
    if any(layer.blocks for layer in layers):
        found = evaluate_graph(cut_layers(graph, layers, wide=True), inputs)
        return judge_layers(layers, inputs, found, None, lambda layer: (0, 0))
    return compare_layers(graph, layers, inputs, optimize=False)


def _inputs(layers: Sequence[ExportedLayer], reference: nn.Module, example: Encoded) -> dict[str, Tensor]:
    """The inputs of all layers in torch, by name."""
    seen: dict[str, Tensor] = {}
    with pre_hooks(reference, keepers([layer.name for layer in layers], seen)), torch.no_grad():
        reference(input_ids=torch.tensor([example.input_ids]), use_cache=False)
    return seen


def keepers(names: Sequence[str], seen: dict[str, Tensor]) -> dict[str, Callable[[Tensor], None]]:
    """Hooks that keep the inputs of modules in `seen`."""

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x.detach()

    return {name: partial(keep, name) for name in names}


def _widen(layers: Sequence[ExportedLayer]) -> None:
    """Convert the FP16 tensors that layers store to float32, in place, without changing their values."""
    _, tensors, _ = way_between(sources_of(layers), [layer.output for layer in layers])
    for value in tensors:
        if value.dtype == ir.DataType.FLOAT16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=str(value.name))
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _float_tensors(graph: ir.Model, model: LanguageModel) -> tuple[list[str], list[str], int]:
    """Compare the float tensors of a graph with those of the artifact.

    Returns:
        Names of the artifact's tensors whose values in the graph differ or are missing; names of float matrices in the
        graph that are not in the artifact; the number of compared tensors.
    """
    stored = {
        name: value for name, value in graph.graph.initializers.items()
        if value.const_value is not None and value.dtype is not None and value.dtype.name in _FLOATS
    }  # fmt: skip
    matrices = [name for name, value in stored.items() if value.shape is not None and len(value.shape) > 1]
    known_as, aliases = model.plan.names, model.plan.structure.tied
    different, compared, known = [], 0, set()
    for name, tensor in model.floats.items():
        names = [known_as[name].name]
        names += [tied for tied, original in aliases.items() if original in names]  # the tracer may use either name
        found = next((n for n in names if n in stored), None)
        wanted = tensor.float().numpy()
        if found is not None:
            compared += 1
            known.add(found)
            different += [] if _rounded_once(stored_array(stored[found]), wanted) else [name]
        elif wanted.ndim > 1:  # an output head, stored transposed; the tracer names it in a graph traced as a whole
            compared += 1
            named = [n for n in (f"{n}{TRANSPOSED}" for n in names) if n in stored]
            match = [n for n in named or matrices if _rounded_once(stored_array(stored[n]), wanted.T)]
            known.update(match)
            different += [] if match else [name]
        release(stored.values())
    return different, [n for n in matrices if n not in known], compared


def _rounded_once(found: Any, wanted: Any) -> bool:
    """Whether an array is another one, rounded to its type."""
    return found.shape == wanted.shape and np.array_equal(found, wanted.astype(found.dtype))


def _first(names: Sequence[str]) -> str:
    return f"; the first: {names[0]}" if names else ""
