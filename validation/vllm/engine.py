"""Start the probe in vLLM's Python, wait for it, and turn its failures into ours.

The engine runs in one process of its own session, so that everything it starts ends with it. Its output goes to a
file: vLLM is talkative, and only the last lines of a failure are worth showing.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exporters.vllm.environment import VllmEnvironment, end_group, engine_failure, last_lines, subprocess_environment
from fp8pipe.core.errors import Fp8PipeError

__all__ = ["ProbeJob", "run_probe"]

logger = logging.getLogger(__name__)
PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True, slots=True)
class ProbeJob:
    """What the probe is asked (see `probe`)."""

    model: str  # the export's directory
    tensors: Mapping[str, Mapping[str, Any]]  # by checkpoint name, `Expected.digests()`
    sequences: list[list[int]] = field(default_factory=list)  # token ids to be scored, each at least two long
    prompts: list[str] = field(default_factory=list)  # questions to answer
    chat: bool = True  # put them through the chat template; plain completion otherwise
    max_tokens: int = 16  # longest answer
    max_model_len: int = 1024  # context length, tokens
    dtype: str = "float32"  # the engine's; fp32 for parity


def run_probe(job: ProbeJob, environment: VllmEnvironment, dump: Path, *, timeout_s: float) -> dict[str, Any]:
    """Run one job in a fresh engine.

    Args:
        job: what to do.
        environment: where vLLM is.
        dump: an existing directory for tensors that differ.
        timeout_s: longest time for all of it, seconds.

    Returns:
        The probe's result, see `probe.run`.

    Raises:
        MissingCapabilityError: vLLM, or the plugin, refused this installation.
        OutOfMemoryError: the engine ran out of memory or was killed for it.
        BadArtifactError: vLLM could not load or run the export; its last lines are shown.
        Fp8PipeError: it took longer than `timeout_s`.
    """
    with tempfile.TemporaryDirectory(prefix="fp8pipe-probe-") as folder:
        root = Path(folder)
        document = {**asdict(job), "dump": str(dump), "result": str(root / "result.json")}
        (root / "job.json").write_text(json.dumps(document), encoding="utf-8")
        log = root / "engine.log"
        command = [str(environment.python), "-P", str(PROBE), str(root / "job.json")]
        logger.info("starting vLLM %s on %s", environment.vllm, job.model)
        code = _run(command, log, timeout_s)
        if code != 0 or not (root / "result.json").is_file():
            raise engine_failure(f"vLLM failed on {job.model}", code, log)
        result: dict[str, Any] = json.loads((root / "result.json").read_text(encoding="utf-8"))
        logger.info("vLLM done: loaded in %.1f s, %.1f s in all", result["load_s"], result["total_s"])
        return result


def _run(command: list[str], log: Path, timeout_s: float) -> int:
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=_in_process(), start_new_session=True
        )
    try:
        return process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise Fp8PipeError(
            "vLLM did not finish in time",
            why=f"{time.monotonic() - started:.0f} s passed; its last lines:\n{last_lines(log)}",
            fix="allow more time, or a machine with more cores",
        ) from None
    finally:
        end_group(process)


def _in_process() -> dict[str, str]:
    """One process, few threads: the fastest start, and no oversubscription (vLLM makes its own threads too)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, min(16, cores // 2)))
    return subprocess_environment(
        OMP_NUM_THREADS=threads, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
        FP8PIPE_VLLM_ACTIVATIONS="none", FP8PIPE_VLLM_KEEP_WEIGHTS="1",
    )  # fmt: skip
