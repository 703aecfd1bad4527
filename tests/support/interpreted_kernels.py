"""The Triton kernels in Triton's interpreter on a CPU, against torch; a program: the interpreter is chosen at import.

    TRITON_INTERPRET=1 python interpreted_kernels.py COUNT SEED

The interpreter's own cast of fp32 to FP8 is wrong in some codes (it shifts bits away where it should round). That one
step is done by torch here, whose cast the hardware's is held against at start-up; all others are the interpreter's.
Prints one JSON line: how many shapes were tried, and what differed.
"""

from __future__ import annotations

import json
import sys

import torch
import triton.language as tl
from triton.runtime import interpreter

from fp8pipe.numerics import fused, triton_kernels
from fp8pipe.numerics.grids import E4M3, E5M2, quantize
from fp8pipe.numerics.kinds import ScaleRule

_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_plain = interpreter.InterpreterBuilder.create_fp_to_fp


def _cast(self, src, dst_type, rounding_mode):
    target = _FP8.get(dst_type.scalar)
    if target is None or src.dtype.scalar != tl.float32:
        return _plain(self, src, dst_type, rounding_mode)
    codes = torch.from_numpy(src.data.copy()).to(target).view(torch.uint8).numpy()
    return interpreter.TensorHandle(codes, dst_type.scalar)


interpreter.InterpreterBuilder.create_fp_to_fp = _cast


def _try(random: torch.Generator, columns: int) -> str | None:
    """One random matrix, with a stride of its own and rows of all sizes; what differs."""
    rows = int(torch.randint(1, 9, (), generator=random))
    wide = torch.randn(rows, columns + 5, generator=random) * torch.exp2(20 * torch.randn(rows, 1, generator=random))
    wide *= torch.exp2(6 * torch.randn(rows, columns + 5, generator=random))
    x = wide.bfloat16()[:, : columns if columns % 2 else columns + 5].narrow(1, 0, columns)
    for grid in (E4M3, E5M2):
        codes, scale = triton_kernels.quantize_rows(x, grid)
        expected, right = quantize(x, grid, ScaleRule.POWER_OF_TWO, per_row=True)
        same = torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scale, right.value)
        if not same and bool(wide.isfinite().all()):
            return f"{grid.name} of {rows} x {columns}"
    code = torch.randint(0, 256, (rows, columns), generator=random, dtype=torch.uint8)
    if not torch.equal(triton_kernels.transpose_bytes(code), code.t()):
        return f"the transpose of {rows} x {columns}"
    return None


def main() -> None:
    """Try the start-up check, then random shapes."""
    count, seed = int(sys.argv[1]), int(sys.argv[2])
    random = torch.Generator().manual_seed(seed)
    found = [fused.first_difference(triton_kernels, torch.device("cpu"))]
    for number in range(count):
        largest = (64, 300, 5000)[number % 3]
        found.append(_try(random, int(torch.randint(1, largest, (), generator=random))))
    print(json.dumps({"tried": count, "differing": [one for one in found if one]}))


if __name__ == "__main__":
    main()
