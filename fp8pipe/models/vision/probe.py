"""Runs a model on blank images, records every attention and linear, and rejects matrix multiplications elsewhere.

Whatever modules a model has, its matrix multiplications are a few ATen operations. The probe observes these operations:
each must occur inside an `nn.Linear`, an `nn.Conv2d` or an intercepted attention. The recorded structure is therefore
complete, even for an unknown model.

Layers on which the model's output does not depend are left out, because exports drop them (for instance the pooling
head beside SigLIP's classifier). To detect them, the probe adds a zero that requires a gradient to the output of every
layer. If that zero receives no gradient from the model's output, the output does not depend on the layer.

Linears whose result does not depend on the pixels are recorded separately, because they need no quantization (some
models compute position biases this way). To detect them, the pixels require a gradient as well: if the input of a
linear does not require one, and has the same shape for any number of images, the result is constant.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8pipe.core.errors import ConfigurationError, first_line
from fp8pipe.models.vision.attention import explicit_attention, intercept_attention, module_stack
from fp8pipe.models.vision.prepare import vision_outputs

# Two images, so that the batch dimension (which may include windows) is distinguished from dimensions of size one.
IMAGES = 2
_WEIGHTED = (nn.Linear, nn.Conv2d)
_PRODUCTS = {
    "aten::mm": "a matrix product", "aten::addmm": "a matrix product", "aten::linear": "a matrix product",
    "aten::bmm": "a batched product", "aten::baddbmm": "a batched product",
    "aten::convolution": "a convolution", "aten::_convolution": "a convolution",
    "aten::_softmax": "a softmax", "aten::_safe_softmax": "a softmax",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One recorded attention call, with sizes as in `AttentionSite`; `batch` is the number of images times windows."""

    name: str
    batch: int
    heads: int
    queries: int
    tokens: int
    head_dim: int
    mask: bool


@dataclass(frozen=True, slots=True)
class LinearCall:
    """One recorded call of a linear or convolution.

    Attributes:
        name: name of the module.
        module: the module.
        input: the input tensor; kept alive, because the id of a freed tensor may be reused.
        output_shape: shape of the output.
        attentions: number of attention calls before this call.
    """

    name: str
    module: nn.Module
    input: Tensor
    output_shape: torch.Size
    attentions: int

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the output of a patch embedding."""
        return self.output_shape[-2], self.output_shape[-1]


@dataclass(frozen=True, slots=True)
class Probe:
    """The structure observed in a pass over `IMAGES` images, in call order.

    Attributes:
        attentions: attention calls that affect the output.
        linears: calls of linears and convolutions that affect the output.
        after: those of `linears` that ran after the last of `attentions`.
        constants: names of linears whose results do not depend on the pixels.
    """

    attentions: tuple[AttentionCall, ...]
    linears: tuple[LinearCall, ...]
    after: tuple[LinearCall, ...]
    constants: tuple[str, ...]


@dataclass(slots=True)
class _Notes:
    attentions: list[AttentionCall] = field(default_factory=list)
    attention_marks: list[Tensor] = field(default_factory=list)
    linears: list[LinearCall] = field(default_factory=list)
    linear_marks: list[Tensor] = field(default_factory=list)
    # Input shapes, by name, of linears whose input does not depend on the pixels; no zero is added to their outputs.
    fixed: dict[str, torch.Size] = field(default_factory=dict)
    # Linears whose input does not depend on the pixels, but has a shape that depends on the number of images.
    varying: frozenset[str] = frozenset()
    inside: bool = False  # whether an intercepted attention is being computed

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        batch, heads, queries, head_dim = q.shape
        self.attentions.append(AttentionCall(name, batch, heads, queries, k.shape[2], head_dim, mask is not None))
        self.inside = True
        try:
            return explicit_attention(q, k, v, mask, scale) + _mark(q, self.attention_marks)
        finally:
            self.inside = False

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not args[0].requires_grad and name not in self.varying:
            self.fixed[name] = args[0].shape
            return output
        self.linears.append(LinearCall(name, module, args[0], output.shape, len(self.attentions)))
        return output + _mark(output, self.linear_marks)


def _mark(like: Tensor, marks: list[Tensor]) -> Tensor:
    marks.append(torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True))
    return marks[-1]


class _Watch(TorchDispatchMode):
    """Raises an error for matrix multiplications outside of linears, convolutions and intercepted attentions."""

    def __init__(self, model: nn.Module, stack: list[str], notes: _Notes) -> None:
        start: Any = super().__init__  # untyped in torch
        start()
        self._model, self._stack, self._notes = model, stack, notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.name().split(".")[0]
        what = _PRODUCTS.get(operation)
        if what is None and operation.startswith("aten::_scaled_dot_product"):
            what = "an attention that was not intercepted"
        if what is not None and not self._notes.inside:
            name = self._stack[-1] if self._stack else ""
            module = self._model.get_submodule(name)
            if not isinstance(module, _WEIGHTED):
                raise ConfigurationError(
                    f"{type(self._model).__name__} has a part that cannot be quantized: {name or 'the model itself'}",
                    why=f"{type(module).__name__} computes {what} ({operation}) of its own, outside nn.Linear and "
                    "torch's scaled_dot_product_attention",
                    fix="use a vision transformer whose attention calls scaled_dot_product_attention",
                )
        return func(*args, **(kwargs or {}))


@torch.enable_grad()
def probe(model: nn.Module, image_size: tuple[int, int]) -> Probe:
    """Run a model on blank images, and record its structure.

    Args:
        model: a model prepared by `prepare_model`.
        image_size: (height, width) in pixels.

    Raises:
        ConfigurationError: the model does not run at that size, has no attention that can be intercepted, has a module
            that computes several attentions, or multiplies matrices elsewhere; the error names the module.
    """
    notes, output = _pass(model, image_size, frozenset())
    if notes.fixed:
        more, _ = _pass(model, image_size, frozenset(), IMAGES + 1)
        varying = frozenset(name for name, shape in notes.fixed.items() if more.fixed.get(name) != shape)
        if varying:
            notes, output = _pass(model, image_size, varying)
    marks = notes.attention_marks + notes.linear_marks
    gradients = torch.autograd.grad(output.sum(), marks, allow_unused=True) if marks else ()
    used = [gradient is not None for gradient in gradients]
    count = len(notes.attentions)
    attentions = tuple(call for call, is_used in zip(notes.attentions, used[:count], strict=True) if is_used)
    _check(model, attentions)
    last = max(index for index, is_used in enumerate(used[:count]) if is_used) + 1
    linears = tuple(call for call, is_used in zip(notes.linears, used[count:], strict=True) if is_used)
    after = tuple(call for call in linears if call.attentions >= last)
    return Probe(attentions, linears, after, tuple(notes.fixed))


def _pass(
    model: nn.Module, image_size: tuple[int, int], varying: frozenset[str], images: int = IMAGES
) -> tuple[_Notes, Tensor]:
    """Run the model once on `images` blank images; returns what was recorded, and the model's output.

    `varying` are linears to record although their input does not depend on the pixels, see `_Notes.varying`.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    notes = _Notes(varying=varying)
    with ExitStack() as hooks:
        for name, module in modules.items():
            if isinstance(module, _WEIGHTED):
                hooks.enter_context(module.register_forward_hook(partial(notes.see, name)))
        stack = hooks.enter_context(module_stack(list(modules.items())))
        hooks.enter_context(intercept_attention(model, modules, notes.attend))
        return notes, _run(model, image_size, _Watch(model, stack, notes), images)


