"""The decoder of a language model as a float graph, and which of its products belongs to which linear layer.

The model is traced in the type that the engine will compute in. transformers computes normalizations, the softmax's
statistics and rotary angles in float32 whatever that type is, so their islands are in the trace as casts: nothing has
to be converted, and no overflow added, afterwards.

The mask is made here, from the attention mask and the positions: a sum of the logits with 0 or a finite negative number
that FP16 holds. Minus infinity would turn a row of padding into NaN, and the smallest FP16 number plus a negative logit
is minus infinity too. The attention then is a chain of product, factor, sum, softmax, product, which builders fuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from exporters.graph.trace import FloatGraph, Product, ProductKind, export_program, holds_weight, owner
from fp8pipe.core.errors import ConfigurationError

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

LOGITS: Final = "logits"
_INPUTS: Final = ("input_ids", "attention_mask", "position_ids")
# exp of a logit so far below the others is 0 in float32, whatever a real logit is.
_MASKED: Final = -10000.0
# Lengths of the traced example: all different, and none 1, which the tracer would take for a constant.
_BATCH, _SEQUENCE, _PAST = 2, 5, 3

# Layers, key/value heads and head size.
CacheShape = tuple[int, int, int]


def cache_shape(model: PreTrainedModel) -> CacheShape:
    """Layers, key/value heads and head size of a model's cache."""
    config: Any = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, size


def cache_names(layers: int) -> list[str]:
    """Names of the cache inputs, in order."""
    return [f"past_key_values.{layer}.{what}" for layer in range(layers) for what in ("key", "value")]


def present_names(layers: int) -> list[str]:
    """Names of the cache outputs, in order."""
    return [f"present.{layer}.{what}" for layer in range(layers) for what in ("key", "value")]


class _Decoder(nn.Module):
    """Ids, mask and positions, and a cache where there is one, to float32 logits and the cache with the new tokens."""

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
        cache = None
        if past is not None:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.model.config)
            for layer, (key, value) in enumerate(past):
                cache.update(key, value, layer)
        total = attention_mask.shape[1]
        columns = torch.arange(total)
        rows = columns if past is None else torch.arange(total - input_ids.shape[1], total)
        visible = (columns[None, :] <= rows[:, None])[None, None] & (attention_mask[:, None, None, :] != 0)
        mask = torch.where(visible, 0.0, _MASKED).to(self.model.dtype)  # (batch, 1, sequence, past + sequence)
        found = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache,
            use_cache=past is not None,
        )  # fmt: skip
        if past is None:
            return (found.logits.float(),)
        present = [tensor for layer in found.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (found.logits.float(), *present)


def trace_decoder(model: PreTrainedModel, layers: Sequence[str], *, cache: bool) -> FloatGraph:
    """Export a model in float, with dynamic batch, sequence and past.

    Args:
        model: of transformers, evaluation mode, attention `eager`, in the type to compute in; not changed.
        layers: linears to find; all of them must be there, once.
        cache: with `past_key_values.{i}.key` (batch, heads, past, size) and so on as inputs, `present.{i}.key` as
            outputs; the past may be empty.

    Returns:
        The graph: inputs `input_ids`, `attention_mask` (over past and sequence), `position_ids`, int64; output `logits`
        (batch, sequence, vocabulary) float32. Products in the order of `layers`; other products are not listed.

    Raises:
        ConfigurationError: the model cannot be traced, or a layer's product is not found.
        MissingCapabilityError: onnx, onnx-ir or onnxscript is not installed.
    """
    shape = cache_shape(model)
    graph = _trace(model, shape, cache)
    _name_ports(graph, shape[0] if cache else 0)
    return FloatGraph(graph, tuple(_assign(graph, model, layers)))


def _trace(model: PreTrainedModel, shape: CacheShape, cache: bool) -> ir.Model:
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
        layers, heads, size = shape
        empty = torch.zeros(_BATCH, heads, _PAST, size, dtype=model.dtype)
        arguments += ([(empty.clone(), empty.clone()) for _ in range(layers)],)
        dynamic += ([({0: batch, 2: past}, {0: batch, 2: past})] * layers,)
    fix = "export with --format modelopt-checkpoint, or --target vllm"
    return export_program(_Decoder(model), arguments, dynamic, type(model).__name__, fix)


def _name_ports(model: ir.Model, layers: int) -> None:
    """Names and symbolic sides of inputs and outputs."""
    import onnx_ir as ir

    graph = model.graph
    names = [*_INPUTS, *cache_names(layers)]
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    graph.inputs[1].shape = ir.Shape(["batch", "total"] if layers else ["batch", "sequence"])
    for value, name in zip(graph.outputs, [LOGITS, *present_names(layers)], strict=True):
        value.name = name
        last = value.shape[-1] if value.shape is not None else None
        sides = ["batch", "sequence", last] if name == LOGITS else ["batch", value.shape[1], "total", last]  # type: ignore[index]
        value.shape = ir.Shape(sides)


def _assign(graph: ir.Model, model: PreTrainedModel, layers: Sequence[str]) -> list[Product]:
    known = set(layers)
    found: dict[str, list[ir.Node]] = {}
    for node in graph.graph:
        if node.op_type in ("MatMul", "Gemm") and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            found.setdefault(owner(node, known), []).append(node)
    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    for name in layers:
        nodes = found.get(name, [])
        if (
            len(nodes) != 1
            or nodes[0].op_type != "MatMul"
            or not holds_weight(nodes[0], modules[name].get_parameter("weight"))
        ):
            raise ConfigurationError(
                f"the traced graph of {type(model).__name__} does not match the model",
                why=f"{name} has {len(nodes)} product(s) with its weight, expected one",
                fix="use versions of torch, onnxscript and transformers that this project was tested with",
            )
    return [Product(ProductKind.LINEAR, name, found[name][0]) for name in layers]
