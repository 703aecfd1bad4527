"""A FALQON artifact as the graph that TensorRT builds well: its codes, static scales, float islands, and a cache.

The passes are those of the graph room, static quantizers before linears, scales in the base type, and a tied head. Q/DQ
pairs hold per-tensor scales. Queries, keys and values read one value of the graph, and so do gate and up: they share
one pair, and the builder makes one product of each group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from exporters.graph.passes.editing import Change, drop_unused, insert, quantize_value
from exporters.graph.passes.products import name_products, strip_metadata
from exporters.graph.passes.quantize import quantize_weights
from exporters.graph.trace import FloatGraph
from exporters.tensorrt.half import NotHalf, refuse_not_half
from exporters.tensorrt.language.source import LanguageModel
from exporters.tensorrt.language.trace import CacheShape, cache_shape, trace_decoder
from exporters.tensorrt.options import Base
from fp8pipe.artifact.finding import Finding, LintFindingsError

if TYPE_CHECKING:
    import onnx_ir as ir

TORCH_TYPES = {Base.FP16: torch.float16, Base.FP32: torch.float32}


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """The graph before it is written."""

    model: ir.Model  # strongly typed
    changes: tuple[Change, ...]  # what the passes did
    cache: CacheShape | None  # shape of the cache; none for a graph without one


def decoder_graph(model: LanguageModel, scales: Mapping[str, float], base: Base, *, cache: bool) -> DecoderGraph:
    """Trace and rewrite: static activation scales by layer, the type of what is not quantized, with or without a cache.

    Raises:
        ConfigurationError: it cannot be traced, or its layers are not found in the graph.
        LintFindingsError: a scale or a tensor that FP16 does not hold.
    """
    import onnx_ir as ir

    dtype = TORCH_TYPES[base]
    decoder = model.torch_model(dtype)
    refuse_overflow(model, dtype)
    traced = trace_decoder(decoder, list(model.weights), cache=cache)
    shape = cache_shape(decoder)
    changes = [
        strip_metadata(traced.model),  # first: it takes the tracer's prefix off names, and ours have none
        quantize_weights(traced, model.weights),
        quantize_inputs(traced, scales),
        name_products(traced),
        tie_head(traced.model),
    ]
    traced.model.graph.name = "decoder"
    fix = "export with --base fp32, or train with a rule whose scales are powers of two (live)"
    with refuse_not_half(str(model.root), fix):
        changes.append(type_scales(traced.model, ir.DataType.FLOAT16 if base is Base.FP16 else ir.DataType.FLOAT))
    return DecoderGraph(traced.model, tuple(changes), shape if cache else None)


def refuse_overflow(model: LanguageModel, dtype: torch.dtype) -> None:
    """Refuse float tensors with values beyond the base type, naming every one."""
    findings = [
        Finding("not-half", name, f"a value beyond the largest of {dtype}", "export with --base fp32")
        for name, tensor in model.floats.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor.to(dtype)).all()
    ]
    if findings:
        raise LintFindingsError(findings, str(model.root))


_FP8: Final = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALE: Final = 1  # position among a quantizer's operands


def quantize_inputs(traced: FloatGraph, scales: Mapping[str, float]) -> Change:
    """Insert `QuantizeLinear, DequantizeLinear` (E4M3) before every product's activation; one pair per value.

    Layers that read one value have one scale. The change names the pairs.

    Raises:
        ValueError: two layers read one value and have different scales.
    """
    pairs: dict[ir.Value, tuple[float, ir.Value]] = {}
    changed = []
    for product in traced.in_graph_order():
        value, scale = product.node.inputs[0], scales[product.name]
        assert value is not None
        if value not in pairs:
            site = f"{product.name}.input"
            pairs[value] = scale, quantize_value(traced.model.graph, product.node, value, site, scale, _FP8)
            changed.append(site)
        if pairs[value][0] != scale:
            raise ValueError(f"{product.name} shares its input with a layer of another scale")
        product.node.replace_input_with(0, pairs[value][1])
    return Change("quantize_inputs", tuple(changed))


def drop_quantizers(model: ir.Model) -> Change:
    """Activations pass their quantizers unrounded: the same graph, without what makes it chaotic; in place."""
    changed = []
    for node in list(model.graph):
        quantize = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if quantize is not None and quantize.op_type == "QuantizeLinear" and quantize.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(quantize.inputs[0])
            changed.append(str(node.name))
    return Change("drop_quantizers", tuple(changed))


def type_scales(model: ir.Model, dtype: ir.DataType) -> Change:
    """Scales take the type of what they dequantize to; their values do not change.

    Raises:
        NotHalf: FP16 does not hold one exactly.
    """
    changed = []
    for value in list(model.graph.initializers.values()):
        is_scale = any("quantize" in node.op_type.lower() and index == _SCALE for node, index in value.uses())
        if not is_scale or value.dtype == dtype or value.const_value is None:
            continue
        array = value.const_value.numpy()
        typed = array.astype(dtype.numpy())
        if not np.array_equal(typed.astype(np.float32), array):
            raise NotHalf(str(value.name), "a scale that FP16 does not hold exactly")
        value.const_value = ir.tensor(typed, name=str(value.name))
        value.type = ir.TensorType(dtype)
        changed.append(str(value.name))
    return Change("type_scales", tuple(changed))


def tie_head(model: ir.Model) -> Change:
    """A stored matrix that is another one transposed becomes a Transpose of it: a tied head is stored once.

    The tracer folds the transposition, so that the embedding would lie in the file twice.
    """
    graph = model.graph
    embeddings = [n.inputs[0] for n in graph if n.op_type == "Gather" and n.inputs[0] is not None]
    tables = [v for v in embeddings if v.const_value is not None and v.shape is not None and len(v.shape) == 2]
    changed = []
    for node in list(graph):
        head = node.inputs[1] if node.op_type == "MatMul" else None
        if head is None or head.const_value is None or head.shape is None:
            continue
        for table in tables:
            if _transposes(table, head):
                names = f"{table.name}/Transpose", f"{table.name}/transposed"
                transposed = insert(graph, node, "Transpose", [table], *names, head, attributes={"perm": [1, 0]})
                node.replace_input_with(1, transposed)
                drop_unused(graph, head)
                changed.append(str(node.name))
                break
    return Change("tie_head", tuple(changed))


def _transposes(table: ir.Value, head: ir.Value) -> bool:
    assert table.const_value is not None
    assert head.const_value is not None
    if tuple(reversed(table.const_value.shape)) != tuple(head.const_value.shape) or table.dtype != head.dtype:
        return False
    return np.array_equal(table.const_value.numpy(), head.const_value.numpy().T)
