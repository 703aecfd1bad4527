"""A vLLM plugin that runs FP8 (E4M3) checkpoints on CPUs at the speed of bf16.

vLLM's CPU platform refuses most FP8 checkpoints, depending on the format and on the CPU's instructions, and
sends the rest through `torch._scaled_mm`, tens of times slower than bf16. Every E4M3 code times its scale is an
ordinary number, so this plugin multiplies once at load and hands the result to vLLM's unquantized CPU GEMM.
The engine then serves `code * scale` rounded once to the model's dtype (and not rounded at all in fp32).

How it enters: vLLM calls `register` (entry point group `vllm.general_plugins`) in each of its processes before
it reads a model's configuration. `register` replaces two entries of vLLM's table of quantization methods,
"compressed-tensors" and "fp8", by subclasses that change the FP8 linear layers and pass on all else. Part of
what they override is private to vLLM, hence the version check.

Files: `dequantize` and `activations` hold the arithmetic in plain torch and import without vLLM; `settings` the
environment variables and the version check; `linear` and `methods` are the only files that import vLLM.
"""

from __future__ import annotations

import logging

from fp8pipe_vllm_cpu.settings import Settings, check_version

__all__ = ["register"]
__version__ = "0.1.0"

# A child of vLLM's logger, so that the lines appear in the server's log in its format.
logger = logging.getLogger("vllm.fp8pipe_cpu")


def register() -> None:
    """Install the FP8 methods on a CPU platform; do nothing elsewhere. Safe to call more than once.

    Raises:
        UntestedVersionError: a vLLM version this plugin was not tested with (see `settings`).
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
