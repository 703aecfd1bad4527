"""`evaluate`: the scores of a language export on tasks, beside those of other models on the same questions.

The differences are paired: the standard error of a change comes from the differences on single questions, which is far
smaller than that of two scores taken separately, as most questions are answered alike. Base and tuned model in bf16
show what training has changed, and what quantization has cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from exporters.vllm.device import require_known_device
from exporters.vllm.environment import find_vllm_python, inspect_environment
from exporters.vllm.form import ServingForm
from exporters.vllm.target import KIND
from fp8pipe.artifact import MANIFEST_NAME, Artifact, open_artifact
from fp8pipe.artifact.record import remove_checked
from fp8pipe.core.progress import table
from fp8pipe.models.compat import import_package
from fp8pipe.models.language.sources import resolve_model
from validation.bench.record import Figure, figure, measure_path, write_measure
from validation.tasks.in_torch import TorchScorer
from validation.tasks.in_vllm import VllmScorer
from validation.tasks.record import Comparison, EvaluateConfig, EvaluationRecord, TaskChange
from validation.tasks.scoring import Scorer
from validation.vllm.reference import load_tokenizer
from validation.vllm.validate import require_plugin

if TYPE_CHECKING:
    from validation.tasks.harness import Outcome

T = TypeVar("T")
_PACKAGES: Final = ("lm-eval", "datasets", "tokenizers")
_UNSTATED_LENGTH: Final = 2048  # tokens, for models whose configuration names no context length
_FIX: Final = "pip install 'fp8pipe[evaluate]'"


@dataclass(frozen=True, slots=True)
class _Model:
    """A model to evaluate."""

    name: str  # as it was named
    root: Path
    artifact: Artifact | None  # its manifest, if it is an export


def evaluate_export(export: Path, config: EvaluateConfig, *, vllm_python: str | None = None) -> EvaluationRecord:
    """Evaluate an export for vLLM and write `<export>.evaluate.json` next to it.

    Args:
        export: directory of the export.
        config: tasks, engine, and the models to compare with.
        vllm_python: Python interpreter of vLLM's environment; found automatically when None.

    Returns:
        The record.

    Raises:
        BadArtifactError: the export or one of the other models is damaged, or gives no finite log-probabilities.
        ConfigurationError: a task or a model cannot be used.
        MissingCapabilityError: lm-eval or vLLM is missing.
    """
    import_package("lm_eval", "evaluate needs the package lm-eval", _FIX)
    from validation.tasks.harness import EngineLM, Tasks

    artifact = open_artifact(export, kind=KIND)
    models = [_Model(str(export), artifact.root, artifact), *map(_open, config.against)]
    make, engine = _engine(config, models, vllm_python)
    tasks = Tasks(config)
    remove_checked(measure_path(artifact.root, "evaluate"))  # if anything fails from here on, no old scores remain
    outcomes, versions = [], dict[str, str]()
    for model in models:
        scorer = make(model)
        outcomes.append(tasks.run(EngineLM(load_tokenizer(model.root), scorer, _context(model.root, config))))
        versions |= scorer.versions
    ours, others = outcomes[0], outcomes[1:]
    compared = [
        Comparison(model=model.name, scores=_by_task(_changes(ours, other)))
        for model, other in zip(models[1:], others, strict=True)
    ]
    return write_measure(
        artifact, "evaluate", config, _rows(ours, compared), packages=_PACKAGES, versions=versions,
        kind=EvaluationRecord, engine=engine, tasks=ours.versions, scores=_by_task(ours.scores), against=compared,
        truncated=sum(outcome.truncated for outcome in outcomes),
    )  # fmt: skip


def _open(name: str) -> _Model:
    """Another export, or a model.

    Raises:
        BadArtifactError: an artifact of another kind, which no engine loads: its export is to be named.
    """
    if (Path(name) / MANIFEST_NAME).is_file():
        artifact = open_artifact(Path(name), kind=KIND)
        return _Model(name, artifact.root, artifact)
    return _Model(name, resolve_model(name).path, None)


def _engine(
    config: EvaluateConfig, models: Sequence[_Model], vllm_python: str | None
) -> tuple[Callable[[_Model], Scorer], str]:
    """What opens a model in the configured engine, and that engine in words."""
    if config.engine == "transformers":
        return lambda model: TorchScorer(model.root, model.artifact), "transformers, on a CPU: float32"
    environment = inspect_environment(find_vllm_python(vllm_python))
    require_known_device(environment)
    for model in models:
        if model.artifact is not None:
            require_plugin(environment, model.artifact)
    given = {name: getattr(config, name) for name in ServingForm.model_fields if name in config.model_fields_set}
    form = ServingForm(**given)
    words = form.with_defaults(models[0].root, on_cpu=environment.on_cpu).in_words(environment, models[0].root)
    return lambda model: VllmScorer(model.root, model.artifact, form, environment, config.timeout_s), f"vllm, {words}"


def _context(root: Path, config: EvaluateConfig) -> int:
    """The context length in tokens: the model's, or less if the settings say so."""
    from fp8pipe.models.language.structure import load_config

    text = load_config(root).get_text_config(decoder=True)
    own = getattr(text, "max_position_embeddings", None) or _UNSTATED_LENGTH
    return min(int(own), config.max_model_len or int(own))


