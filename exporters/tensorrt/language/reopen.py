"""Read the written graph again and compare every number in it with the artifact, and every layer with exact sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from exporters.graph.layers import ExportedLayer
from exporters.graph.parity import LayerParity, compare_layers, input_name
from exporters.tensorrt.language.calibrate import pre_hooks
from exporters.tensorrt.language.source import LanguageModel
from exporters.tensorrt.language.target import InputScale
from exporters.tensorrt.parity import typed_gates
from fp8pipe.artifact import Gate, none_of
from fp8pipe.models.checkpoint.tensors import spellings
from fp8pipe.models.language.text import Encoded
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import ActivationQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOATS: Final = ("FLOAT", "FLOAT16")
# Layers whose codes are compared in one session: what is cut out of the graph must fit one protobuf message.
_AT_ONCE: Final = 32


def number_gates(
    layers: Sequence[ExportedLayer], graph: ir.Model, model: LanguageModel, scales: Mapping[str, InputScale]
) -> list[Gate]:
    """Compare a graph that was read from its file with the artifact, and its scales with those measured.

    The gates' value is a count, and 0 passes.
    """
    by_name = {layer.name: layer for layer in layers}
    codes = weight_scales = inputs = 0
    for name, weight in model.weights.items():
        layer = by_name.get(name)
        stored = None if layer is None else layer.operands[1].weight
        if layer is None or stored is None or stored.codes.shape != weight.codes.shape:
            codes, weight_scales, inputs = codes + weight.codes.numel(), weight_scales + 1, inputs + 1
            continue
        codes += int((stored.codes.contiguous().view(torch.uint8) != weight.codes.view(torch.uint8)).sum())
        weight_scales += int(not torch.equal(stored.scale.float(), weight.scale))
        quantizer = layer.operands[0].quantizer
        plain = quantizer if isinstance(quantizer, ActivationQuantizer) else None
        wrong = plain is None or plain.kind is not Kind.E4M3 or plain.scale != scales[name].scale
        inputs += int(wrong or layer.operands[0].source is None)
    different, strays, compared = _float_tensors(graph, model)
    total = sum(weight.codes.numel() for weight in model.weights.values())
    return [
        none_of("weight codes differing", codes, f"of {total} in {len(model.weights)} layers"),
        none_of("weight scales differing", weight_scales, f"of {len(model.weights)} layers"),
        none_of("activation scales differing", inputs, f"of {len(model.weights)} layers, against the calibration"),
        none_of("float tensors differing", len(different), f"of {compared}{_first(different)}"),
        none_of("float matrices that are not the artifact's", len(strays), _first(strays).removeprefix("; ")),
    ]


def layer_gates(
    layers: Sequence[ExportedLayer], graph: ir.Model, reference: nn.Module, example: Encoded
) -> tuple[list[Gate], list[LayerParity]]:
    """Run every layer in ONNX Runtime on the input that it has in torch, and compare it with exact sums.

    The nodes, codes and scales are the file's; products add up in float64 (`exporters/tensorrt/parity.py`).

    `graph` is changed in place: its stored tensors become float32, as `reference` is.
    """
    _widen(graph)
    inputs = _inputs(layers, reference, example)
    report: list[LayerParity] = []
    for start in range(0, len(layers), _AT_ONCE):
        part = layers[start : start + _AT_ONCE]
        names = dict.fromkeys(input_name(x.operands[0].source) for x in part if x.operands[0].source is not None)
        report += compare_layers(graph, part, {name: inputs[name] for name in names}, optimize=False)
    return typed_gates(report), report


def _inputs(layers: Sequence[ExportedLayer], reference: nn.Module, example: Encoded) -> dict[str, Any]:
    """The float inputs of all layers, by their names in the cut graph."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x.detach()

    with pre_hooks(reference, {x.name: partial(keep, x.name) for x in layers}), torch.no_grad():
        reference(input_ids=torch.tensor([example.input_ids]), use_cache=False)
    sources = ((layer.name, layer.operands[0].source) for layer in layers)
    return {input_name(source): seen[name].contiguous().numpy() for name, source in sources if source is not None}


def _widen(graph: ir.Model) -> None:
    """Stored FP16 tensors become float32, each number the same."""
    import onnx_ir as ir

    for value in graph.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=str(value.name))
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _float_tensors(graph: ir.Model, model: LanguageModel) -> tuple[list[str], list[str], int]:
    """Tensors of the artifact that are stored with other values; float matrices that are none of the artifact's."""
    stored = {
        name: np.array(value.const_value.numpy())
        for name, value in graph.graph.initializers.items()
        if value.const_value is not None and value.dtype is not None and value.dtype.name in _FLOATS
    }
    prefix, aliases = model.plan.structure.base_prefix, model.plan.structure.tied
    different, compared, known = [], 0, set()
    for name, tensor in model.floats.items():
        names = list(spellings(name, prefix))
        names += [tied for tied, original in aliases.items() if original in names]  # the tracer takes either name
        found = next((n for n in names if n in stored), None)
        wanted = tensor.float().numpy()
        if found is not None:
            compared += 1
            known.add(found)
            different += [] if _rounded_once(stored[found], wanted) else [name]
        elif wanted.ndim > 1:  # a head is stored transposed, under a name of the tracer
            compared += 1
            match = [n for n, array in stored.items() if array.ndim > 1 and _rounded_once(array, wanted.T)]
            known.update(match)
            different += [] if match else [name]
    return different, [n for n, array in stored.items() if array.ndim > 1 and n not in known], compared


def _rounded_once(found: Any, wanted: Any) -> bool:
    return found.shape == wanted.shape and np.array_equal(found, wanted.astype(found.dtype))


def _first(names: Sequence[str]) -> str:
    return f"; the first: {names[0]}" if names else ""
