"""Runs the experts of a layer as grouped products on CUDA: one GEMM per projection, however many experts there are.

A loop over experts reads from the device which of them have tokens, so the host waits once per layer, and launches
some twenty small kernels per expert. Here the tokens are sorted by expert, the ends of the groups stay on the device,
and `torch._grouped_mm` multiplies every group with the codes of its expert. Codes and B of all experts lie in one
tensor each, of which those of the single FALQON layers are views: training, merging and saving see ordinary layers.

Operands are rounded to FP8 and multiplied in bf16, as `numerics.reference` defines it, because torch's grouped FP8
GEMM does not take the E5M2 codes of gradients. Scales are powers of two, so where they are applied changes no bit. The
results are those of the loop except that O B^T is rounded to bf16 before it is added to Y.

An expert without tokens must have no gradient, because an optimizer would move its B for a gradient of zeros. Which
experts have tokens is copied to the host without waiting in the forward pass, and read in the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8pipe.models.language.experts import UnstackedExperts
from fp8pipe.numerics import cuda
from fp8pipe.numerics.grids import E4M3, E5M2
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.stacked import FalqonPart

_ALIGN = 8  # rows of bf16 operands begin at multiples of 16 bytes
_GENERATIONS = (9, 10)  # compute capabilities for which torch has a kernel; elsewhere it loops and waits itself


def group_experts(model: nn.Module) -> None:
    """Let the experts of a converted model run as grouped products where `supported` holds.

    Experts whose projections are not all FALQON layers with power-of-two scales and sides that are multiples of 8 keep
    running one by one.
    """
    for module in model.modules():
        if isinstance(module, UnstackedExperts) and (found := _projections(module)) is not None:
            module.grouped = GroupedExperts(*found)


def supported(x: Tensor) -> bool:
    """Whether grouped products run on the device of `x`, `(tokens, hidden)`."""
    return x.is_cuda and x.shape[0] > 0 and has_kernel(x.dtype, cuda.capability(x.get_device()))


def has_kernel(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether torch has a kernel for grouped products of this dtype on GPUs of this compute capability."""
    return dtype == torch.bfloat16 and sys.platform == "linux" and capability[0] in _GENERATIONS


def fits(rule: ScaleRule, sides: Iterable[int]) -> bool:
    """Whether grouped products take these scales, and layers with these sides: rank, inputs and outputs."""
    return rule is ScaleRule.POWER_OF_TWO and not any(side % _ALIGN for side in sides)