def _changes(ours: Outcome, other: Outcome) -> dict[tuple[str, str], TaskChange]:
    found = {}
    for key, score in ours.scores.items():
        if key not in other.scores:
            continue
        mine, theirs = ours.examples[key], other.examples[key]
        each = [mine[one] - theirs[one] for one in mine if one in theirs]
        value = other.scores[key].value
        found[key] = TaskChange(
            value=value, change=score.value - value, stderr=_stderr(each), better=sum(one > 0 for one in each),
            worse=sum(one < 0 for one in each),
        )  # fmt: skip
    return found


def _stderr(values: Sequence[float]) -> float | None:
    """The standard error of a mean."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _by_task(found: Mapping[tuple[str, str], T]) -> dict[str, dict[str, T]]:
    tasks: dict[str, dict[str, T]] = {}
    for (task, metric), value in found.items():
        tasks.setdefault(task, {})[metric] = value
    return tasks


def _rows(ours: Outcome, compared: Sequence[Comparison]) -> list[Figure]:
    rows = []
    for (task, metric), score in ours.scores.items():
        told = [
            f"{score.examples} questions",
            *([] if score.stderr is None else [f"standard error {score.stderr:.4f}"]),
        ]
        for other in compared:
            change = other.scores.get(task, {}).get(metric)
            if change is not None:
                error = "" if change.stderr is None else f" +- {change.stderr:.4f}"
                told.append(f"{change.change:+.4f}{error} against {other.model} ({change.value:.4f})")
        rows.append(figure(f"{task}, {metric}", f"{task}_{metric}", score.value, detail="; ".join(told)))
    return rows


def describe(export: Path, record: EvaluationRecord) -> str:
    """The record as readable text."""
    rows = [("", "score", "error", *(f"against {other.model}" for other in record.against))]
    for task, metrics in record.scores.items():
        for metric, score in metrics.items():
            changes = [other.scores.get(task, {}).get(metric) for other in record.against]
            rows.append((
                f"{task}, {metric}", f"{score.value:.4f}", "" if score.stderr is None else f"{score.stderr:.4f}",
                *("" if change is None else _change(change) for change in changes),
            ))  # fmt: skip
    cut = [f"  {record.truncated} request(s) did not fit into the context and lost their beginning"]
    return "\n".join([f"MEASURED  {export} in {record.engine}", table(rows), *(cut if record.truncated else [])])


def _change(change: TaskChange) -> str:
    error = "" if change.stderr is None else f" +- {change.stderr:.4f}"
    return f"{change.change:+.4f}{error}  ({change.better} better, {change.worse} worse)"
