"""Finds the Python that has vLLM, reads its versions, and starts, ends and diagnoses its processes.

vLLM pins exact versions of torch and transformers, so it usually has its own environment. It always runs as a
subprocess; if the current environment has vLLM, the current interpreter starts it. Versions are read from package
metadata, because importing vLLM takes seconds. An engine runs in its own process session, so that everything it starts
can be ended with it. vLLM logs a lot, so error messages show only the last lines of its output.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fp8pipe.core.errors import BadArtifactError, Fp8PipeError, MissingCapabilityError, OutOfMemoryError

PYTHON_VARIABLE = "FP8PIPE_VLLM_PYTHON"
_FOLDER = Path(".venv-vllm") / "bin" / "python"
_PLUGIN = "fp8pipe_cpu"  # the name of the plugin's entry point
_REPOSITORY = Path(__file__).resolve().parents[2]
_NVFP4_SINCE = (0, 2)  # the plugin's first version that knows NVFP4 ...
_W4A4_SINCE = (0, 3)  # ... and inputs in it ...
_MODELOPT_SINCE = (0, 4)  # ... and ModelOpt's layout
_HOW = (
    "run scripts/setup_vllm.sh (CPU), or name a Python that has vLLM with --vllm-python or the variable "
    f"{PYTHON_VARIABLE}"
)
_READ_VERSIONS = """
import json, platform
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "fp8pipe-vllm-cpu"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class VllmEnvironment:
    """A Python interpreter whose environment has vLLM."""

    python: Path  # the interpreter; symlinks are kept, since a virtual environment is found by the path of its symlink
    vllm: str  # version of vLLM
    versions: dict[str, str]  # versions of Python and of the relevant distributions

    @property
    def plugin(self) -> str | None:
        """Version of the CPU plugin; None if it is not installed."""
        return self.versions.get("fp8pipe-vllm-cpu")

    @property
    def device(self) -> Literal["cpu", "cuda", "rocm", "xpu"]:
        """The device that this vLLM was built for.

        It follows from the name of its distribution, or from the local version of vLLM or torch (such as `+cpu`);
        otherwise it is CUDA.
        """
        builds = [self.versions.get(name, "").partition("+")[2] for name in ("vllm", "torch")]
        if "vllm-cpu" in self.versions or any(build.startswith("cpu") for build in builds):
            return "cpu"
        if any(build.startswith("rocm") for build in builds):
            return "rocm"
        return "xpu" if any(build.startswith("xpu") for build in builds) else "cuda"

    @property
    def on_cpu(self) -> bool:
        """Whether this vLLM is a CPU build."""
        return self.device == "cpu"

    @property
    def dequantizes(self) -> bool:
        """Whether the plugin dequantizes FP8 weights at load time; vLLM's own kernels multiply the codes."""
        chosen = os.environ.get("VLLM_PLUGINS")  # vLLM's own variable: the plugins to load; all of them if unset
        return self.on_cpu and self.plugin is not None and (chosen is None or _PLUGIN in chosen.split(","))


def find_vllm_python(explicit: str | None = None) -> Path:
    """The interpreter to start vLLM with.

    In this order: `explicit`; $FP8PIPE_VLLM_PYTHON; `.venv-vllm/bin/python` in the working directory, then beside
    this package; the current interpreter, if vLLM is installed in it.

    Raises:
        MissingCapabilityError: none of them exists, or the one that was named is not an executable file.
    """
    for named, where in ((explicit, "--vllm-python"), (os.environ.get(PYTHON_VARIABLE), PYTHON_VARIABLE)):
        if named:
            path = Path(named).expanduser().absolute()
            if path.is_file() and os.access(path, os.X_OK):
                return path
            raise MissingCapabilityError(
                "vLLM's Python was not found", why=f"{where} names {path}, which is not an executable file", fix=_HOW
            )
    for folder in (Path.cwd(), _REPOSITORY):
        if os.access(folder / _FOLDER, os.X_OK):
            return folder / _FOLDER
    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    raise MissingCapabilityError(
        "vLLM is not installed", why=f"no {_FOLDER} here or beside fp8pipe, and no vLLM in {sys.executable}", fix=_HOW
    )


