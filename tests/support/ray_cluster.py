"""A Ray cluster of this machine in a process of its own, for drivers that are other processes.

`ray stop` would end the clusters of other tests, too; this one ends with its process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
_HOLD = """
import sys, ray
ray.init("local", num_cpus=int(sys.argv[1]), num_gpus=0, include_dashboard=False, log_to_driver=False)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def ray_cluster(cpus: int) -> Iterator[str]:
    """The address of a cluster with one node, whose workers find this fp8pipe."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    with tempfile.TemporaryFile("w+") as errors:
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(cpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env=environment, text=True,
        )  # fmt: skip
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            line = next((line for line in holder.stdout if line.startswith("address ")), None)
            if line is None:
                errors.seek(0)
                raise RuntimeError(f"the Ray cluster did not start:\n{errors.read()}")
            yield line.split()[1]
        finally:
            holder.stdin.close()
            holder.wait(60)
