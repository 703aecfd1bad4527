"""GPU data sheets, and the fractions of their figures that kernels achieve: the constants of `pipeline.dry_run.costs`.

Sources: for the RTX 4090, NVIDIA's Ada architecture whitepaper, appendix A; for L40S, H100 and H200 their data sheets,
which state tensor throughput with sparsity and are therefore halved here; for B200 the HGX data sheet. This project has
measured none of these figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Fractions of the data sheet that large GEMMs and large elementwise kernels achieve, from torchao's roofline model
# (torchao/testing/training/roofline_utils.py): measured on an H100, and used there for other GPUs too.
GEMM_SHARE: Final = 0.78
MEMORY_SHARE: Final = 0.92


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU's data sheet; tensor throughput is dense, with fp32 accumulation, in FLOP/s."""

    name: str
    reported: str  # the name that CUDA reports, by which other variants of the GPU are told apart
    fp8_rate: float
    bf16_rate: float
    bandwidth: float  # memory bandwidth, bytes/s
    memory_bytes: int


DEVICES: Final = (
    Device("RTX 4090", "NVIDIA GeForce RTX 4090", 330.3e12, 165.2e12, 1.008e12, 24 << 30),
    Device("L40S", "NVIDIA L40S", 733e12, 362e12, 0.864e12, 48 * 10**9),
    Device("H100 SXM", "NVIDIA H100 80GB HBM3", 1979e12, 989e12, 3.35e12, 80 * 10**9),
    Device("H200 SXM", "NVIDIA H200", 1979e12, 989e12, 4.8e12, 141 * 10**9),
    Device("B200 SXM", "NVIDIA B200", 4500e12, 2250e12, 8.0e12, 180 * 10**9),
)


def device_reported(name: str) -> Device | None:
    """The data sheet of the GPU that CUDA reports as `name`; None if it is not in the table."""
    return next((device for device in DEVICES if device.reported == name), None)
