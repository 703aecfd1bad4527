"""The trainable student: the teacher's weights with fake quantization and learnable scales (called steps, as in LSQ).

It has the same quantization sites, formulas and module names as `QuantizedVit`, to which `deploy` converts it. The
deployed model's outputs are bit-identical to those of the student in fp32 evaluation.

The forward pass computes exactly the formulas of the deployed model. The backward pass uses a straight-through
estimator for values inside the range. For the step s of a value x, it uses the gradient of LSQ (arXiv 1902.08153,
equation 3): `code - x/s` inside the range, the code of the limit outside. Steps are trained as logarithms, so that they
stay positive and one learning rate suits steps of every magnitude.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.quantized import Codes, QuantizedVit, Quantizer
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BlockCodes, BlockQuantizer, BlockScales, block_units, e2m1_round
from fp8pipe.numerics.quantizers import ActivationQuantizer, WeightCodes, nearest_codes, storable_scale, weight_limits


def _step(log_step: Tensor) -> Tensor:
    """The step from its logarithm, rounded as it will be stored, with a straight-through gradient for the rounding."""
    exact = log_step.exp()
    return storable_scale(exact).detach() + (exact - exact.detach())


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The format of a linear layer's weight: bit width (2 to 8) and kind of number."""

    bits: int
    kind: Kind = Kind.INT


class _RoundedWeight(nn.Module):
    """Parametrization that fake-quantizes a weight with one learnable step per output channel."""

    def __init__(self, step: Tensor, form: WeightFormat, dims: int) -> None:
        super().__init__()
        self.form, self.dims = form, dims
        self.log_step = nn.Parameter(step.log())

    def forward(self, weight: Tensor) -> Tensor:
        step = _step(self.log_step).view(-1, *(1,) * (self.dims - 1))
        return fake_quantize(weight, step, *weight_limits(self.form.bits), self.form.kind)

    def mean_step(self) -> Tensor:
        return self.log_step.exp().mean()


