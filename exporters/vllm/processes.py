"""Processes of vLLM: how one is ended with all that it started, and what its end means.

An engine runs in a session of its own, so that everything it starts ends with it. vLLM is talkative: only the last
lines of its output are shown.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from fp8pipe.core.errors import BadArtifactError, Fp8PipeError, MissingCapabilityError, OutOfMemoryError

_SHOWN_LINES = 15


def end_group(process: subprocess.Popen[bytes], grace_s: float = 5.0) -> None:
    """End a process that leads its own session, and all that it started: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        if _wait_for_group(process, grace_s):
            break
    process.poll()


def _wait_for_group(process: subprocess.Popen[bytes], grace_s: float) -> bool:
    """Whether nothing of the group is left within `grace_s`."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        process.poll()  # reaps the leader, which would count as alive otherwise
        try:
            os.killpg(process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return True
        time.sleep(0.05)
    return False


def last_lines(log: Path, count: int = _SHOWN_LINES) -> str:
    """The end of a log, for a message."""
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines() if log.is_file() else []
    return "\n".join(lines[-count:]) or "(it printed nothing)"


def engine_failure(what: str, code: int, log: Path) -> Fp8PipeError:
    """The error for an engine that ended with `code` after writing `log`."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    why = f"exit status {code}; its last lines:\n{last_lines(log)}"
    if code == -signal.SIGKILL or "MemoryError" in text or "can't allocate memory" in text:
        return OutOfMemoryError(what, why=why, fix="free memory, or use a machine with more")
    if "UntestedVersionError" in text:
        return MissingCapabilityError(
            what, why=why, fix="install the vLLM version that the plugin names (scripts/setup_vllm.sh does)"
        )
    if "ModuleNotFoundError" in text or "ImportError" in text:
        return MissingCapabilityError(what, why=why, fix="run scripts/setup_vllm.sh to complete vLLM's environment")
    return BadArtifactError(
        what, why=why, fix="check the export with `fp8pipe verify`; the lines above are vLLM's own words"
    )
