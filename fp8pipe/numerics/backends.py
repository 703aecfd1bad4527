"""What differs by device in FP8 training, behind one interface: `backend(tensor)` gives its device's operations.

The mathematics is that of `Backend`, in torch: operands are rounded to FP8, and products of what the codes stand for
are summed in fp32 and rounded once. E4M3 and E5M2 codes are exact in bf16 and their products exact in fp32, so with
power-of-two scales one bf16 GEMM of dequantized operands is the FP8 GEMM, and torch's own FP8 product, slow on a CPU,
is not needed. A CPU does that, with compiled casts. On CUDA `torch._scaled_mm` multiplies the codes themselves.

Activations and gradients follow the rule of the weight's scale. `power-of-two` has one scale per row (token), as
engines do when they serve, so that one outlier token does not push all others into the subnormals; `exact` has one for
all.

The compiled casts are `kernels.c`, built once for this machine and kept in the user's cache under a digest of source,
flags and processor, so that a cast costs one pass; absent a compiler, torch does the same. They change no bit of any
result: tests compare them with their torch twins here.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8pipe.numerics import fused
from fp8pipe.numerics.grids import AMAX_FLOOR, E4M3, E5M2, FloatGrid, Scale, quantize
from fp8pipe.numerics.kinds import ScaleRule

_ALIGN = 16  # torch._scaled_mm: inner and outer widths must be multiples of 16


def _quantize_rows(x: Tensor, grid: FloatGrid, rule: ScaleRule) -> tuple[Tensor, Scale]:
    per_row = rule is ScaleRule.POWER_OF_TWO
    return (fused.quantize_rows(x, grid) if per_row else None) or quantize(x, grid, rule, per_row=per_row)


class Backend:
    """The operations in torch, right on every device; the fast ones replace some."""

    def cast(self, x: Tensor, grid: FloatGrid, rule: ScaleRule, out: Tensor | None = None) -> Tensor:
        """Round `x` `(rows, cols)`, bf16 or fp32, to `grid` with dynamic scales: one, or `power-of-two` one per row.

        Returns:
            The dequantized values: with `power-of-two` in the dtype of `x` (exact), else fp32. They are in `out`, where
            it is given: `(rows, cols)` with unit column stride, of the dtype that the result has.
        """
        codes, scale = _quantize_rows(x, grid, rule)
        values = scale.dequantize(codes)
        values = values if rule is ScaleRule.EXACT else values.to(x.dtype)
        return values if out is None else out.copy_(values)

    def decode(self, codes: Tensor, scale: Scale, dtype: torch.dtype) -> Tensor:
        """E4M3 codes `(rows, cols)` dequantized: with a power-of-two scale in `dtype`, bf16 or fp32, else fp32."""
        values = scale.dequantize(codes)
        return values if scale.rule is ScaleRule.EXACT else values.to(dtype)

    def decode_units(self, codes: Tensor) -> Tensor:
        """E4M3 codes (any shape) as fp32 in code units."""
        return codes.float()

    def merge_rows(self, codes: Tensor, rows: Tensor, update: Tensor) -> None:
        """`codes[rows] = round(codes[rows] + update)` to nearest, in place.

        Of E4M3 codes `(out, in)`, distinct int64 row indices, and `(len(rows), in)` fp32 code units.
        """
        stored = codes.view(torch.uint8)
        merged = E4M3.cast(stored[rows].view(E4M3.dtype).float() + update)
        stored.index_copy_(0, rows, merged.view(torch.uint8))

    def forward_product(self, x: Tensor, codes: Tensor, scale: Scale) -> Tensor:
        """`[Y | X A^T]`: x (tokens, in) cast to E4M3, by codes (rows, in) transposed; x's dtype."""
        values = self.cast(x, E4M3, scale.rule)
        return (values @ self.decode(codes, scale, values.dtype).t()).to(x.dtype)  # (T, n) @ (n, m + r)

    def input_gradient(self, grad: Tensor, codes: Tensor, scale: Scale, beside: Tensor | None = None) -> Tensor:
        """`[G | beside] codes`: G (tokens, m) cast to E5M2, `beside` (tokens, r) as it is, by codes (m + r, in).

        G is bf16 or fp32; `beside` and the result have its dtype. With a `beside` the scale is a power of two; without
        one codes are `(m, in)`.
        """
        if beside is None:
            values = self.cast(grad, E5M2, scale.rule)
        else:
            width = grad.shape[1]
            values = grad.new_empty(grad.shape[0], width + beside.shape[1])
            self.cast(grad, E5M2, scale.rule, out=values[:, :width])
            values[:, width:] = beside
        return (values @ self.decode(codes, scale, values.dtype)).to(grad.dtype)  # (T, m + r) @ (m + r, n)

    def adapter_gradient(self, grad: Tensor, o: Tensor) -> Tensor:
        """dB = G^T O of `exact` casts (G in E5M2, O in E4M3), one scale each: (m, r) fp32."""
        return (self.cast(grad, E5M2, ScaleRule.EXACT).t() @ self.cast(o, E4M3, ScaleRule.EXACT)).float()


