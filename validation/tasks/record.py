"""Settings of `evaluate`, and its record: scores by task, and how they changed against other models."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field

from exporters.vllm.form import ServingForm
from fp8pipe.core.config import Flag, FrozenConfig
from validation.bench.record import MeasureRecord

# The tasks of the FALQON paper (arXiv 2510.24061); they need the harness's own data sets, from the hub.
FALQON_PAPER: Final = (
    "mmlu", "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "openbookqa",
)  # fmt: skip
PRESETS: Final = {"falqon-paper": FALQON_PAPER}


def _split(value: object) -> object:
    """`a,b`, `["a", "b"]` and `["a,b"]` mean the same; the name of a preset stands for its tasks."""
    if isinstance(value, str):
        value = [value]
    if not (isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)):
        return value
    names = [name.strip() for part in value for name in part.split(",") if name.strip()]
    return tuple(dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,))))


def _several(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class EvaluateConfig(ServingForm):
    """Settings of `evaluate`; the serving options apply to vLLM alone."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(_split, json_schema_input_type=str | list[str])] = Field(
        min_length=1, description="Tasks of the harness or of task_dir, or falqon-paper; repeat it, or use commas"
    )
    task_dir: str | None = Field(default=None, description="Folder of task files (YAML) and their data")
    against: Annotated[tuple[str, ...], BeforeValidator(_several, json_schema_input_type=str | list[str])] = Field(
        default=(), description="Another export or model to compare with; repeatable"
    )
    engine: Literal["vllm", "transformers"] = Field(
        default="vllm", description="What computes; transformers: in fp32, on the CPU"
    )
    fewshot: Annotated[int | None, Flag(default="the task's")] = Field(
        default=None, ge=0, description="Solved examples in front of each question"
    )
    limit: Annotated[int | None, Flag(default="all")] = Field(
        default=None, ge=1, description="Questions per task, from its beginning"
    )
    timeout_s: float = Field(default=86400.0, gt=0, description="Time limit for one engine, seconds")


class TaskScore(FrozenConfig):
    """The score of one model on one task, in one metric."""

    value: float = Field(description="the score")
    stderr: float | None = Field(default=None, description="its standard error; none where the harness gives none")
    examples: int = Field(ge=1, description="number of questions")


class TaskChange(FrozenConfig):
    """How a score differs from another model's on the same questions."""

    value: float = Field(description="the other model's score")
    change: float = Field(description="the export's score minus the other model's")
    stderr: float | None = Field(
        default=None,
        description="standard error of the change, from the differences of single questions; none for one question",
    )
    better: int = Field(ge=0, description="number of questions on which the export scores higher")
    worse: int = Field(ge=0, description="number of questions on which it scores lower")


class Comparison(FrozenConfig):
    """The comparison with one other model."""

    model: str = Field(description="the other model, as it was named")
    scores: dict[str, dict[str, TaskChange]] = Field(description="by task and metric")


class EvaluationRecord(MeasureRecord):
    """The record of an evaluation."""

    engine: str = Field(description="what computed, in words")
    tasks: dict[str, str] = Field(description="of each task its version, as its author numbers it, and solved examples")
    truncated: int = Field(ge=0, description="number of requests whose beginning did not fit into the context")
    scores: dict[str, dict[str, TaskScore]] = Field(description="by task and metric")
    against: list[Comparison] = Field(default_factory=list, description="comparisons, in the order of the settings")
