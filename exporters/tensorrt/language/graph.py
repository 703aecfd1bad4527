"""Make the ONNX graph of an artifact in a form from which TensorRT builds efficient engines.

The model is traced in the dtype in which the engine will compute. transformers always computes normalizations, softmax
and rotary angles in float32, and the trace contains the casts to and from float32 around them. So the graph need not
be converted to another dtype after tracing, which could introduce overflows.

The additive mask is built here from the attention mask and the positions. Masked logits get a finite negative number
that FP16 can represent: minus infinity would turn a row of padding into NaN, and the most negative FP16 number plus a
negative logit would be minus infinity as well. Attention is then a chain of matmul, scaling, add, softmax and matmul,
which builders can fuse.

The passes over the graph are those of `exporters/graph` and three more (`passes`), for static quantizers of inputs, the
dtype of scales, and a tied output head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters.graph.passes.editing import Change
from exporters.graph.passes.products import name_products, split_gemms, strip_metadata
from exporters.graph.passes.quantize import quantize_block_weights, quantize_weights, raise_opset
from exporters.graph.trace import FloatGraph, Product, ProductKind, export_program, holds_weight, owner
from exporters.tensorrt.half import refuse_not_half
from exporters.tensorrt.language.passes import check_half_blocks, quantize_inputs, tie_head, type_scales
from exporters.tensorrt.language.source import LanguageModel
from exporters.tensorrt.language.target import CacheFacts
from exporters.tensorrt.target import Base
from fp8pipe.artifact.finding import Finding, refuse
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.kv_cache import cache_argument
from fp8pipe.numerics.nvfp4 import BlockCodes
from fp8pipe.numerics.quantizers import WeightCodes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TORCH_TYPES = {Base.FP16: torch.float16, Base.FP32: torch.float32}
LOGITS: Final = "logits"
TRANSPOSED: Final = "/transposed"  # ends the name of a float matrix that is stored (in, out)
_INPUTS: Final = ("input_ids", "attention_mask", "position_ids")
# Added to masked logits; low enough that their exp in the softmax is 0 in float32 for any realistic logits.
_MASKED: Final = -10000.0
# Sizes of the example inputs for tracing: all different, and none 1, which the tracer would treat as a constant.
_BATCH, _SEQUENCE, _PAST = 2, 5, 3


@dataclass(frozen=True, slots=True)
class Joints:
    """Names of the values between the decoder layers of a graph."""

    hidden: tuple[str, ...]  # the hidden state that each layer reads, and the one that the last layer returns
    shared: tuple[str, ...]  # what layers read that is computed before all of them


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """An exported graph in memory."""

    model: ir.Model  # for strongly typed builds, in which the dtypes of the graph determine those of the engine
    changes: tuple[Change, ...]  # what each pass changed
    cache: CacheFacts | None  # shape of the key/value cache; None for a graph without one
    joints: Joints | None = None  # None for a graph that was traced as a whole
    traced: str = ""  # "layers", or "whole: " and why


def decoder_graph(model: LanguageModel, scales: Mapping[str, float], base: Base, *, cache: bool) -> DecoderGraph:
    """Trace a model and rewrite the graph with its codes: FP8 and static activation scales, or weights in NVFP4 alone.

    Args:
        model: the opened artifact.
        scales: static activation scales by layer; none for NVFP4.
        base: the dtype of everything that is not quantized.
        cache: whether the graph has a key/value cache as inputs and outputs.

    Raises:
        ConfigurationError: the model cannot be traced, or its layers are not found in the graph.
        LintFindingsError: FP16 cannot represent a scale or a tensor.
    """
    refuse_beyond(model, base)
    decoder = model.torch_model(TORCH_TYPES[base])
    traced = trace_decoder(decoder, list(model.weights), cache=cache)
    shape = cache_shape(decoder)
    with refuse_not_half(str(model.root), "export with --base fp32"):
        for name, weight in model.weights.items() if base is Base.FP16 else ():
            if isinstance(weight, BlockCodes):
                check_half_blocks(f"{name}.weight", weight.scales)
    changes = type_graph(traced, model.weights, scales, base, str(model.root))
    return DecoderGraph(traced.model, tuple(changes), shape if cache else None)


def refuse_beyond(model: LanguageModel, base: Base) -> None:
    """Refuse floats that the base type cannot represent.

    Raises:
        LintFindingsError: names them.
    """
    dtype = TORCH_TYPES[base]
    findings = [
        Finding("not-half", name, f"a value beyond the range of {dtype}", "export with --base fp32")
        for name, tensor in model.floats.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor.to(dtype)).all()
    ]
    refuse(findings, str(model.root))


def type_graph(
    traced: FloatGraph,
    weights: Mapping[str, WeightCodes | BlockCodes],
    scales: Mapping[str, float],
    base: Base,
    source: str,
) -> list[Change]:
    """The passes that make a strongly typed graph of a traced one, in place; returns what they changed.

    Raises:
        LintFindingsError: a scale that FP16 cannot represent.
    """
    blocks = {name: weight for name, weight in weights.items() if isinstance(weight, BlockCodes)}
    codes = {name: weight for name, weight in weights.items() if isinstance(weight, WeightCodes)}
    changes = [
        strip_metadata(traced.model),  # first, as it removes the tracer's prefix from names
        # The tracer uses a Gemm for linear layers with a bias and a two-dimensional input (OPT's MLP).
        *(change for change in [split_gemms(traced)] if change.changed),
        *([quantize_block_weights(traced, blocks), raise_opset(traced.model, activations=False)] if blocks else []),
        *([quantize_weights(traced, codes), quantize_inputs(traced, scales)] if codes else []),
        name_products(traced),
        tie_head(traced.model),
    ]
    traced.model.graph.name = "decoder"
    fix = "export with --base fp32" + ("" if blocks else ", or train with a rule whose scales are powers of two (live)")
    with refuse_not_half(source, fix):
        changes.append(type_scales(traced.model, ir.DataType.FLOAT16 if base is Base.FP16 else ir.DataType.FLOAT))
    return changes


def cache_shape(model: PreTrainedModel) -> CacheFacts:
    """The shape of a model's key/value cache, from its configuration."""
    config: Any = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    return CacheFacts(layers=config.num_hidden_layers, heads=heads, size=size)