class _Cpu(Backend):
    """One compiled pass each over casts, codes and merged rows, where a compiler was found."""

    def cast(self, x: Tensor, grid: FloatGrid, rule: ScaleRule, out: Tensor | None = None) -> Tensor:
        fits = rule is ScaleRule.POWER_OF_TWO and x.dtype == torch.bfloat16 and x.stride(1) == 1
        lib = library() if fits else None
        if lib is None:
            return super().cast(x, grid, rule, out)
        out = torch.empty_like(x) if out is None else out
        lib.fp8pipe_cast_rows_bf16(
            x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), x.shape[0], x.shape[1], grid.mantissa_bits,
            round(math.log2(grid.min_normal)), grid.max, AMAX_FLOOR,
        )  # fmt: skip
        return out

    def decode(self, codes: Tensor, scale: Scale, dtype: torch.dtype) -> Tensor:
        fits = scale.rule is ScaleRule.POWER_OF_TWO and dtype == torch.bfloat16 and codes.is_contiguous()
        lib = library() if fits else None
        # The kernel's range; NaN is not in it either: a poisoned scale stays torch's affair.
        if lib is None or not 2.0**-100 <= (factor := scale.value.item()) <= 2.0**100:
            return super().decode(codes, scale, dtype)
        values = torch.empty(codes.shape, dtype=torch.bfloat16)
        lib.fp8pipe_decode_e4m3(codes.data_ptr(), values.data_ptr(), codes.numel(), factor)
        return values

    def decode_units(self, codes: Tensor) -> Tensor:
        lib = library() if codes.is_contiguous() else None
        if lib is None:
            return super().decode_units(codes)
        values = torch.empty(codes.shape)
        lib.fp8pipe_decode_e4m3_fp32(codes.data_ptr(), values.data_ptr(), codes.numel())
        return values

    def merge_rows(self, codes: Tensor, rows: Tensor, update: Tensor) -> None:
        lib = library() if codes.is_contiguous() else None
        if lib is None:
            return super().merge_rows(codes, rows, update)
        rows, update = rows.contiguous(), update.contiguous()
        lib.fp8pipe_merge_rows_e4m3(codes.data_ptr(), rows.data_ptr(), rows.numel(), codes.shape[1], update.data_ptr())
        return None


class _Cuda(Backend):
    """`torch._scaled_mm` on codes.

    It wants the first operand row-major and the second column-major (cuBLASLt's TN), and inner and outer widths in
    multiples of 16: padding meets the widths, a physical transpose the layout.
    """

    def forward_product(self, x: Tensor, codes: Tensor, scale: Scale) -> Tensor:
        # codes (m + r, n) row-major, so its transpose is the column-major second operand, without a copy.
        return _scaled_mm(x, E4M3, codes.t(), scale, fast_accumulation=True)

    def input_gradient(self, grad: Tensor, codes: Tensor, scale: Scale, beside: Tensor | None = None) -> Tensor:
        width = grad.shape[1]
        # The second operand must be column-major here too: one byte-wide transpose copy per layer.
        column_major = fused.transpose_bytes(_bytes(codes[:width])).view(codes.dtype).t()
        product = _scaled_mm(grad, E5M2, column_major, scale, fast_accumulation=False)
        if beside is None:
            return product
        return torch.addmm(product, beside, self.decode(codes[width:], scale, grad.dtype))  # (T, r) @ (r, n), thin

    def adapter_gradient(self, grad: Tensor, o: Tensor) -> Tensor:
        # A bf16 GEMM of codes: r and the token count need no alignment then, at 2 T m r operations.
        (g, g_scale), (a, a_scale) = quantize(grad, E5M2, ScaleRule.EXACT), quantize(o, E4M3, ScaleRule.EXACT)
        product = g.to(torch.bfloat16).t() @ a.to(torch.bfloat16)
        assert g_scale.inverse_scale is not None
        assert a_scale.inverse_scale is not None
        return product.float() / (g_scale.inverse_scale * a_scale.inverse_scale)