def inspect_environment(python: Path) -> VllmEnvironment:
    """Read the versions of `python`'s packages without importing them.

    Raises:
        MissingCapabilityError: the interpreter does not run, or has no vLLM.
    """
    command = [str(python), "-P", "-c", _READ_VERSIONS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        versions: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise MissingCapabilityError(f"{python} does not run", why=str(error), fix=_HOW) from error
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    if vllm is None:
        raise MissingCapabilityError(f"{python} has no vLLM", why="neither vllm nor vllm-cpu is installed", fix=_HOW)
    return VllmEnvironment(python, vllm.split("+", 1)[0], versions)


def require_nvfp4(environment: VllmEnvironment, *, inputs: bool = False, layout: str = "compressed-tensors") -> None:
    """Refuse a vLLM for CPUs that cannot run weights in NVFP4, for which it has no kernel of its own.

    Args:
        environment: of the vLLM.
        inputs: whether the checkpoint declares inputs in NVFP4, too.
        layout: how the checkpoint stores NVFP4, see `VllmExportOptions`.

    Raises:
        MissingCapabilityError: the plugin is missing, switched off, or too old.
    """
    since = _MODELOPT_SINCE if layout == "modelopt" else _W4A4_SINCE if inputs else _NVFP4_SINCE
    if not environment.on_cpu or (environment.dequantizes and _numbers(environment.plugin) >= since):
        return
    found = "missing" if environment.plugin is None else f"{environment.plugin}, which is too old"
    off = environment.plugin is not None and not environment.dequantizes
    raise MissingCapabilityError(
        f"vLLM in {environment.python} cannot run weights in NVFP4 on this CPU",
        why="its plugin is switched off (VLLM_PLUGINS)" if off else f"its plugin fp8pipe-vllm-cpu is {found}",
        fix="unset VLLM_PLUGINS" if off else "run scripts/setup_vllm.sh, or pip install serving/vllm_plugin there",
    )


def _numbers(version: str | None) -> tuple[int, ...]:
    """The first two numbers of a version; none without a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version or "")[:2])


def subprocess_environment(**more: str) -> dict[str, str]:
    """Environment variables for vLLM's processes.

    They are the current ones, plus defaults that disable telemetry and access to model hubs, set a key/value cache
    of 1 GiB on CPUs, and switch off DeepGEMM, which rounds weights with a scale per block again to scales that are
    powers of two. Variables that the user has set take precedence over these defaults, and `more` over both.
    """
    off = dict.fromkeys(("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"), "1")
    cache = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
    exact = {"VLLM_USE_DEEP_GEMM": "0"}
    env = {**off, **cache, **exact, "TOKENIZERS_PARALLELISM": "false", **os.environ, **more}
    env.pop("PYTHONPATH", None)  # fp8pipe's own packages must not be visible to vLLM's interpreter
    return env


def end_group(process: subprocess.Popen[bytes], grace_s: float = 5.0) -> None:
    """End a process that leads its own session, and everything it started.

    SIGTERM is sent first, and SIGKILL if anything is still running after `grace_s` seconds.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        if _wait_for_group(process, grace_s):
            break
    process.poll()


def _wait_for_group(process: subprocess.Popen[bytes], grace_s: float) -> bool:
    """Wait up to `grace_s` seconds for all processes of the group to end; returns whether they have."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        process.poll()  # reaps the leader, which would otherwise count as alive
        try:
            os.killpg(process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return True
        time.sleep(0.05)
    return False


def last_lines(log: Path, count: int = 15) -> str:
    """The last lines of a log, for an error message."""
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines() if log.is_file() else []
    return "\n".join(lines[-count:]) or "(it printed nothing)"


def engine_failure(what: str, code: int, log: Path) -> Fp8PipeError:
    """The error to raise for an engine that exited with `code`, by what its output in `log` says.

    `what` is the message's first line. The type is OutOfMemoryError, MissingCapabilityError or BadArtifactError.
    """
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    why = f"exit status {code}; its last lines:\n{last_lines(log)}"
    if code == -signal.SIGKILL or "MemoryError" in text or "can't allocate memory" in text:
        return OutOfMemoryError(what, why=why, fix="free memory, or use a machine with more")
    if "UntestedVersionError" in text:
        return MissingCapabilityError(
            what, why=why, fix="install a vLLM version that the plugin was tested with (scripts/setup_vllm.sh does)"
        )
    if "ModuleNotFoundError" in text or "ImportError" in text:
        return MissingCapabilityError(what, why=why, fix="run scripts/setup_vllm.sh to complete vLLM's environment")
    if "in initialize_model" in text and "in load_weights" not in text:
        fix = "vLLM cannot build a model of this architecture: use another version of vLLM, or another target"
        return BadArtifactError(what, why=why, fix=fix)
    return BadArtifactError(
        what, why=why, fix="check the export with `fp8pipe verify`; the lines above are vLLM's own output"
    )