def cache_names(layers: int | Sequence[int], prefix: str = "past_key_values") -> list[str]:
    """The names of the cache inputs, in order, or with the prefix `present` those of the outputs."""
    numbers = range(layers) if isinstance(layers, int) else layers
    return [f"{prefix}.{layer}.{what}" for layer in numbers for what in ("key", "value")]


def additive_mask(input_ids: Tensor, attention_mask: Tensor, dtype: torch.dtype, *, cached: bool) -> Tensor:
    """What is added to the logits `(batch, 1, sequence, past + sequence)`: 0, or a large negative number."""
    total = attention_mask.shape[1]
    columns = torch.arange(total)
    rows = torch.arange(total - input_ids.shape[1], total) if cached else columns
    visible = (columns[None, :] <= rows[:, None])[None, None] & (attention_mask[:, None, None, :] != 0)
    return torch.where(visible, 0.0, _MASKED).to(dtype)


class _Decoder(nn.Module):
    """The function to trace: maps ids, mask, positions and an optional cache to float32 logits and the new cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(
        self,
        input_ids: Tensor,  # (batch, sequence)
        attention_mask: Tensor,  # (batch, past + sequence): 1 for text, 0 for padding
        position_ids: Tensor,  # (batch, sequence)
        past: list[tuple[Tensor, Tensor]] | None = None,  # (batch, heads, past, size) each
    ) -> tuple[Tensor, ...]:
        cache: Any = None
        if past is not None:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.model.config)
            for layer, (key, value) in enumerate(past):
                cache.update(key, value, layer)
        mask = additive_mask(input_ids, attention_mask, self.model.dtype, cached=past is not None)
        found = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids,
            **cache_argument(self.model, cache), use_cache=past is not None,
        )  # fmt: skip
        if cache is None:
            return (found.logits.float(),)
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (found.logits.float(), *present)


def trace_decoder(model: PreTrainedModel, layers: Sequence[str], *, cache: bool) -> FloatGraph:
    """Export a model as a float ONNX graph with dynamic batch size, sequence length and cache length.

    Inputs of the graph are `input_ids`, `attention_mask` (over cache and sequence) and `position_ids`, int64; the
    output `logits` (batch, sequence, vocabulary) is float32. With a cache, further inputs are
    `past_key_values.{i}.key` and `.value` (batch, heads, past, size) for each layer i, where past may be 0, and further
    outputs are `present.{i}.key` and `.value`.

    Args:
        model: a transformers model in evaluation mode, with attention `eager`, in the dtype in which to compute; not
            changed.
        layers: module paths of linear layers, each of which must occur exactly once in the graph.
        cache: whether the graph has a cache.

    Returns:
        The graph, and its matrix multiplications by the weights of `layers`, in that order.

    Raises:
        ConfigurationError: the model cannot be traced, or a layer is not found in the graph.
        MissingCapabilityError: onnx, onnx-ir or onnxscript is not installed.
    """
    shape = cache_shape(model)
    arguments, dynamic = example(shape, model.dtype, cache=cache)
    fix = "export with --format modelopt-checkpoint, or --target vllm"
    graph = export_program(_Decoder(model), arguments, dynamic, type(model).__name__, fix)
    name_ports(graph, range(shape.layers if cache else 0))
    return FloatGraph(graph, tuple(assign(graph, model, layers)))


def example(shape: CacheFacts, dtype: torch.dtype, *, cache: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments to trace with, and which of their dimensions are dynamic."""
    dim: Any = torch.export.Dim
    batch, sequence, past = dim("batch"), dim("sequence"), dim("past")
    ids = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
    total = _SEQUENCE + (_PAST if cache else 0)
    arguments: tuple[Any, ...] = (
        ids, torch.ones(_BATCH, total, dtype=torch.int64), torch.arange(_SEQUENCE).repeat(_BATCH, 1)
    )  # fmt: skip
    total_dim = dim.DYNAMIC if cache else sequence
    dynamic: tuple[Any, ...] = ({0: batch, 1: sequence}, {0: batch, 1: total_dim}, {0: batch, 1: sequence})
    if cache:
        empty = torch.zeros(_BATCH, shape.heads, _PAST, shape.size, dtype=dtype)
        arguments += ([(empty.clone(), empty.clone()) for _ in range(shape.layers)],)
        dynamic += ([({0: batch, 2: past}, {0: batch, 2: past})] * shape.layers,)
    return arguments, dynamic


