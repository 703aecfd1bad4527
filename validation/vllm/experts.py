"""Checks quantized mixture-of-experts layers in an engine: their weights as loaded, and the outputs of their kernel.

vLLM stores the experts of a layer as two stacked tensors and packs them for its own kernel; packed weights cannot be
read back in general. So the stacks are read right after loading. At that point, the output of each expert for a few
tokens is also computed from the stacks in plain torch. After packing, it is compared with the output of the kernel.

Each expected output has an error bound. It covers rounding to the kernel's dtype, another summation order and, if the
kernel quantizes the inputs of its GEMMs to E4M3, values close to the midpoint of two codes, which may round either way.

Runs inside vLLM's Python: only torch and vLLM are imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from validation.vllm.products import nearest_e4m3, round_inputs

__all__ = ["Foreseen", "examine_experts", "foresee", "is_experts", "stacked_numbers"]

_TOKENS: Final = 3  # tokens per expert
_SEED: Final = 6
_ROUNDOFF: Final = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
_ADDEND_LOSS: Final = 2.0**-13  # error of FP8 tensor cores per addend, relative to the largest one; see `products`
_SLOPE: Final = 1.1  # largest derivative of SiLU, and of x * sigmoid(alpha * x) for any alpha
_OAI: Final = "swigluoai"  # gpt-oss's: gate and up interleaved and clamped, gate * sigmoid(alpha * gate) * (up + 1)
_ALPHA: Final = 1.702
_LIMIT: Final = 7.0


@dataclass(frozen=True, slots=True)
class Foreseen:
    """Expected outputs of a layer's experts for the test tokens (`_tokens`), each fp32 `(experts, tokens, hidden)`.

    Attributes:
        plain, plain_bound: outputs and their error bounds if the inputs are not quantized.
        rounded, rounded_bound: the same if the inputs of both GEMMs are quantized to E4M3.
    """

    plain: Tensor
    plain_bound: Tensor
    rounded: Tensor
    rounded_bound: Tensor


def is_experts(module: Any) -> bool:
    """Whether a vLLM module contains experts."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    return isinstance(module, RoutedExperts)


def stacked_numbers(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize a loaded stack: `code * scale`, rounded once to `dtype`.

    Args:
        codes: E4M3 `(experts, rows, columns)`.
        scale: one scale per row, `(experts, rows, 1)`.
        dtype: the dtype to which values are rounded.

    Returns:
        fp32 `(experts, rows, columns)` on the CPU.
    """
    return torch.stack([(one.cpu().float() * s.cpu().float()).to(dtype).float()
                        for one, s in zip(codes.detach(), scale.detach(), strict=True)])  # fmt: skip


def foresee(layer: Any) -> Foreseen | None:
    """Compute the expected outputs of a layer's experts.

    Must be called after the weights are loaded and before vLLM packs them.

    Returns:
        None if their activation is neither SiLU nor swigluoai.
    """
    activation = str(getattr(layer.activation, "value", layer.activation))
    if activation not in ("silu", _OAI):
        return None
    dtype = layer.moe_config.in_dtype
    tokens = _tokens(layer.w13_weight.shape[2], dtype).float()
    found: list[list[Tensor]] = [[], [], [], []]
    for number in range(layer.w13_weight.shape[0]):
        w13, w2 = ((getattr(layer, f"{stack}_weight")[number].detach().cpu().float()
                    * getattr(layer, f"{stack}_weight_scale")[number].detach().cpu().float())
                   for stack in ("w13", "w2"))  # fmt: skip
        one = _Expert(w13, w2, _bias(layer, "w13", number), _bias(layer, "w2", number), activation == _OAI)
        for place, rounds in ((0, False), (2, True)):
            result, bound = _expected(tokens, one, _ROUNDOFF[dtype], rounds=rounds)
            found[place].append(result)
            found[place + 1].append(bound)
    return Foreseen(*(torch.stack(parts) for parts in found))


def examine_experts(layer: Any, foreseen: Foreseen) -> dict[str, Any]:
    """Run each expert separately on the test tokens of `foresee` and compare its outputs with the expected ones.

    Returns:
        `kernel`, `device` and `holds` as for the kernel of a linear layer; `error_rounded` and `error_plain`: the
        largest error of an output relative to its bound, with inputs quantized to E4M3 and without; `codes` and
        `codes_differing` are 0 and `rounding` is empty, since no expert kernel exposes the codes of its inputs.
    """
    weight = layer.w13_weight
    tokens = _tokens(foreseen.plain.shape[2], layer.moe_config.in_dtype).to(weight.device)
    count, k = foreseen.plain.shape[0], int(layer.moe_config.experts_per_token)
    errors = {"error_rounded": 0.0, "error_plain": 0.0}
    for number in range(count):
        # As in serving, each token is routed to k experts; all but the one under test have weight 0.
        ids = ((torch.arange(k, device=weight.device) + number) % count).expand(len(tokens), k).contiguous()
        weights = torch.zeros(len(tokens), k, device=weight.device)
        weights[:, 0] = 1.0
        made = layer.quant_method.apply(layer, tokens.clone(), weights, ids.to(torch.int32), None, None)
        result = made.detach().cpu().float()
        for way, bound in (("rounded", foreseen.rounded_bound), ("plain", foreseen.plain_bound)):
            error = float(((result - getattr(foreseen, way)[number]).abs() / bound[number]).max())
            errors[f"error_{way}"] = max(errors[f"error_{way}"], error, key=lambda value: (value != value, value))
    inner = getattr(layer.quant_method, "moe_kernel", None)
    kernel = layer.quant_method if inner is None else inner.fused_experts
    one_byte = weight.dtype.itemsize == 1 or not weight.dtype.is_floating_point
    holds = "codes" if weight.dtype is torch.float8_e4m3fn else "packed" if one_byte else "numbers"
    told = {"kernel": type(kernel).__name__, "device": str(weight.device), "holds": holds}
    return {**told, **errors, "codes": 0, "codes_differing": 0, "rounding": ""}


def _tokens(columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(_TOKENS, columns, generator=torch.Generator().manual_seed(_SEED)).to(dtype)


@dataclass(frozen=True, slots=True)
class _Expert:
    """One expert's weights and biases, fp32; `oai` if its activation is swigluoai, SiLU otherwise.

    Attributes:
        w13: the gate above the up projection, or their rows interleaved for swigluoai, `(2 * inner, hidden)`.
        w2: the down projection, `(hidden, inner)`.
        bias13, bias2: their biases, `(2 * inner,)` and `(hidden,)`.
    """

    w13: Tensor
    w2: Tensor
    bias13: Tensor | None
    bias2: Tensor | None
    oai: bool

    def gated(self, joined: Tensor, off: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The activated gate, the factor of it, and error bounds of gate and factor, given that of `joined`."""
        if not self.oai:
            (gate, up), (gate_off, up_off) = joined.chunk(2, dim=-1), off.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate), up, gate_off, up_off
        gate, up = joined[..., ::2].clamp(max=_LIMIT), joined[..., 1::2].clamp(-_LIMIT, _LIMIT)
        return gate * torch.sigmoid(_ALPHA * gate), up + 1, off[..., ::2], off[..., 1::2]


