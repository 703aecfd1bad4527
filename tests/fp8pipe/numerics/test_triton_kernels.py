"""The Triton kernels without a GPU: interpreted on a CPU, and compiled for GPUs that are not here.

What this cannot show is the cast instruction itself, and time. The start-up check of `fused.py` holds that instruction
against torch on the device, for every bf16 number.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from breadth import usual

from fp8pipe.numerics.grids import E4M3, E5M2

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

ROOT = Path(__file__).parents[3]
CAPABILITIES = (89, 90, 100, 120)
_ALIGNED = [["tt.divisibility", 16]]  # what a launch finds out about pointers and widths


def test_the_interpreter_agrees_with_torch_on_random_shapes():
    count = usual(6, 1000)
    command = [sys.executable, str(ROOT / "tests" / "support" / "interpreted_kernels.py"), str(count), "0"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"tried": count, "differing": []}


def compiled(kernel, types, constants, capability, warps, aligned):
    """A kernel for a GPU of that capability: PTX, and registers, stack and local memory of its machine code."""
    from triton.backends.compiler import GPUTarget

    attributes = {(place,): _ALIGNED for place in range(len(types))} if aligned else None
    signature = types | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return built.asm["ptx"], built.asm["cubin"]


def resources(cubin, folder):
    """Registers, stack and local memory, as cuobjdump reads them from the machine code."""
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(folder / "kernel.cubin")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("grid", [E4M3, E5M2], ids=lambda grid: grid.name)
def test_the_cast_compiles_to_the_instruction_without_spills(capability, grid, tmp_path):
    from fp8pipe.numerics import triton_kernels

    code = {"e4m3": "fp8e4nv", "e5m2": "fp8e5"}[grid.name]
    types = {"x": "*bf16", "codes": f"*{code}", "scales": "*fp32", "columns": "i32", "stride": "i32"}
    for columns, aligned in ((4096, True), (1 << 15, True), (11008, False)):
        block, warps = triton_kernels.block_of(columns)
        constants = {"MAX_BITS": grid.max_bits, "FLOOR_BITS": triton_kernels._FLOOR_BITS, "BLOCK": block}
        ptx, cubin = compiled(triton_kernels.cast_rows, types, constants, capability, warps, aligned)
        # Two numbers an instruction; through fp16 on Ada with Triton 3.6, exactly for eight significant bits.
        assert len(re.findall(rf"cvt\.rn\.satfinite\.{grid.name}x2\.f(?:32|16x2)", ptx)) == block // warps // 64
        used = resources(cubin, tmp_path)
        assert (used["STACK"], used["LOCAL"]) == (0, 0)
        assert used["REG"] * warps * 32 <= 1 << 16  # registers of a multiprocessor
        # One pass: nothing is read twice, and 16 bytes at a time where the row lies so.
        reads = re.findall(r"ld\.global[\w.]*", ptx)
        per_thread = block // (32 * warps)
        assert reads == (["ld.global.v4.b32"] * (per_thread // 8) if aligned else ["ld.global.b16"] * per_thread)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_transpose_compiles_to_wide_reads_and_writes(capability, tmp_path):
    from fp8pipe.numerics import triton_kernels

    types = {"source": "*u8", "target": "*u8", "rows": "i32", "columns": "i32"}
    constants = {"TILE": triton_kernels._TILE}
    for aligned in (True, False):
        ptx, cubin = compiled(triton_kernels.transpose_tile, types, constants, capability, 4, aligned)
        width = "v4.b32" if aligned else "b8"
        assert set(re.findall(r"(?:ld|st)\.global\.([\w.]+)", ptx)) == {width}
        used = resources(cubin, tmp_path)
        assert (used["STACK"], used["LOCAL"]) == (0, 0)
