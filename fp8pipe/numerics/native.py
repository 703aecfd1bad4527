"""Builds and loads `kernels.c`, so that CPU casts cost one pass each; absent a compiler, torch does the same.

The library is compiled once for this machine and kept in the user's cache under a digest of source, flags and
processor. Nothing here changes a bit of any result: `backends.py` holds the torch twin, and tests compare them.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

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
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        built = Path(scratch) / target.name
        command = [compiler, *flags, str(source), "-o", str(built), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.replace(target)
    return target


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