def _bias(layer: Any, stack: str, number: int) -> Tensor | None:
    bias = getattr(layer, f"{stack}_bias", None)
    return None if bias is None else bias[number].detach().cpu().float()


def _expected(x: Tensor, one: _Expert, roundoff: float, *, rounds: bool) -> tuple[Tensor, Tensor]:
    """Compute `w2 (act(gate x) * up x)` for one expert, with biases, and its error bound.

    Args:
        x: fp32 `(tokens, hidden)`.
        one: the expert.
        roundoff: relative rounding error of the kernel's dtype.
        rounds: whether the inputs of both GEMMs are quantized to E4M3.

    Returns:
        Both as fp32 `(tokens, hidden)`.
    """
    loss = _ADDEND_LOSS if rounds else 2.0**-24
    x = round_inputs(x) if rounds else x
    joined = x @ one.w13.t()
    off = roundoff * joined.abs() + loss * (x.abs() @ one.w13.abs().t()) * (1 if rounds else x.shape[1] ** 0.5)
    if one.bias13 is not None:  # added to the rounded product, or before it is rounded
        joined = joined + one.bias13
        off = off + roundoff * joined.abs()
    activated, up, gate_off, up_off = one.gated(joined, off)
    inner = activated * up
    inner_off = _SLOPE * gate_off * (up.abs() + up_off) + activated.abs() * up_off + 3 * roundoff * inner.abs()
    if rounds:
        inner, inner_off = _rounded(inner, inner_off)
    result = inner @ one.w2.t()
    sums = inner.abs() @ one.w2.abs().t()
    bound = inner_off @ one.w2.abs().t() + 3 * roundoff * result.abs() + 8 * loss * sums
    if one.bias2 is not None:
        result = result + one.bias2
        bound = bound + 3 * roundoff * result.abs()
    return result, bound + torch.finfo(torch.bfloat16).tiny


def _rounded(values: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize values to E4M3 and dequantize them, with one scale per token, and propagate their error bound `off`."""
    amax = values.abs().amax(dim=-1, keepdim=True)
    wide = off.amax(dim=-1, keepdim=True) / amax  # relative error bound of the scale
    scale = amax / 448.0
    rounded = nearest_e4m3(values / scale) * scale
    reach = off + wide * values.abs()
    neighbours = [nearest_e4m3((values + sign * reach) / scale) * scale for sign in (-1, 1)]
    return rounded, torch.stack([(n - rounded).abs() for n in neighbours]).amax(0) + wide * rounded.abs()
