"""Tests whether a layer of an engine quantizes its inputs correctly and multiplies by the weight that it stores.

Each layer is run separately on test inputs. Every test token has only 32 adjacent nonzero features, different ones for
each token, so that all tokens together use every weight once, and each dot product has few terms. With so few terms,
the accumulation error of any kernel is far smaller than the effect of quantizing the inputs to E4M3 or NVFP4, so the
outputs show whether the layer quantizes its inputs. If the kernel exposes the codes of its inputs, these are compared
as well, bit for bit; additional tokens cover edge cases: zeros, ties, and the minimum of the scale.

The expected values are computed independently, in plain torch on the CPU. Runs inside vLLM's Python: only torch is
imported.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from validation.vllm.kernels import Kernel, kernel_inputs

__all__ = ["APPROXIMATE", "examine", "make_tokens", "nearest_e4m3", "round_inputs"]

_LARGEST: Final = 448.0
_SCALE_FLOOR: Final = 1.0 / (448.0 * 512.0)  # minimum of vLLM's dynamic scales
_TERMS: Final = 32  # nonzero features per token: as many as a tensor core accumulates in one step of an FP8 GEMM
# Tensor cores align addends to the largest one and keep at least 13 bits after its leading bit. FP8 on Hopper keeps 13,
# as measured in the DeepSeek-V3 report (arXiv 2412.19437); others keep more.
_ADDEND_LOSS: Final = 2.0**-13
_DIVISION_LOSS: Final = 2.0**-21  # error of an approximate GPU division (2 ulp) and of the division by 448
_TOKENS: Final = 256  # tokens per call
_BLOCK: Final = 16  # features that share a scale in NVFP4
_ATTEMPTS: Final = 8
APPROXIMATE: Final = "divided approximately by amax / 448"
_SEED: Final = 5
_ROUNDOFF: Final = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def examine(layer: Any, kernel: Kernel, weight: Tensor) -> dict[str, Any]:
    """Run one layer on test tokens.

    Args:
        layer: the vLLM layer.
        kernel: its kernel.
        weight: fp32 `(out, in)`, the weight that it must multiply by.

    Returns:
        `error_rounded` and `error_plain`: the largest error of an output relative to its bound, assuming that inputs
        are quantized (to NVFP4 if the kernel has a divisor for them, else to E4M3) or that they are not; `codes`:
        number of input codes observed; `codes_differing`: how many differ from the expected ones; `rounding`:
        description of how the kernel quantizes, empty if not observed.
    """
    tiles, edges = make_tokens(weight.shape[1], kernel.dtype, kernel.divisor)
    found: dict[str, Any] = {"error_rounded": 0.0, "error_plain": 0.0, "codes": 0, "codes_differing": 0, "rounding": ""}
    differing: dict[str, int] = {}
    for start in range(0, len(tiles), _TOKENS):
        part = tiles[start : start + _TOKENS]
        tokens = torch.cat((part, edges))
        with kernel_inputs(kernel) as seen:
            product = layer.quant_method.apply(layer, tokens.to(layer.weight.device), None)
        errors = _errors(product[: len(part)].cpu().float(), part, start, kernel, weight)
        for name, error in zip(("error_rounded", "error_plain"), errors, strict=True):
            found[name] = max(found[name], error, key=lambda value: (value != value, value))  # NaN is the worst
        for codes, scales in seen:
            found["codes"] += tokens.numel()
            for way, count in _codes_differing(tokens, codes, scales).items():
                differing[way] = differing.get(way, 0) + count
    if differing:
        found["rounding"], found["codes_differing"] = min(differing.items(), key=lambda item: item[1])
    return found


def make_tokens(columns: int, dtype: torch.dtype, divisor: float | None = None) -> tuple[Tensor, Tensor]:
    """Deterministic test inputs: tiles `(ceil(columns / 32), columns)` and edge cases `(4, columns)`.

    Values in tiles avoid ties, since the code that a tie is rounded to depends on how the kernel divides. `divisor` is
    that of a kernel which quantizes them to NVFP4.
    """
    generator = torch.Generator().manual_seed(_SEED)
    count = -(-columns // _TERMS)
    magnitudes = torch.exp2(torch.rand(count, _TERMS, generator=generator) * 10 - 10)  # ten binades
    signs = torch.randint(0, 2, (count, _TERMS), generator=generator) * 2.0 - 1
    values = (magnitudes * signs * torch.exp2(torch.randint(-3, 4, (count, 1), generator=generator).float())).to(dtype)
    if divisor is None:
        quotients = values.float() / _scale_of(values.float())
        values = torch.where(_near_a_tie(quotients), values * 0.984375, values)
    else:
        values = _off_ties(values, divisor)
    tiles = torch.zeros(count, count, _TERMS, dtype=dtype)
    tiles[torch.arange(count), torch.arange(count)] = values
    ties = (torch.arange(columns) % 126).to(torch.uint8)
    below, above = (codes.view(torch.float8_e4m3fn).float() for codes in (ties, ties + 1))
    edges = torch.stack([
        torch.zeros(columns),
        ((below + above) / 2).index_fill(0, torch.tensor(0), _LARGEST),  # halfway between two codes, with scale 1
        torch.linspace(-1, 1, columns) * 2.0**-20,  # so small that the scale is at its minimum
        torch.randn(columns, generator=generator),
    ])  # fmt: skip
    return tiles.reshape(count, -1)[:, :columns].contiguous(), edges.to(dtype)


def round_inputs(tokens: Tensor, divisor: float | None = None) -> Tensor:
    """Quantize tokens `(..., features)` to E4M3 and dequantize them, with one scale per token; returns fp32.

    With a `divisor`, to NVFP4: E2M1 with an E4M3 scale per 16 features, whose factor is its reciprocal.
    """
    if divisor is not None:
        blocks = torch.nn.functional.pad(tokens.float(), (0, -tokens.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
        unit = _block_unit(blocks, divisor)
        return (_nearest_e2m1(_divided(blocks, unit)) * unit).flatten(-2)[..., : tokens.shape[-1]]
    scale = _scale_of(tokens.float())
    return nearest_e4m3(tokens.float() / scale) * scale


def nearest_e4m3(quotients: Tensor) -> Tensor:
    """Round each value to the nearest E4M3 number, ties to even, saturating; returns fp32."""
    clipped = quotients.clamp(-_LARGEST, _LARGEST)
    exponent = torch.frexp(clipped).exponent.clamp(min=-5)  # e for [2**(e-1), 2**e); subnormals share the lowest step
    step = torch.ldexp(torch.ones_like(clipped), exponent - 4)
    return (clipped / step).round() * step


def _block_unit(blocks: Tensor, divisor: float) -> Tensor:
    """The factor of each block's codes in NVFP4, fp32 `(..., 1)`."""
    return nearest_e4m3(blocks.abs().amax(dim=-1, keepdim=True) * divisor / 6.0) / divisor


