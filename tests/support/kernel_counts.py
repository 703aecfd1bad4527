"""Kernels and bytes of one Llama decoder layer between its matrix products, counted operator by operator.

Nothing is computed: tensors have shapes alone (torch's meta device). Every operator that is neither a view, nor an
allocation, nor a matrix product counts as one kernel that reads its inputs and writes its outputs once. Attention is
left out: one fused kernel, which the cost model takes by its arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8pipe.models.compat import import_transformers
from fp8pipe.numerics import backends, cuda, fused
from fp8pipe.numerics.grids import E4M3, E5M2, FloatGrid, Scale
from pipeline.falqon import layer as falqon_layer
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.stacked import FalqonPart, StackedOutput

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "_scaled_mm"}
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


@dataclass
class Counted:
    kernels: int = 0
    bytes: int = 0


class Counter(TorchDispatchMode):
    """Counts into `found` while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        shared = {one.untyped_storage()._cdata for one in inputs} & {one.untyped_storage()._cdata for one in outputs}
        view = bool(shared) and not func._schema.is_mutable
        if outputs and not view and name not in PRODUCTS | ALLOCATIONS:
            self.found.kernels += 1
            self.found.bytes += sum(_bytes(leaf) for leaf in (*inputs, *outputs))
        return result


def _bytes(tensor: Tensor) -> int:
    """What a pass over it moves; an expanded tensor lies in memory once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors)


def count_layer(
    shape: dict[str, int], batch: int, length: int, convert: Callable[[nn.Module], None] = lambda layer: None
) -> tuple[Counted, Counted]:
    """What the forward and the backward pass of a frozen decoder layer take.

    Args:
        shape: arguments of LlamaConfig.
        batch: sequences.
        length: tokens in each.
        convert: changes the layer in place, on the meta device.
    """
    transformers = import_transformers()
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    name = "counted-attention"
    transformers.AttentionInterface.register(
        name, lambda module, q, k, v, mask, **rest: (_Attention.apply(q, k, v), None)
    )
    settings = transformers.LlamaConfig(**shape, num_hidden_layers=1, vocab_size=64)
    settings._attn_implementation = name
    with torch.device("meta"):
        layer = LlamaDecoderLayer(settings, 0).to(torch.bfloat16).requires_grad_(False)
        convert(layer)
        x = torch.empty(batch, length, settings.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        rotary = torch.empty(1, length, settings.head_dim, dtype=torch.bfloat16)
    with Counter() as forward:
        y = layer(x, position_embeddings=(rotary, rotary), attention_mask=None)
    grad = torch.empty_like(y)
    with Counter() as backward:
        y.backward(grad)
    return forward.found, backward.found


def to_falqon(layer: Any, rank: int) -> None:
    """Replace the linear layers of a Llama decoder layer by `live` FALQON layers, in place."""
    for block, stacks in ((layer.self_attn, (("q_proj", "k_proj", "v_proj"), ("o_proj",))),
                          (layer.mlp, (("gate_proj", "up_proj"), ("down_proj",)))):  # fmt: skip
        for names in stacks:
            weights = [getattr(block, name).weight for name in names]
            rows = tuple(weight.shape[0] for weight in weights)
            codes = torch.empty(sum(rows) + rank, weights[0].shape[1], dtype=torch.float8_e4m3fn)
            stacked = FalqonLinear(codes, Scale(torch.empty(())), rank=rank, parts=rows)
            output = StackedOutput(stacked)
            for index, name in enumerate(names):
                setattr(block, name, FalqonPart(output, index) if len(names) > 1 else stacked)


@contextmanager
def as_on_cuda(capability: tuple[int, int], *, triton: bool = False) -> Iterator[None]:
    """While active, FALQON layers run what they run on such a GPU, with Triton's kernels or without."""
    kernels = SimpleNamespace(quantize_rows=_cast, transpose_bytes=_transpose)
    with (
        mock.patch.object(falqon_layer, "backend", return_value=backends._CUDA),
        mock.patch.object(cuda, "capability", return_value=capability),
        mock.patch.object(fused, "_here", return_value=triton),
        mock.patch.object(fused, "_kernels", return_value=kernels),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
    ):
        yield


def _cast(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Tensor]:
    return _cast_rows(x, grid is E5M2)


# An operator each, as each is one kernel.
@torch.library.custom_op("counted::cast_rows", mutates_args=())
def _cast_rows(x: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    dtype = (E5M2 if wide else E4M3).dtype
    return torch.empty(x.shape, dtype=dtype, device=x.device), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("counted::transpose", mutates_args=())
def _transpose(codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[1], codes.shape[0])


_cast_rows.register_fake(lambda x, wide: _cast_rows._init_fn(x, wide))
_transpose.register_fake(lambda codes: _transpose._init_fn(codes))
