"""Speed of single kernels, compared with the hardware limit: tensor core rate for GEMMs, memory bandwidth for others.

GEMMs have the shapes of LLaMA-7B: for each layer (fused as in FALQON), the forward GEMM and the GEMM for the gradient
of the input. For memory-bound kernels, only unavoidable traffic is counted: a cast reads two bytes per value and writes
one. The bandwidth is compared with that of a copy on the same device, and with the data sheet's if it is known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Final

import torch
from torch import Tensor

from fp8pipe.numerics import fused
from fp8pipe.numerics.grids import E4M3, E5M2, FloatGrid, Scale, quantize
from fp8pipe.numerics.kinds import ScaleRule
from gpu_parts.context import Context, LeftOut
from gpu_parts.environment import gpu_state
from gpu_parts.timing import timed
from pipeline.dry_run.devices import Device, device_reported

_TOKENS, _RANK, _HIDDEN, _WIDE = 8448, 64, 4096, 11008
# (input features, output features) of the fused layers: q/k/v, attention output, gate/up, down.
_LAYERS: Final = {
    "qkv": (_HIDDEN, 3 * _HIDDEN), "out": (_HIDDEN, _HIDDEN), "gate, up": (_HIDDEN, 2 * _WIDE),
    "down": (_WIDE, _HIDDEN),
}  # fmt: skip
_TINY: Final = {"qkv": (32, 96)}
_CALLS: Final = 10  # calls of a kernel per round


def run(context: Context) -> None:
    """Emit the rows of this part."""
    layers, tokens, rank = (_TINY, 64, 16) if context.tiny else (_LAYERS, _TOKENS, _RANK)
    widths = sorted({width for pair in layers.values() for width in pair})
    context.row("launch", lambda: _launch(context))
    context.row("copy", lambda: _copy(context, tokens, max(widths)))
    for name, (into, out) in layers.items():
        for what, form in _FORMS.items():
            context.row(f"forward {name}, {what}", partial(form, context, tokens, into, out + rank, E4M3))
    for width in widths:
        for grid in (E4M3, E5M2):
            for what, cast in _CASTS.items():
                find = partial(_cast, context, cast, tokens, width, grid)
                context.row(f"cast {grid.name} {tokens} x {width}, {what}", find)
    for name, (into, out) in layers.items():
        for what in _TRANSPOSES:
            context.row(f"transpose {name}, {what}", partial(_transpose, context, what, out, into))
    for name, (into, out) in layers.items():
        for what, form in _FORMS.items():
            context.row(f"gradient {name}, {what}", partial(form, context, tokens, out, into, E5M2))
    context.row("state under load", lambda: gpu_state(context))
    for width in widths:  # at the end, since each width has to be compiled
        name = f"cast e4m3 {tokens} x {width}, torch.compile"
        context.row(
            name, partial(_cast, context, _by_compiler, tokens, width, E4M3), needs=0.0 if context.tiny else 15.0
        )


def _sheet(context: Context) -> Device | None:
    return device_reported(torch.cuda.get_device_name(context.device)) if context.on_cuda else None


def _timed(context: Context, work: Callable[[], object]) -> dict[str, Any]:
    calls = 2 if context.tiny else _CALLS
    return timed(work, context.device, rounds=3 if context.tiny else 5, warmup=2, calls=calls)


def _launch(context: Context) -> dict[str, Any]:
    """Host time of one eager operator, which the cost model assumes to be 5 microseconds."""
    x = torch.zeros(8, device=context.device)
    return timed(lambda: x.add_(1.0), context.device, rounds=5, calls=20 if context.tiny else 1000)


def _moved(context: Context, moved: int, taken: dict[str, Any]) -> dict[str, Any]:
    """Add the bandwidth to a timing: GB/s for `moved` bytes, and its share of the data sheet's bandwidth."""
    rate, sheet = moved / taken["seconds"], _sheet(context)
    share = None if sheet is None else rate / sheet.bandwidth
    return {**taken, "bytes": moved, "gb_per_second": rate / 1e9, "of_data_sheet": share}