def _divided(blocks: Tensor, unit: Tensor) -> Tensor:
    return torch.where(unit > 0, blocks / unit, 0.0)  # a unit of zero belongs to a block of zeros, or nearly


def _nearest_e2m1(quotients: Tensor) -> Tensor:
    """Round each value to the nearest E2M1 number, ties to even, saturating; returns fp32."""
    clipped = quotients.clamp(-6.0, 6.0)
    exponent = torch.frexp(clipped).exponent.clamp(min=1)  # steps are 0.5 below 2, 1 below 4, then 2
    step = torch.ldexp(torch.ones_like(clipped), exponent - 2)
    return (clipped / step).round() * step


def _off_ties(values: Tensor, divisor: float) -> Tensor:
    """Values `(tokens, 32)`, changed so that neither a code nor a block scale in NVFP4 is near a tie.

    To change the largest of a block may bring others near one, so it is repeated.
    """
    for _ in range(_ATTEMPTS):
        blocks = values.float().unflatten(-1, (-1, _BLOCK))
        amax, unit = blocks.abs().amax(dim=-1, keepdim=True), _block_unit(blocks, divisor)
        scales = _near_a_tie(amax * divisor / 6.0) & (blocks.abs() == amax)
        quotients = _divided(blocks, unit)
        codes = _nearest_e2m1(quotients * (1 + 2.0**-18)) != _nearest_e2m1(quotients * (1 - 2.0**-18))
        near = (codes | scales).flatten(-2)
        if not bool(near.any()):
            break
        values = torch.where(near, values * 0.984375, values)
    return values


def _scale_of(values: Tensor) -> Tensor:
    return (values.abs().amax(dim=-1, keepdim=True) / _LARGEST).clamp(min=_SCALE_FLOOR)


def _near_a_tie(quotients: Tensor) -> Tensor:
    return nearest_e4m3(quotients * (1 + 2.0**-18)) != nearest_e4m3(quotients * (1 - 2.0**-18))