def name_ports(model: ir.Model, layers: Sequence[int]) -> None:
    """Set the names and symbolic dimensions of inputs and outputs; `layers` are the numbers of those with a cache."""
    graph = model.graph
    names = [*_INPUTS, *cache_names(layers)]
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    graph.inputs[1].shape = ir.Shape(["batch", "total"] if layers else ["batch", "sequence"])
    for value, name in zip(graph.outputs, [LOGITS, *cache_names(layers, "present")], strict=True):
        value.name = name
        last = value.shape[-1] if value.shape is not None else None
        sides = ["batch", "sequence", last] if name == LOGITS else ["batch", value.shape[1], "total", last]  # type: ignore[index]
        value.shape = ir.Shape(sides)


def assign(graph: ir.Model, model: PreTrainedModel, layers: Sequence[str]) -> list[Product]:
    """The product of each of `layers`, found by its module and its weight.

    Raises:
        ConfigurationError: a layer has none, or several, or one of another weight.
    """
    known = set(layers)
    found: dict[str, list[ir.Node]] = {}
    for node in graph.graph:
        if node.op_type in ("MatMul", "Gemm") and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            found.setdefault(owner(node, known), []).append(node)
    products = []
    for name in layers:
        nodes, weight = found.get(name, []), model.get_submodule(name).get_parameter("weight")
        if len(nodes) != 1 or not holds_weight(nodes[0], weight):
            raise ConfigurationError(
                f"the traced graph of {type(model).__name__} does not match the model",
                why=f"{name} has {len(nodes)} matrix multiplication(s) by a stored matrix, expected one"
                if len(nodes) != 1
                else f"{nodes[0].op_type} {nodes[0].name} of {name} multiplies by a matrix that is not its weight",
                fix="use versions of torch, onnxscript and transformers that this project was tested with, or export "
                "with --target vllm",
            )
        products.append(Product(ProductKind.LINEAR, name, nodes[0]))
    return products