class GroupedExperts:
    """Computes what `UnstackedExperts.forward` does, with grouped products.

    Args:
        inner: the layers that read the hidden states, stacked over the experts; their outputs side by side are gate
            and up.
        down: the layers that write the output.
    """

    def __init__(self, inner: Sequence[LayerStack], down: LayerStack) -> None:
        self.inner, self.down = inner, down

    def __call__(self, experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        """See `UnstackedExperts.forward`; None if the experts must run one by one here."""
        stacks = (*self.inner, self.down)
        # An observer must see the inputs of each expert by themselves.
        if not supported(x) or any(layer.observer is not None for stack in stacks for layer in stack.layers):
            return None
        routes = Routes(index, len(self.down.layers))
        shares = torch.where(index == len(self.down.layers), 0, weights).t().reshape(-1)[routes.order, None]
        rows = _Spread.apply(x, routes)  # type: ignore[no-untyped-call]
        rows = rows * shares if experts.weighs_inputs else rows
        joined = [stack.apply(rows, routes) for stack in self.inner]
        outputs = self.down.apply(experts._apply_gate(joined[0] if len(joined) == 1 else torch.cat(joined, -1)), routes)
        weighted = outputs if experts.weighs_inputs else outputs * shares
        combined: Tensor = _Combine.apply(weighted.to(x.dtype), routes)  # type: ignore[no-untyped-call]
        return combined


class Routes:
    """The order in which the tokens of a layer are multiplied, sorted by expert; entries beyond the experts come last.

    Attributes:
        order: int64 `(rows,)`, for each row its place in `index.t()` flattened, with `index` `(tokens, k)`.
        token: int64 `(rows,)`, the token of each row.
        expert: int64 `(rows,)`, the expert of each row; for entries to skip, the last one.
        ends: int32 `(experts,)`, the end of each group.
        rows: int64 `(k, tokens)`, the rows of each token, in the order of their experts.
    """

    def __init__(self, index: Tensor, experts: int) -> None:
        tokens, chosen = index.shape
        flat = index.t().reshape(-1)
        self.order = flat.argsort(stable=True)
        self.token = self.order % tokens
        found = flat[self.order]
        self.expert = found.clamp(max=experts - 1)
        reached = torch.searchsorted(found, torch.arange(experts, device=index.device), right=True, out_int32=True)
        self.ends = reached.clone()
        self.ends[-1:].fill_(len(flat))
        self.rows = self.order.argsort().view(chosen, tokens).sort(0).values
        self._host = reached.to("cpu", non_blocking=True)  # into pinned memory
        self._copied = torch.cuda.Event() if index.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def reached(self) -> list[bool]:
        """For each expert, whether it has tokens; waits for the copy that began with the forward pass."""
        if self._copied is not None:
            self._copied.synchronize()
        ends = self._host.tolist()
        return [end > start for start, end in zip([0, *ends], ends, strict=False)]


class LayerStack:
    """FALQON layers of the same shape, one for each expert, whose codes and B are views of one tensor each."""

    def __init__(self, layers: Sequence[FalqonLinear]) -> None:
        self.layers = tuple(layers)
        self.rank, self.live = layers[0].rank, layers[0].live
        self.width, self.into = layers[0].out_features, layers[0].in_features
        self._stack()

    def _stack(self) -> None:
        # Copies, because the layers were made one by one; then the layers' own tensors are released.
        self.codes = torch.stack([layer.codes.view(torch.uint8) for layer in self.layers]).view(E4M3.dtype)
        self.b = torch.stack([layer.lora_B.detach() for layer in self.layers])
        self.scale = torch.stack([layer.scale.reshape(()) for layer in self.layers])
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        self.bias = torch.stack(biases) if biases else None
        for layer, codes, b in zip(self.layers, self.codes.unbind(), self.b.unbind(), strict=True):
            layer.code_bytes.data, layer.lora_B.data = codes.view(torch.uint8), b

    def _complete(self) -> bool:
        """Whether every layer's tensors are still views of the stacks: moving a module replaces them."""
        return all(
            _place(layer.codes) == (_place(self.codes)[0], number * self.codes.stride(0))
            and _place(layer.lora_B) == (_place(self.b)[0], number * self.b.stride(0))
            for number, layer in enumerate(self.layers)
        )

    def apply(self, x: Tensor, routes: Routes) -> Tensor:
        """The outputs `(rows, out)` for the inputs `(rows, in)` of all experts, bf16, sorted by expert."""
        if not self._complete():
            self._stack()
        trained = [layer.lora_B for layer in self.layers]
        trained += [layer.lora_A for layer in self.layers if layer.lora_A is not None]
        y: Tensor = _GroupedProduct.apply(x, self, routes, *trained)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias[routes.expert]


class _GroupedProduct(torch.autograd.Function):
    """Forward and backward of a stack of FALQON layers; saves what a single layer does: O_A, and X if A is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: LayerStack, routes: Routes, *trained: Tensor) -> Tensor:
        factor = stack.scale[routes.expert, None]
        found, rows = cuda.cast_rows(x, E4M3)
        values = torch.mul(found.to(x.dtype), rows * factor, out=torch.empty_like(x))
        wide = torch._grouped_mm(values, stack.codes.to(x.dtype).transpose(1, 2), offs=routes.ends)
        o, y = wide[:, stack.width :].clone(), wide[:, : stack.width]
        if stack.live:
            y += torch._grouped_mm(o, stack.b.to(x.dtype).transpose(1, 2), offs=routes.ends)
        ctx.stack, ctx.routes = stack, routes
        ctx.save_for_backward(o, factor, values if len(trained) > len(stack.layers) else None)
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        o, factor, x = ctx.saved_tensors
        stack, routes, grad = ctx.stack, ctx.routes, grads[0].contiguous()
        wants_input, gradients = ctx.needs_input_grad[0], [torch._grouped_mm(grad.t(), o, offs=routes.ends)]
        beside = None
        if stack.live and (wants_input or x is not None):
            beside = torch._grouped_mm(grad, stack.b.to(grad.dtype), offs=routes.ends)
        dx = _input_gradient(grad, factor, stack, routes, beside) if wants_input else None
        if x is not None:  # `x` has the scales of the codes in it, all of them powers of two
            assert beside is not None
            thin = torch.div(beside, factor).to(grad.dtype)
            gradients.append(torch._grouped_mm(thin.t(), x, offs=routes.ends))
        hits = routes.reached()
        return (
            dx,
            None,
            None,
            *(one if hit else None for each in gradients for one, hit in zip(each.float().unbind(), hits, strict=True)),
        )


def _input_gradient(grad: Tensor, factor: Tensor, stack: LayerStack, routes: Routes, beside: Tensor | None) -> Tensor:
    found, rows = cuda.cast_rows(grad, E5M2)
    width = stack.width
    values = grad.new_empty(len(grad), width + (stack.rank if stack.live else 0))
    torch.mul(found.to(grad.dtype), rows * factor, out=values[:, :width])
    if beside is not None:
        torch.mul(beside, factor, out=values[:, width:])
    return torch._grouped_mm(values, stack.codes[:, : values.shape[1]].to(grad.dtype), offs=routes.ends)


class _Spread(torch.autograd.Function):
    """Copies tokens to the rows of their experts; gradients are summed in the order in which a loop would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return x[routes.token]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.routes.rows.flip(0)), None  # autograd goes through a loop backwards