def _errors(product: Tensor, tokens: Tensor, start: int, kernel: Kernel, weight: Tensor) -> list[float]:
    """Largest error of an output relative to its bound, assuming quantized inputs, and assuming unquantized inputs.

    The bound covers the alignment of addends to the largest one, and rounding of the result to the output dtype. For
    packed codes it also covers the rounding of the weight to that dtype, because the weight was read through the GEMM.

    Args:
        product: outputs of the layer, fp32 `(tokens, out)`.
        tokens: its inputs, `(tokens, in)`.
        start: index of the first of these tokens among all test tokens.
        kernel: the kernel.
        weight: fp32 `(out, in)`.
    """
    rounded = round_inputs(tokens, kernel.divisor)
    if kernel.holds == "numbers":
        rounded = rounded.to(kernel.dtype).float()  # such a kernel multiplies values of its dtype
    count, (rows, columns) = len(tokens), weight.shape
    end = min(columns, (start + count) * _TERMS)
    tile = torch.nn.functional.pad(weight[:, start * _TERMS : end], (0, count * _TERMS - (end - start * _TERMS)))
    tile = tile.reshape(rows, count, _TERMS).permute(1, 2, 0)  # (tokens, terms, rows)
    inputs = torch.stack([_diagonal(values, start) for values in (rounded, tokens.float())], dim=1)
    exact = torch.bmm(inputs, tile)  # (tokens, 2, rows)
    size = torch.bmm(inputs.abs().amax(dim=1, keepdim=True), tile.abs())
    roundoff = _ROUNDOFF[kernel.dtype]
    lost = ((_TERMS + 1) * _ADDEND_LOSS + (roundoff if kernel.holds == "packed" else 0.0)) * size
    bound = roundoff * (exact.abs() + lost) + lost + torch.finfo(kernel.dtype).tiny
    parts = ((product[:, None] - exact).abs() / bound).amax(dim=(0, 2))
    return [float(part) for part in parts]


def _diagonal(tokens: Tensor, start: int) -> Tensor:
    """The nonzero features of each token, `(tokens, 32)`; `start` is the index of the first token."""
    count, columns = tokens.shape
    wide = torch.nn.functional.pad(tokens, (0, -columns % _TERMS)).reshape(count, -1, _TERMS)
    return wide[torch.arange(count), torch.arange(start, start + count)]


def _codes_differing(tokens: Tensor, codes: Tensor, scales: Tensor) -> dict[str, int]:
    """Number of input codes that differ from the expected ones, for each way in which a kernel may compute them.

    A kernel may divide by the scale or multiply by its reciprocal, and compute the scale as `amax / 448` or as
    `amax * (1 / 448)`. Compiled kernels may use approximate division: then the last bits of a scale may differ, and a
    tie may be rounded to either code. All codes of a layer must match in the same way of computing them. If the scale
    of a token does not match, all codes of the token count as differing.

    Args:
        tokens: the inputs, `(tokens, features)`.
        codes: the codes observed in the kernel, E4M3; rows and columns beyond those of `tokens` are padding.
        scales: the scales observed in the kernel, one per token.

    Returns:
        The number of differing codes, by a description of the way of computing them.
    """
    values, count, width = tokens.float(), *tokens.shape
    held = codes[:count, :width].contiguous().view(torch.uint8)
    scale = scales.float().reshape(-1)[:count, None]
    amax = values.abs().amax(dim=-1, keepdim=True)
    found = {}
    for how, expected in (
        ("amax / 448", (amax / _LARGEST).clamp(min=_SCALE_FLOOR)),
        ("amax * (1 / 448)", (amax * (1 / torch.tensor(_LARGEST))).clamp(min=_SCALE_FLOOR)),
    ):
        right = scale == expected if scale.numel() == count else torch.zeros(count, 1, dtype=torch.bool)
        for way, quotients in (("divided by", values / expected), ("times the reciprocal of", values * (1 / expected))):
            found[f"{way} {how}"] = int(((_codes(quotients) != held) | ~right).sum())
    if scale.numel() == count:
        near = (scale / (amax / _LARGEST).clamp(min=_SCALE_FLOOR) - 1).abs() <= _DIVISION_LOSS
        sides = [_codes(values / scale * (1 + sign * _DIVISION_LOSS)) for sign in (-1, 1)]
        found[APPROXIMATE] = int(((held != sides[0]) & (held != sides[1]) | ~near).sum())
    return found


def _codes(quotients: Tensor) -> Tensor:
    return nearest_e4m3(quotients).to(torch.float8_e4m3fn).view(torch.uint8)
