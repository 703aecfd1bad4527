"""The end of `fp8pipe doctor`: what this machine can do, verb by verb, and the one command that adds what it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Ability", "abilities"]

_ONNX = ("onnx", "onnxruntime", "onnxscript", "onnx-ir")
_SERVER = ("fastapi", "uvicorn", "httptools", "uvloop", "python-multipart", "pillow", "prometheus-client")
_VIT = ("timm", "torchvision", "pillow")


@dataclass(frozen=True, slots=True)
class Ability:
    """One thing that this machine can or cannot do.

    Attributes:
        verb: train, quantize, export, build engines or serve.
        what: of that.
        able: whether it can.
        how: on which devices, in which types; or why not.
        add: the command that adds it; empty where it is there, or where hardware is what lacks.
    """

    verb: str
    what: str
    able: bool
    how: str
    add: str = ""


def abilities(vllm_python: str | None) -> list[Ability]:
    """Everything in the order of work.

    Args:
        vllm_python: a Python that holds vLLM, if one was named.
    """
    return [*_train(), *_quantize(), *_export(), *_build(), *_serve(vllm_python)]


def _missing(names: tuple[str, ...]) -> list[str]:
    from fp8pipe.core.machine import distribution_version

    return [name for name in names if distribution_version(name) is None]


def _packages(verb: str, what: str, names: tuple[str, ...], how: str, add: str) -> Ability:
    """An ability that needs packages alone."""
    missing = _missing(names)
    if missing:
        return Ability(verb, what, False, f"{', '.join(missing)} missing", add)
    return Ability(verb, what, True, how)


def _devices(kernels: Callable[[bool], str], on_cpu: str) -> str:
    """The CPU and every GPU, each with what `kernels` says of hardware with FP8 and without."""
    from fp8pipe.core.machine import gpus
    from fp8pipe.numerics.bf16 import has_fast_bf16

    cpu = "bf16 products" if has_fast_bf16() else "fp32 products, several times slower"
    shown = [f"cpu ({on_cpu}{cpu})"]
    shown += [f"{gpu.name} ({kernels(gpu.fp8)})" for gpu in gpus()]
    return "; ".join(shown)


def _train() -> Iterator[Ability]:
    def kernels(fp8: bool) -> str:
        return "FP8" if fp8 else "FP8 emulated"

    yield _packages("train", "falqon: E4M3 weights, bf16 or fp32 beside", ("torch", "transformers"),
                    _devices(kernels, "FP8 emulated exactly, "), "pip install fp8pipe")  # fmt: skip
    yield _packages("train", "lora, qlora: bf16 or NF4 weights", ("peft", "bitsandbytes", "accelerate"),
                    _devices(lambda fp8: "bf16", ""), "pip install 'fp8pipe[train]'")  # fmt: skip


def _quantize() -> Iterator[Ability]:
    how = "w2a2 to w8a8, wfp8afp8, wnvfp4anvfp4; on the cpu"
    yield _packages("quantize", "vision transformers", _VIT, how, "pip install 'fp8pipe[vit]' torch==YOURS")
    yield Ability("quantize", "language models, rounded to E4M3 on export", True, "on the cpu")


def _export() -> Iterator[Ability]:
    add = "pip install 'fp8pipe[onnx]'"
    yield Ability("export", "vllm: fp8, w8a16, bf16", True, "compressed-tensors checkpoints")
    yield _packages("export", "onnx: qdq, qdq-exact, int4-weight-only", _ONNX, "proved in ONNX Runtime", add)
    yield _packages("export", "trt: graphs, and ModelOpt checkpoints", _ONNX, "linted; engines: see below", add)


def _build() -> Iterator[Ability]:
    from exporters.tensorrt.recipe import installed_builder
    from exporters.tensorrt.rtx import CAPABILITIES
    from fp8pipe.core.machine import gpus

    version = installed_builder("rtx")
    names = ", ".join(CAPABILITIES)
    how = f"{version}, for {names}, without a GPU" if version else "tensorrt-rtx missing"
    yield Ability("build engines", "TensorRT for RTX", version is not None, how,
                  "" if version else "pip install 'fp8pipe[trt-rtx]'")  # fmt: skip
    version, devices = installed_builder("enterprise"), gpus()
    if not devices:
        yield Ability("build engines", "TensorRT", False, "it builds for the GPU of its machine, and there is none")
        return
    here = ".".join(map(str, devices[0].capability))
    how = f"{version}, for {here} alone" if version else f"tensorrt missing; this GPU is {here}"
    yield Ability("build engines", "TensorRT", version is not None, how, "" if version else "pip install tensorrt")


def _serve(vllm_python: str | None) -> Iterator[Ability]:
    from fp8pipe.core.machine import gpus

    yield _language(vllm_python)
    yield _packages("serve", "vision, in ONNX Runtime", (*_SERVER, "onnx", "onnxruntime", "onnx-ir"), "on the cpu",
                    "pip install 'fp8pipe[serve]'")  # fmt: skip
    devices, missing = gpus(), _missing(("tensorrt-rtx",))
    what = "vision, in TensorRT for RTX"
    if not devices:
        yield Ability("serve", what, False, "there is no GPU here, or torch sees none")
    elif missing:
        yield Ability("serve", what, False, "tensorrt-rtx missing", "pip install 'fp8pipe[trt-rtx]'")
    else:
        yield Ability("serve", what, True, devices[0].name)


def _language(vllm_python: str | None) -> Ability:
    from exporters.vllm.environment import find_vllm_python, inspect_environment
    from fp8pipe.core.errors import MissingCapabilityError

    what = "language, in vLLM"
    try:
        found = inspect_environment(find_vllm_python(vllm_python))
    except MissingCapabilityError as error:
        return Ability("serve", what, False, error.what, "make setup-vllm")
    if found.on_cpu and not found.plugin:
        return Ability("serve", what, False, "bf16 alone: the CPU plugin for FP8 is missing", "make setup-vllm")
    place = "on the cpu, FP8 through the plugin" if found.on_cpu else "on a GPU of compute capability 8.0 or later"
    return Ability("serve", what, True, f"{found.vllm}, {place}")