def _copy(context: Context, rows: int, columns: int) -> dict[str, Any]:
    x = torch.randn(rows, columns, device=context.device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return _moved(context, 4 * x.numel(), _timed(context, lambda: y.copy_(x)))


def _product(context: Context, rows: int, inner: int, cols: int, fp8: bool, work: Callable[[], object]) -> Any:
    taken, sheet = _timed(context, work), _sheet(context)
    rate = 2 * rows * inner * cols / taken["seconds"]
    peak = None if sheet is None else rate / (sheet.fp8_rate if fp8 else sheet.bf16_rate)
    return {**taken, "shape": [rows, inner, cols], "tflop_per_second": rate / 1e12, "of_data_sheet": peak}


def _bf16(context: Context, rows: int, inner: int, cols: int, grid: FloatGrid) -> dict[str, Any]:
    a, b = (torch.randn(n, inner, device=context.device, dtype=torch.bfloat16) for n in (rows, cols))
    return _product(context, rows, inner, cols, False, lambda: a @ b.t())


def _scaled(*, per_row: bool, fast: bool, after: bool = False) -> Callable[..., dict[str, Any]]:
    """A function that measures a GEMM with `torch._scaled_mm`.

    Args:
        per_row: one scale per row of the inputs; otherwise one scale per tensor.
        fast: whether to use the tensor cores' fast accumulation.
        after: apply per-row scales to the output in a separate elementwise kernel.
    """

    def measure(context: Context, rows: int, inner: int, cols: int, grid: FloatGrid) -> dict[str, Any]:
        x, w = (torch.randn(n, inner, device=context.device, dtype=torch.bfloat16) for n in (rows, cols))
        codes, scale = quantize(x, grid, ScaleRule.POWER_OF_TWO, per_row=per_row or after)
        weight, other = quantize(w, E4M3, ScaleRule.POWER_OF_TWO)
        left, right = scale.value, other.value
        if per_row:
            right = right.expand(1, cols).contiguous()
        elif after:
            left = torch.ones((), device=context.device)
        rowwise = scale.value.bfloat16()

        def work() -> Tensor:
            y = torch._scaled_mm(
                codes, weight.t(), scale_a=left, scale_b=right, out_dtype=torch.bfloat16, use_fast_accum=fast
            )
            return y.mul_(rowwise) if after else y

        return _product(context, rows, inner, cols, True, work)

    return measure


_FORMS: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "bf16": _bf16,
    "fp8 by rows, fast": _scaled(per_row=True, fast=True),
    "fp8 by rows": _scaled(per_row=True, fast=False),
    "fp8 by tensors, fast": _scaled(per_row=False, fast=True),
    "fp8 by tensors": _scaled(per_row=False, fast=False),
    "fp8 by tensors, fast, rows scaled after": _scaled(per_row=False, fast=True, after=True),
}


def _by_torch(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Scale]:
    return quantize(x, grid, ScaleRule.POWER_OF_TWO, per_row=True)


def _by_triton(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Scale]:
    found = fused.quantize_rows(x, grid)
    if found is None:
        raise LeftOut("no Triton kernel runs here")
    return found


_compiled = cache(lambda: torch.compile(_by_torch, dynamic=False))


def _by_compiler(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Scale]:
    if not x.is_cuda:
        raise LeftOut("compiling is for a GPU")
    found: tuple[Tensor, Scale] = _compiled()(x, grid)
    return found


_CASTS: Final[dict[str, Callable[[Tensor, FloatGrid], tuple[Tensor, Scale]]]] = {
    "torch": _by_torch, "triton": _by_triton,
}  # fmt: skip


def _cast(context: Context, cast: Any, rows: int, columns: int, grid: FloatGrid) -> dict[str, Any]:
    """Measure a cast with one scale per row; its codes must be identical to those of torch's eager cast."""
    x = torch.randn(rows, columns, device=context.device, dtype=torch.bfloat16)
    same = torch.equal(cast(x, grid)[0].view(torch.uint8), _by_torch(x, grid)[0].view(torch.uint8))
    return {**_moved(context, 3 * x.numel(), _timed(context, lambda: cast(x, grid))), "passed": same}


_TRANSPOSES: Final = ("torch", "triton")


def _transpose(context: Context, what: str, rows: int, columns: int) -> dict[str, Any]:
    codes = torch.randint(0, 256, (rows, columns), device=context.device, dtype=torch.uint8)
    if what == "triton" and not fused.ready(context.device):
        raise LeftOut("no Triton kernel runs here")
    work = fused.transpose_bytes if what == "triton" else lambda x: x.t().contiguous()
    same = torch.equal(work(codes), codes.t())
    return {**_moved(context, 2 * codes.numel(), _timed(context, lambda: work(codes))), "passed": same}
