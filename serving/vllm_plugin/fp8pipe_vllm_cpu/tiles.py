"""Permission to use AMX, which Linux gives to a process only on request.

vLLM's attention for CPUs uses AMX in bf16 where the processor has it, and leaves the request to oneDNN, which makes it
before its own first product with AMX. If every product before the first attention is too small for that, as in tiny
models, the process ends with an illegal instruction (SIGILL).
"""

from __future__ import annotations

import ctypes
import platform
import sys

__all__ = ["request_tiles"]

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), see Documentation/arch/x86/xstate.rst of Linux.
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18


def request_tiles() -> bool:
    """Ask for permission, for this process and what it starts; harmless where there is no AMX.

    Returns:
        Whether AMX may be used now.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0)