def _run(model: nn.Module, image_size: tuple[int, int], watch: _Watch, images: int) -> Tensor:
    parameter = next(model.parameters())
    pixels = torch.zeros(images, 3, *image_size, device=parameter.device, dtype=parameter.dtype)
    pixels = pixels + _mark(pixels, [])
    try:
        with watch:
            return vision_outputs(model, pixels)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"{type(model).__name__} does not run on images of {image_size[0]}x{image_size[1]} pixels",
            why=first_line(error),
            fix=size_fix(model, image_size),
        ) from error


def size_fix(model: nn.Module, image_size: tuple[int, int]) -> str:
    """Advice to the user, for the case that a model does not support images of this (height, width)."""
    whole = (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride)
    steps: Any = getattr(next(whole, None), "kernel_size", (1, 1))
    near = [max(step, round(side / step) * step) for side, step in zip(image_size, steps, strict=True)]
    if tuple(near) == image_size:
        return "give the image size that the model was built for"
    multiple = f"a multiple of the patch of {steps[0]}x{steps[1]}"
    try:
        vision_outputs(model, torch.zeros(1, 3, *near))
    except Exception:  # third-party code may raise any type; the advice would not help then
        return f"give the image size that the model was built for; one that is not {multiple} itself cannot be used"
    return f"give an image size that is {multiple}, such as {near[0]}x{near[1]}"


def _check(model: nn.Module, calls: tuple[AttentionCall, ...]) -> None:
    if not calls:
        holders = [n for n, m in model.named_modules() if "atten" in type(m).__name__.lower() or n.endswith("attn")]
        raise ConfigurationError(
            f"{type(model).__name__} has no attention that can be reached",
            why="nothing called torch's scaled_dot_product_attention; suspicious modules: "
            + (", ".join(holders[:5]) or "none"),
            fix="use a vision transformer whose attention calls scaled_dot_product_attention",
        )
    names = [call.name for call in calls]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigurationError(
            f"the attention {twice} of {type(model).__name__} cannot be read",
            why="it computes more than one attention in a forward",
            fix="use a model with one attention per module",
        )