_CPU, _CUDA, _TORCH = _Cpu(), _Cuda(), Backend()


def backend(tensor: Tensor) -> Backend:
    """The operations of the device that holds `tensor`."""
    if tensor.is_cuda:
        return _CUDA
    return _CPU if tensor.device.type == "cpu" else _TORCH


def _scaled_mm(a: Tensor, grid: FloatGrid, b: Tensor, scale: Scale, *, fast_accumulation: bool) -> Tensor:
    """`a` (rows, inner), cast to `grid`, by column-major codes `b` (inner, cols); the dtype of `a`."""
    codes, scale_a = _quantize_rows(a, grid, scale.rule)
    cols, scale_b = b.shape[1], scale.value
    if b.shape[0] % _ALIGN or cols % _ALIGN:
        b = _pad(_pad(b.t(), 0), 1).t()
    if scale_a.value.dim() == 2:  # one scale per row wants one per column beside it
        scale_b = scale_b.expand(1, b.shape[1]).contiguous()
    product = torch._scaled_mm(
        _pad(codes, 1), b, scale_a=scale_a.value, scale_b=scale_b, out_dtype=a.dtype, use_fast_accum=fast_accumulation
    )
    return product if product.shape[1] == cols else product[:, :cols]


def _pad(codes: Tensor, dim: int) -> Tensor:
    """Zero codes appended so that `dim` is a multiple of 16 (zero is code 0 in both formats)."""
    missing = -codes.shape[dim] % _ALIGN
    if not missing:
        return codes
    return F.pad(_bytes(codes), (0, missing) if dim == 1 else (0, 0, 0, missing)).view(codes.dtype)


def _bytes(codes: Tensor) -> Tensor:
    """The codes as uint8: few operators exist for float8 dtypes."""
    return codes.view(torch.uint8)


_LOG = logging.getLogger(__name__)
_FLAGS = ("-O3", "-march=native", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
_WIDE = "-mprefer-vector-width=512"  # compilers default to half of AVX-512's width


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be built (said once, in the log).

    Set `FP8PIPE_NATIVE=0` to run the torch casts, for comparison.
    """
    if os.environ.get("FP8PIPE_NATIVE", "1") == "0":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or platform.system() != "Linux":
        _LOG.warning("no C compiler found: CPU casts run in torch (same bits, slower); install gcc to speed up")
        return None
    try:
        return _declare(ctypes.CDLL(str(_build(compiler))))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        _LOG.warning("the CPU casts could not be compiled, torch runs them (same bits, slower): %s", detail)
        return None


def _build(compiler: str) -> Path:
    source = Path(__file__).with_name("kernels.c")
    flags = (*_FLAGS, _WIDE) if "avx512bw" in _processor() else _FLAGS
    digest = hashlib.sha256()
    for part in (source.read_bytes(), " ".join(flags).encode(), compiler.encode(), _processor().encode()):
        digest.update(part)
    cache = Path(os.environ.get("FP8PIPE_CACHE", Path.home() / ".cache" / "fp8pipe")) / "native"
    target = cache / f"kernels-{digest.hexdigest()[:16]}.so"
    seal = target.with_suffix(".sha256")
    if _is_ours(target) and _is_ours(seal) and seal.read_text() == _sha256(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        built = Path(scratch) / target.name
        command = [compiler, *flags, str(source), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (Path(scratch) / seal.name).write_text(_sha256(built))
        for path in (built, Path(scratch) / seal.name):
            path.chmod(0o644)
        built.replace(target)
        (Path(scratch) / seal.name).replace(seal)
    return target


def _is_ours(path: Path) -> bool:
    """Whether a plain file of this user's, which nobody else may write: machine code of others is not loaded."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _processor() -> str:
    """Model and feature flags: a library built for another processor may not run on this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, real, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    for name, arguments in {
        "cast_rows_bf16": (pointer, size, pointer, size, size, size, integer, integer, real, real),
        "decode_e4m3": (pointer, pointer, size, real),
        "decode_e4m3_fp32": (pointer, pointer, size),
        "merge_rows_e4m3": (pointer, pointer, size, size, pointer),
    }.items():
        kernel = getattr(lib, f"fp8pipe_{name}")
        kernel.argtypes, kernel.restype = arguments, None
    return lib
