"""What a stage needs of the machine that runs it: for the scheduler of a cluster, and for the stage's own processes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pydantic import Field

from fp8pipe.core.config import FrozenConfig, Size

__all__ = ["Resources"]


class Resources(FrozenConfig):
    """The `resources` of a stage. They are no part of its key: what a stage writes does not depend on them."""

    gpus: int | None = Field(
        default=None, ge=0, description="GPUs; finetune and quantize-vit run one process for each if there are several"
    )
    cpus: int | None = Field(
        default=None,
        ge=1,
        description="CPUs, and the threads that the stage computes with unless OMP_NUM_THREADS is set",
    )
    memory: Size | None = Field(default=None, description="memory, for instance 64GiB")

    def environment(self, processes: int) -> dict[str, str]:
        """Default environment variables of the processes of a stage."""
        if processes == 1:
            return {} if self.cpus is None else {"OMP_NUM_THREADS": str(self.cpus)}
        # The launcher of several processes would give each of them one thread, and starts Python without -P.
        cores = self.cpus or len(os.sched_getaffinity(0))
        return {"OMP_NUM_THREADS": str(max(1, cores // processes)), "PYTHONSAFEPATH": "1"}


def launcher(program: Sequence[str], processes: int) -> list[str]:
    """The command line that starts a program in several processes on this machine.

    Args:
        program: Python, `-P`, and what it runs.
        processes: their number; with 1, the result is `program`.
    """
    if processes == 1:
        return list(program)
    options = ["--standalone", "--nproc-per-node", str(processes)]
    return [*program[:2], "-m", "torch.distributed.run", *options, *program[2:]]