class _Combine(torch.autograd.Function):
    """Sums the rows of each token, in the order of its experts: atomic additions would make it depend on chance."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return _summed(outputs, routes.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.routes.token], None


def _summed(values: Tensor, rows: Tensor) -> Tensor:
    total = values[rows[0]]
    for row in rows[1:]:
        total += values[row]
    return total


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _projections(experts: UnstackedExperts) -> tuple[list[LayerStack], LayerStack] | None:
    """The stacks of inner layers and that of the outer ones; None if they cannot run as grouped products."""
    numbered = [list(experts.get_submodule(str(number)).children()) for number in range(experts.num_experts)]
    columns = [[_layer(child) for child in column] for column in zip(*numbered, strict=True)]
    # The second part of a stacked layer has none of its own; gate must be the first, as `_apply_gate` reads them.
    stacks = [[layer for layer in column if layer is not None] for column in columns if column[0] is not None]
    if columns[0][0] is None or columns[-1][0] is None or any(len(stack) < len(numbered) for stack in stacks):
        return None
    joined, down = sum(stack[0].out_features for stack in stacks[:-1]), stacks[-1][0]
    if any(map(_unfit, stacks)) or joined != 2 * down.in_features:
        return None
    *inner, outer = map(LayerStack, stacks)
    return inner, outer


def _layer(module: nn.Module) -> FalqonLinear | None:
    if isinstance(module, FalqonPart):
        found = module._modules.get("stacked")
        return found if isinstance(found, FalqonLinear) else None
    return module if isinstance(module, FalqonLinear) else None


def _unfit(layers: Sequence[FalqonLinear]) -> bool:
    """Whether layers differ in shape, or have sides or scales that grouped products do not take."""
    first = layers[0]
    sides = first.rank, first.out_features, first.in_features
    shapes = {(layer.codes.shape, layer.rank, layer.live, layer.bias is None, layer.codes.device) for layer in layers}
    return len(shapes) > 1 or not fits(first.code_scale.rule, sides)
