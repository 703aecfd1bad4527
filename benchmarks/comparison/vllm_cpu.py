"""vLLM on the CPU: this project's FP8 export with its plugin, against the bf16 checkpoint without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from comparison.environments import vllm
from comparison.harness import Comparison, Contender, Settings, worker
from comparison.models import fp8_export, language_model
from comparison.processes import WORKERS
from comparison.results import Metric

OURS = "FP8 export, plugin"
_BATCH = 8
_METRICS = (
    Metric(name="decode_1", label="decoding, tokens/s", better="higher"),
    Metric(name=f"decode_{_BATCH}", label=f"decoding {_BATCH} sequences, tokens/s", better="higher"),
    Metric(name="first_ms_1", label="first token, ms", better="lower"),
    Metric(name=f"first_ms_{_BATCH}", label=f"first token of {_BATCH} sequences, ms", better="lower"),
    Metric(name="peak_mib", label="peak memory, MiB", better="lower"),
)
_ABOUT = """{model} in vLLM's engine on the CPU ({threads} threads, eager, bf16), one sequence and
{batch} at a time. Decoding is the difference of runs of {tokens} + 1 tokens and of one, so the prompt does not count.
`bf16, stock vLLM` is the checkpoint that was exported, with plugins switched off; `FP8 export, stock vLLM` is this
project's export in vLLM's own FP8 kernel for CPUs."""


def build(settings: Settings) -> Comparison:
    """The comparison on SmolLM2-135M (a tiny model in quick sizes)."""
    model, what = language_model(settings)
    where, tokens = vllm(), settings.choose(64, 4)
    stock = dataclasses.replace(where, shown=tuple(name for name in where.shown if not name.startswith("fp8pipe")))

    def contender(name: str, checkpoint: Path, *, plugin: bool) -> Contender:
        variables = {
            "OMP_NUM_THREADS": str(settings.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        log = settings.work / f"vllm-{name.replace(', ', '-').replace(' ', '-')}.log"
        arguments = [checkpoint, "--tokens", str(tokens), "--batch", str(_BATCH)]
        return worker(name, where if plugin else stock, WORKERS / "vllm_decode.py", arguments, log, ours=plugin,
                      **(variables if plugin else variables | {"VLLM_PLUGINS": ""}))  # fmt: skip

    return Comparison(
        title="vLLM on the CPU",
        about=_ABOUT.format(model=what, threads=settings.threads, batch=_BATCH, tokens=tokens),
        metrics=_METRICS,
        contenders=(
            contender(OURS, fp8_export(settings), plugin=True),
            contender("bf16, stock vLLM", model, plugin=False),
            contender("FP8 export, stock vLLM", fp8_export(settings), plugin=False),
        ),
        baseline=OURS,
        rounds=settings.choose(7, 1),
        warmup=settings.choose(1, 0),
    )