class _RoundedActivation(nn.Module):
    """The quantizer of an activation site: a learnable step with fixed integer bounds."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.low, self.high, self.kind = quantizer.low, quantizer.high, quantizer.kind
        self.log_step = nn.Parameter(torch.tensor(quantizer.scale).log())

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, _step(self.log_step), self.low, self.high, self.kind)

    def frozen(self) -> ActivationQuantizer:
        return ActivationQuantizer(float(_step(self.log_step.detach())), self.low, self.high, self.kind)


class _RoundedBlockWeight(nn.Module):
    """Parametrization that fake-quantizes a weight `(out, in)` to NVFP4, with fixed block scales.

    Scales are not trained: distillation changes a weight by a fraction of the distance between codes, whereas a change
    of a scale would change all sixteen weights of its block.
    """

    def __init__(self, scales: BlockScales) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, weight: Tensor) -> Tensor:
        return fake_blocks(weight, self.scales.product)

    def mean_step(self) -> Tensor:
        """The mean distance between neighbouring values: 12/14 of the scale, as 14 steps cover 12 times the scale."""
        return self.scales.product.mean() * (12.0 / 14.0)


class _RoundedBlockActivation(nn.Module):
    """The quantizer of an activation site in NVFP4, with block scales computed from the activation itself."""

    def __init__(self, quantizer: BlockQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.quantizer.scales(x)
        return fake_blocks(x, scale)

    def frozen(self) -> BlockQuantizer:
        return self.quantizer


class Student(nn.Module):
    """A trainable quantized model.

    Args:
        vision: the teacher; its model is copied, on the same device.
        structure: the model's structure.
        formats: weight formats by name of the linear layer; layers without an entry are not quantized.
        steps: for each of these layers, per-channel steps `(out,)` fp32, or block scales for NVFP4.
        activations: initial quantizers by activation site.
    """

    def __init__(
        self,
        vision: VisionModel,
        structure: VitStructure,
        formats: Mapping[str, WeightFormat],
        steps: Mapping[str, Tensor | BlockScales],
        activations: Mapping[str, Quantizer],
    ) -> None:
        super().__init__()
        self.vision, self.structure = vision, structure
        self.model = copy.deepcopy(vision.model).requires_grad_(True)
        self.formats = dict(formats)
        self._by_site = {
            site: _RoundedBlockActivation(q) if isinstance(q, BlockQuantizer) else _RoundedActivation(q)
            for site, q in activations.items()
        }
        self.ranges = nn.ModuleList(self._by_site.values()).to(next(self.model.parameters()).device)
        for site in structure.linears:
            layer = self.model.get_submodule(site.name)
            if site.name in self.formats:
                step, dims = steps[site.name], layer.get_parameter("weight").dim()
                form = self.formats[site.name]
                rounded = (
                    _RoundedBlockWeight(step) if isinstance(step, BlockScales) else _RoundedWeight(step, form, dims)
                )
                parametrize.register_parametrization(layer, "weight", rounded, unsafe=True)
            layer.register_forward_pre_hook(self._on_input(f"{site.input_group}.input"))
        # Called with the name and the output (probabilities times values) of every attention.
        self.on_attention: Callable[[str, Tensor], None] | None = None

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits or features `(N, C)` for normalized pixels `(N, 3, H, W)`."""
        with intercept_attention(self.model, self.structure.attention_names, self._attend), parametrize.cached():
            return vision_outputs(self.model, pixels)

    def quantize(self, site: str, x: Tensor) -> Tensor:
        """Fake-quantize `x` with the quantizer of the activation site `site`; unchanged if the site has none."""
        rounded = self._by_site.get(site)
        return x if rounded is None else rounded.forward(x)

    def trained_weights(self) -> list[nn.Parameter]:
        """The unrounded weights of the linear layers, including those that are not quantized."""
        return [p for n, p in self.model.named_parameters() if n in self._weight_names()]

    def trained_vectors(self) -> list[nn.Parameter]:
        """All parameters except weights of linear layers and steps: biases, norms, layer scales, embeddings."""
        names = self._weight_names()
        return [p for n, p in self.model.named_parameters() if n not in names and not n.endswith("log_step")]

    def _weight_names(self) -> set[str]:
        rounded = {f"{name}.parametrizations.weight.original" for name in self.formats}
        return rounded | {f"{name}.weight" for name in self.structure.linear_names if name not in self.formats}

    def trained_steps(self) -> list[nn.Parameter]:
        """The logarithms of all steps of weights and activations."""
        return [p for n, p in self.named_parameters() if n.endswith("log_step")]

    @torch.no_grad()
    def mean_step(self) -> float:
        """The mean distance between neighbouring codes of the weights, averaged over layers, to scale learning rates.

        It is 1 if no weight is quantized.
        """
        steps = [self._rounded(name).mean_step() for name in self.formats]
        return float(torch.stack(steps).mean()) if steps else 1.0

    @torch.no_grad()
    def deploy(self) -> QuantizedVit:
        """Create the deployed model, with codes instead of unrounded weights, on the CPU.

        Steps are computed on the student's device, as `exp` may give a different last bit on another device.
        """
        weights: dict[str, Codes] = {}
        plain = copy.deepcopy(self.vision.model).cpu()
        state = {
            n.replace(".parametrizations.weight.original", ".weight"): p for n, p in self.model.state_dict().items()
        }
        plain.load_state_dict({n: state[n] for n in plain.state_dict()})
        for name, form in self.formats.items():
            rounded, weight = self._rounded(name), plain.get_submodule(name).get_parameter("weight")
            if isinstance(rounded, _RoundedBlockWeight):
                scales = BlockScales(rounded.scales.block.cpu(), rounded.scales.tensor)
                weights[name] = BlockCodes.of(weight.detach(), scales)
            else:
                weights[name] = WeightCodes.of(weight, _step(rounded.log_step).cpu(), form.bits, form.kind)
        activations: dict[str, Quantizer] = {site: rounded.frozen() for site, rounded in self._by_site.items()}
        vision = self.vision
        return QuantizedVit(plain, vision.architecture, vision.preprocessing, self.structure, weights, activations)

    def _rounded(self, name: str) -> _RoundedWeight | _RoundedBlockWeight:
        rounded = self.model.get_submodule(name).parametrizations.weight[0]  # type: ignore[union-attr, index]
        assert isinstance(rounded, _RoundedWeight | _RoundedBlockWeight)
        return rounded

    def _on_input(self, site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda module, args: (self.quantize(site, args[0]), *args[1:])

    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        output = explicit_attention(
            self.quantize(f"{name}.q", q * scale if scale != 1.0 else q),
            self.quantize(f"{name}.k", k),
            self.quantize(f"{name}.v", v),
            mask,
            1.0,
            on_probs=lambda probs: self.quantize(f"{name}.probs", probs),
        )
        if self.on_attention is not None:
            self.on_attention(name, output)
        return output


# Values up to half a step beyond 6, the largest E2M1 value, are still inside; the last step, from 4 to 6, is 2.
_INSIDE_E2M1: Final = 7.0


class _Fake(torch.autograd.Function):
    """`clamp(round(x / step), low, high) * step`, with gradients for x and step; step is broadcast to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        units = x / step
        ctx.save_for_backward(units, step)
        ctx.limits = low, high
        return nearest_codes(units, low, high).mul_(step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (units, step), (low, high), (grad,) = ctx.saved_tensors, ctx.limits, grads
        # The range includes half a step beyond the outermost codes, where values are still rounded to them. The kernel
        # of hardtanh's backward pass applies these limits in one pass over memory; a mask would take five.
        through = torch.ops.aten.hardtanh_backward(grad, units, low - 0.5, high + 0.5)
        slope = nearest_codes(units, low, high).mul_(grad).addcmul_(units, through, value=-1)
        dims = [d for d in range(step.dim()) if step.shape[d] == 1] if step.dim() else None
        d_step = slope.sum() if dims is None else slope.sum(dims, keepdim=True)
        return through, d_step, None, None


class _StraightThrough(torch.autograd.Function):
    """Straight-through estimator: returns `rounded`; passes the gradient on to `x` where the mask `inside` is True."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None


def fake_quantize(x: Tensor, step: Tensor, low: int, high: int, kind: Kind = Kind.INT) -> Tensor:
    """Fake-quantize `x`, with gradients for `x` and `step`.

    Args:
        x: fp32, any shape.
        step: positive fp32, scalar or with x's number of dimensions and size 1 except along output channels.
        low: smallest integer code.
        high: largest integer code.
        kind: integers or E4M3. With E4M3, `step` gets no gradient, as the relative precision does not depend on it.

    Returns:
        fp32, of the shape of `x`; bit-identical to the deployed quantizer with this step.
    """
    x = x.float()
    if kind is not Kind.E4M3:
        return cast("Tensor", _Fake.apply(x, step, low, high))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        units = x / step
        rounded, inside = E4M3.cast(units).float().mul_(step), units.abs() <= E4M3.max
    return cast("Tensor", _StraightThrough.apply(x, rounded, inside))  # type: ignore[no-untyped-call]


def fake_blocks(x: Tensor, scale: Tensor) -> Tensor:
    """Fake-quantize `x` to NVFP4, with a gradient for `x`.

    Args:
        x: `(..., n)`, where n is a multiple of 16.
        scale: `block_scale * tensor_scale` of each block, fp32 `(..., n / 16)`.

    Returns:
        fp32 `(..., n)`; bit-identical to the deployed model.
    """
    x = x.float()
    with torch.no_grad():
        units = block_units(x, scale)
        rounded, inside = e2m1_round(units).mul_(scale.unsqueeze(-1)), units.abs() <= _INSIDE_E2M1
    return cast("Tensor", _StraightThrough.apply(x, rounded.flatten(-2), inside.flatten(-2)))  # type: ignore[no-untyped-call]
