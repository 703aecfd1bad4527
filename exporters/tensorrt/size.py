"""What an engine weighs, against the codes, scales and floats that it cannot do without.

An engine of TensorRT for RTX carries the source text of its generated kernels, some 145 kB each, which its compiler
on the GPU reads. Most texts are written once a launch, also when two are the same: how much of it there is depends on
the number of layers, and neither on their width nor on a setting. So two things are judged: what is left without it,
since a builder that keeps weights dequantized doubles that, and the file as it is stored, packed.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exporters.tensorrt.target import EngineSize
from fp8pipe.artifact import Comparison, Gate

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "ALLOWANCE_BYTES", "LIMIT", "expected_sizes", "ideal_bytes", "measure_engine", "size_gate",
    "stored_gate",
]  # fmt: skip

# An FP16 copy of 8-bit codes would be at 2.
LIMIT: Final = 1.35
# Beside text and weights an engine has a header and a record per layer: 57 kB at two blocks, 210 kB at twelve.
ALLOWANCE_BYTES: Final = 256 * 1024
_MEGABYTE: Final = 1_000_000
# Text in runs of this length: by chance, weights give one in 10^800. The E4M3 scales of NVFP4 blocks are all of these
# bytes, too, but have no line feed: as a scale that is 2^-6 of the usual ones.
_TEXT: Final = re.compile(rb"[\t\n\r\x20-\x7e]{2000,}")

# For plans: source text of a transformer block's kernels (0.9 to 1.2 MB at 6, 12 and 30 blocks), and what xz leaves of
# codes (0.83 to 0.95 of them; 0.53 to 0.56 where 4 bits lie in a byte).
_BLOCK_TEXT_BYTES: Final = 1_000_000
_PACKED, _PACKED_HALVES = 0.9, 0.55


def expected_sizes(graph_bytes: int, blocks: int, engines: int, *, pack: bool, halves: bool) -> tuple[int, int]:
    """Bytes of an export with its engines: the most while it is made, and in the end.

    Args:
        graph_bytes: the graph with its weights.
        blocks: transformer blocks.
        engines: how many are built.
        pack: whether they are stored compressed; while one is, it is there twice.
        halves: whether codes of 4 bits lie in bytes.
    """
    if not engines:
        return graph_bytes, graph_bytes
    plain = graph_bytes + blocks * _BLOCK_TEXT_BYTES
    if not pack:
        return graph_bytes + engines * plain, graph_bytes + engines * plain
    packed = int(graph_bytes * (_PACKED_HALVES if halves else _PACKED))
    return graph_bytes + engines * packed + plain, graph_bytes + engines * packed


def ideal_bytes(model: ir.Model) -> int:
    """Bytes of all stored tensors of a graph; two INT4 or FP4 codes per byte."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def measure_engine(engine: Path, ideal: int) -> EngineSize:
    """Weigh an engine's file, which is not empty, against `ideal_bytes` of its graph."""
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        runs = (match.group() for match in _TEXT.finditer(content))
        text = sum(len(run) for run in runs if b"\n" in run)
        return EngineSize(engine_bytes=len(content), text_bytes=text, ideal_bytes=ideal)


def size_gate(size: EngineSize, capability: str, *, required: bool) -> Gate:
    """Whether weights lie in the engine as they lie in the graph.

    A figure alone where the builder may keep weights dequantized (weight-only formats): `required` is False then.
    """
    shown = f"codes, scales and floats have {size.ideal_bytes / _MEGABYTE:.1f}: x{size.weights_over_ideal:.2f}"
    name, detail = f"MB of the engine beside text for {capability}", f"of {size.engine_bytes / _MEGABYTE:.1f}; {shown}"
    return _bytes_gate(name, size.engine_bytes - size.text_bytes, size, required, detail)


def stored_gate(size: EngineSize, stored_bytes: int, capability: str, *, required: bool) -> Gate:
    """Whether the engine, as the export stores it, has the size of its codes.

    A figure alone for engines that are not packed and for weight-only formats: `required` is False then.
    """
    detail = f"x{stored_bytes / size.ideal_bytes:.2f} of codes, scales and floats"
    return _bytes_gate(f"MB of the stored engine for {capability}", stored_bytes, size, required, detail)


def _bytes_gate(name: str, found: int, size: EngineSize, required: bool, detail: str) -> Gate:
    value, limit = found / _MEGABYTE, (LIMIT * size.ideal_bytes + ALLOWANCE_BYTES) / _MEGABYTE
    return Gate(
        name=name, value=value, comparison=Comparison.AT_MOST, threshold=limit if required else max(value, limit),
        detail=detail,
    )  # fmt: skip
