"""FP8 export of a language model: time and memory of the command, against llm-compressor and ModelOpt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from comparison.environments import Environment, peer, project
from comparison.harness import Command, Comparison, Contender, Settings
from comparison.models import FP8PIPE, fresh, language_model, project_script, random_model
from comparison.processes import WORKERS, environment_of
from comparison.results import Metric, Target

_METRICS = (
    Metric(name="seconds", label="seconds", better="lower"),
    Metric(name="processor_seconds", label="processor seconds", better="lower"),
    Metric(name="peak_mib", label="peak memory, MiB", better="lower"),
    Metric(name="anonymous_mib", label="of it not of mapped files, MiB", better="lower"),
    Metric(name="megabytes", label="weight files, MB", better="none"),
    Metric(name="quantized", label="quantized weights", better="none"),
    Metric(name="relative_error", label="relative error of their values", better="none"),
)
_ABOUT = """{model}, as a bf16 checkpoint on disk, becomes an FP8 checkpoint for vLLM: E4M3 codes, one scale per
channel, and activations that are scaled per token at run time. Measured is the whole command from start to end:
interpreter, imports, reading, quantizing, writing. fp8pipe also reads its output back and compares every tensor with
the source; the peers do not. `llm-compressor` is its `oneshot` on a loaded model, `llm-compressor, model-free` its
path from file to file. The last columns are a check that all do the same work: the number of weights with codes, and
the distance of `code * scale` from the bf16 weights."""
OURS, LLMCOMPRESSOR = "fp8pipe", "llm-compressor"


def build(settings: Settings) -> Comparison:
    """The comparison on SmolLM2-135M (a tiny model in quick sizes)."""
    return _compare(settings, *language_model(settings), "fp8", settings.choose(5, 1))


def build_large(settings: Settings) -> Comparison:
    """The comparison on a random model of 0.8 billion weights in the shape of a Llama (a tiny one in quick sizes)."""
    shape, what = settings.choose(("small", "a random Llama of 1.6 GB"), ("tiny", "a tiny random Llama"))
    return _compare(settings, random_model(settings, shape), what, "fp8-large", settings.choose(3, 1))


def _compare(settings: Settings, model: Path, what: str, prefix: str, rounds: int) -> Comparison:
    def contender(name: str, where: Environment, command: Sequence[str | Path], *, ours: bool = False) -> Contender:
        output, log = settings.work / f"{prefix}-{name.replace(', ', '-')}", settings.work / f"{prefix}-{name}.log"

        def check() -> Mapping[str, float]:
            script = WORKERS / "fp8_error.py"
            return project_script(settings, script, [model, output], f"{prefix}-error.log")

        def start() -> Command:
            python = where.python()
            full = [python, *command, model, output] if not ours else [*command, model, "--output", output]
            given = environment_of(project=where.project, OMP_NUM_THREADS=str(settings.threads))
            return Command(full, log, given, before=lambda: fresh(output), after=check)

        return Contender(name, where, start, ours)

    llmcompressor, modelopt = (peer(name, settings.environments) for name in ("llmcompressor", "modelopt"))
    script = WORKERS / "export_llmcompressor.py"
    return Comparison(
        title=f"FP8 export of {what}",
        about=_ABOUT.format(model=what),
        metrics=_METRICS,
        contenders=(
            contender(OURS, project("torch", "transformers", "safetensors"), [*FP8PIPE, "export", "--target", "vllm"],
                      ours=True),
            contender(LLMCOMPRESSOR, llmcompressor, [script]),
            contender(f"{LLMCOMPRESSOR}, model-free", llmcompressor, [script, "--model-free"]),
            contender("ModelOpt", modelopt, [WORKERS / "export_modelopt.py"]),
        ),
        baseline=OURS,
        rounds=rounds,
        targets=(
            Target(contender=LLMCOMPRESSOR, metric="seconds", at_least=3),
            Target(contender=LLMCOMPRESSOR, metric="peak_mib", at_least=2),
        ),
    )  # fmt: skip
