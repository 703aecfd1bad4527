"""The plugin's settings, read from the environment: vLLM starts plugins without arguments.

The variables, with their values and defaults:
    FP8PIPE_VLLM_ACTIVATIONS   none | quant (none): whether activations are rounded to FP8 as the checkpoint says.
    FP8PIPE_VLLM_KEEP_WEIGHTS  0 | 1 (0): keep `layer.weight` beside the GEMM's packed copy, for validation.
    FP8PIPE_VLLM_ANY_VERSION   0 | 1 (0): run under an untested vLLM version.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The parsed variables.

    Attributes:
        quantize_activations: emulate the checkpoint's activation quantization (W8A8 numbers).
        keep_weights: keep the dequantized weight readable after the GEMM has packed it.
        any_version: accept untested vLLM versions.
    """

    quantize_activations: bool = False
    keep_weights: bool = False
    any_version: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the variables (from `os.environ` unless given).

        Raises:
            ValueError: a variable holds a value that means nothing.
        """
        env = os.environ if environment is None else environment
        return cls(
            quantize_activations=_choice(env, "FP8PIPE_VLLM_ACTIVATIONS", "none", "quant"),
            keep_weights=_choice(env, "FP8PIPE_VLLM_KEEP_WEIGHTS", "0", "1"),
            any_version=_choice(env, "FP8PIPE_VLLM_ANY_VERSION", "0", "1"),
        )


def _choice(env: Mapping[str, str], name: str, off: str, on: str) -> bool:
    value = env.get(name, off).strip().lower() or off
    if value not in (off, on):
        raise ValueError(f"{name} is {value!r}; it can be {off!r} or {on!r}")
    return value == on
