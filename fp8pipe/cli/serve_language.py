"""`fp8pipe serve` of a language export: vLLM's options under vLLM's names, and which kind of export takes which."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from serving.language.config import LanguageConfig

__all__ = ["VISION_ONLY", "language_options", "split_language"]

_SUPERVISION: Final = ("engine_timeout_s",)
_LANGUAGE_ONLY: Final = (
    "max_model_len", "dtype", "kv_cache_dtype", "enforce_eager", "max_num_seqs", "tensor_parallel_size",
    "gpu_memory_utilization", "kv_cache_gib", "served_model_name", "vllm_python", "drain_seconds", *_SUPERVISION,
)  # fmt: skip
VISION_ONLY: Final = (
    "max_batch", "threads", "streams", "max_wait_ms", "queue", "max_pixels", "max_images", "provider",
    "inexact_batches",
)  # fmt: skip


def language_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the options of a language export, and what follows `--`."""
    options = [
        click.option("--max-model-len", type=int, help="Language: context, tokens; default: what the memory holds."),
        click.option("--dtype", help="Language: compute dtype, bfloat16 (default), float16, float32 or auto."),
        click.option("--kv-cache-dtype", help="Language: of the key/value cache; default: vLLM's choice."),
        click.option("--enforce-eager/--no-enforce-eager", default=None, help="Language: do not compile; default: do."),
        click.option("--max-num-seqs", type=int, help="Language: requests computed at once; default: vLLM's choice."),
        click.option("--tensor-parallel-size", type=int, help="Language: devices that share each layer; default 1."),
        click.option("--gpu-memory-utilization", type=float, help="Language: part of the memory that vLLM takes."),
        click.option("--kv-cache-gib", type=int, help="Language: key/value cache on a CPU, GiB; default 1."),
        click.option("--served-model-name", help="Language: name in the API; default: the directory's."),
        click.option("--vllm-python", help="Language: Python of the environment with vLLM."),
        click.option("--drain-seconds", type=float, help="Language: running answers may last so long; default 60."),
        click.option("--engine-timeout-s", type=float, help="Language: a hung engine is killed after; default 120."),
        click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM_OPTIONS...]"),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def split_language(given: dict[str, Any], language: bool) -> tuple[dict[str, Any], LanguageConfig | None]:
    """What was given for the service, and for vLLM; None for a vision export.

    Args:
        given: options of the command line that were given, by name.
        language: whether the export is a language model's.

    Raises:
        ConfigurationError: options of the other kind, or values that vLLM's configuration refuses.
    """
    from fp8pipe.core.config import build_config
    from fp8pipe.core.errors import ConfigurationError

    others = VISION_ONLY if language else _LANGUAGE_ONLY
    foreign = [f"--{name.replace('_', '-')}" for name in others if name in given]
    if not language and "extra" in given:
        foreign.append(" ".join(("--", *given["extra"])))
    if foreign:
        mine, other = ("language", "vision") if language else ("vision", "language")
        raise ConfigurationError(
            f"{', '.join(foreign)} cannot be given here",
            why=f"this is a {mine} export, and that is for {other} exports", fix="leave it out",
        )  # fmt: skip
    if not language:
        return given, None
    from serving.language.config import LanguageConfig

    of_vllm = {name: given[name] for name in (*_LANGUAGE_ONLY, "extra", "request_timeout_s") if name in given}
    times = {name: of_vllm.pop(name) for name in _SUPERVISION if name in of_vllm}
    config = build_config(LanguageConfig, of_vllm | ({"supervision": times} if times else {}))
    return {name: value for name, value in given.items() if name not in _LANGUAGE_ONLY and name != "extra"}, config
