"""Device-specific operations of FP8 training behind one interface: `backend(tensor)` selects them by the device.

All backends compute what `reference.Backend` defines:

* On a CPU, casts run in the C kernels of `kernels.c`, which make a single pass over the data. The kernels are compiled
  on first use, and stored in the user's cache directory under a digest of source, flags and processor. Without a
  compiler, the torch operations are used. The results are the same bit for bit, which tests check.
* CUDA GPUs with FP8 tensor cores multiply the FP8 codes directly (`cuda.Cuda`).
* Other GPUs run the reference, whose GEMMs are in bf16.
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
from torch import Tensor

from fp8pipe.core.machine import FP8_CAPABILITY
from fp8pipe.numerics import cuda
from fp8pipe.numerics.grids import AMAX_FLOOR, FloatGrid, Scale
from fp8pipe.numerics.kinds import ScaleRule
from fp8pipe.numerics.reference import Backend


class _Cpu(Backend):
    """Casts, decodes and merges rows with C kernels that make one pass each, or else like the reference."""

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
        # The kernel supports only scales in this range. For NaN the comparison is False, so that torch is used.
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


_CPU, _CUDA, _TORCH = _Cpu(), cuda.Cuda(), Backend()


def backend(tensor: Tensor) -> Backend:
    """The backend for the device of `tensor`."""
    if tensor.is_cuda:
        return _CUDA if cuda.capability(tensor.get_device()) >= FP8_CAPABILITY else _TORCH
    return _CPU if tensor.device.type == "cpu" else _TORCH


_LOG = logging.getLogger(__name__)
_FLAGS = ("-O3", "-march=native", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
_WIDE = "-mprefer-vector-width=512"  # by default, compilers use 256-bit vectors even on processors with AVX-512


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled C kernels; None if they cannot be built, which is logged once.

    If the environment variable `FP8PIPE_NATIVE` is 0, the kernels are not used either, for comparison with torch.
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
    """Whether `path` is a regular file that is owned by this user and that nobody else can write to.

    A library that does not meet this is not loaded.
    """
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _processor() -> str:
    """Processor model and feature flags, because a library compiled for another processor may not run on this one."""
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
