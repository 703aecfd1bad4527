"""Runs tasks of the EleutherAI harness (lm-eval) on a scorer.

The harness makes the requests and computes the metrics; what it asks of a model are log-probabilities of continuations,
and these our own engines compute. Text is tokenized as an engine does, with the special tokens that the model's
tokenizer puts in front. The harness shuffles and draws with fixed seeds, so that all models get the same questions.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lm_eval.api.model import TemplateLM

from fp8pipe.core.errors import BadArtifactError, ConfigurationError, class_and_one_line
from validation.tasks.record import EvaluateConfig, TaskScore
from validation.tasks.scoring import Continuation, Scorer

_ANSWERABLE: Final = ("multiple_choice", "loglikelihood")
_FEWSHOT_SEED: Final = 1234  # the harness's own
_BOOTSTRAPS: Final = 1000  # for standard errors of scores that are no means; those of means need none
Key = tuple[str, str]  # task and metric


@dataclass(frozen=True, slots=True)
class Outcome:
    """The scores of a model.

    Attributes:
        scores: by task and metric.
        examples: by task and metric, the score of every question by its identity.
        versions: version of each task.
        truncated: number of requests that were shortened.
    """

    scores: dict[Key, TaskScore]
    examples: dict[Key, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    truncated: int = 0


class EngineLM(TemplateLM):
    """A model of the harness, whose requests a scorer answers.

    Args:
        tokenizer: the model's tokenizer.
        scorer: the model in its engine.
        context: its context length, tokens.
    """

    def __init__(self, tokenizer: Any, scorer: Scorer, context: int) -> None:
        super().__init__()
        self.tokenizer, self.truncated = tokenizer, 0
        self._scorer, self._context = scorer, context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a continuation without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds unless it is told otherwise."""
        special = True if add_special_tokens is None else add_special_tokens
        return [int(token) for token in self.tokenizer(string, add_special_tokens=special)["input_ids"]]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        texts = [self._text(context, continuation) for _, context, continuation in requests]
        found = self._scorer.score(texts)
        if not all(math.isfinite(score.logprob) for score in found):
            raise BadArtifactError(
                "the model gives log-probabilities that are not finite",
                why=f"{sum(not math.isfinite(score.logprob) for score in found)} of {len(found)} continuations",
                fix="fp8pipe validate shows which weights differ from what was trained",
            )
        return [(score.logprob, score.greedy) for score in found]

    def _text(self, context: list[int], continuation: list[int]) -> Continuation:
        ids = (context + continuation)[-(self._context - 1) :]
        self.truncated += len(ids) < len(context) + len(continuation)
        if not continuation or len(ids) <= len(continuation):
            raise ConfigurationError(
                "a continuation cannot be scored",
                why=f"it has {len(continuation)} token(s); the context length is {self._context}",
                fix="leave the task out, or use a model with a longer context",
            )
        return Continuation(tuple(ids), len(ids) - len(continuation))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Not supported; `run_tasks` refuses such tasks before anything is computed."""
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Not supported; `run_tasks` refuses such tasks before anything is computed."""
        raise NotImplementedError


class Tasks:
    """Loaded tasks, which any number of models answer.

    Args:
        config: which tasks, how many solved examples, and how many questions.

    Raises:
        ConfigurationError: there is no task of that name, it cannot be loaded, or it asks for more than
            log-probabilities.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._loaded = _load(config)
        refused = [
            f"{name} ({task.OUTPUT_TYPE})"
            for name, task in self._loaded["tasks"].items()
            if task.OUTPUT_TYPE not in _ANSWERABLE
        ]
        if refused:
            raise ConfigurationError(
                f"tasks that cannot be scored: {', '.join(refused)}",
                why=f"only log-probabilities are computed here: output_type {' or '.join(_ANSWERABLE)}",
                fix="leave them out, or run lm-eval itself on the export",
            )
        for task in self._loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (config.fewshot is not None and own != config.fewshot):
                task.set_config(key="num_fewshot", value=config.fewshot or 0)

    def run(self, lm: EngineLM) -> Outcome:
        """Let a model answer all questions."""
        from lm_eval.evaluator import evaluate

        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # every model gets the same solved examples
        found = evaluate(
            lm=lm, task_dict=self._loaded, limit=self._config.limit, bootstrap_iters=_BOOTSTRAPS, log_samples=True
        )
        assert found is not None  # in rank 0, which is the only one
        return _outcome(found, lm.truncated)


def _load(config: EvaluateConfig) -> Any:
    from lm_eval.tasks import TaskManager

    folder = None if config.task_dir is None else Path(config.task_dir).absolute()
    if folder is not None and not folder.is_dir():
        raise ConfigurationError(f"{folder} is no folder of tasks", why="there is no such directory")
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=False)
    if any(name not in manager.all_tasks for name in config.tasks):  # reading the harness's own takes seconds
        manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in config.tasks if name not in manager.all_tasks]:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        raise ConfigurationError(
            f"there is no task called {', '.join(unknown)}",
            why=f"neither in the harness nor in {folder or 'a --task-dir, which was not given'}",
            fix=f"did you mean {' or '.join(close)}?" if close else "check the name after `task:` in its file",
        )
    try:
        with contextlib.chdir(folder or Path.cwd()):  # files that a task names lie beside it
            return manager.load(list(config.tasks))
    except Exception as error:
        raise ConfigurationError(
            f"the tasks {', '.join(config.tasks)} cannot be loaded",
            why=class_and_one_line(error, 500),
            fix="check the task's file and its data; the harness's own data sets come from the hub",
        ) from error


def _outcome(found: Mapping[str, Any], truncated: int) -> Outcome:
    scores: dict[Key, TaskScore] = {}
    examples: dict[Key, dict[str, float]] = {}
    for task, figures in found["results"].items():
        leaves = list(_leaves(task, found.get("group_subtasks") or {}))
        for name, value in figures.items():
            metric, comma, kind = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            key = (task, metric if kind == "none" else name)
            each = {
                f"{leaf}/{sample['doc_id']}": float(sample[metric])
                for leaf in leaves
                for sample in found["samples"].get(leaf, ())
                if sample["filter"] == kind and isinstance(sample.get(metric), int | float)
            }
            # Where a score is no mean of questions, it cannot be compared question by question.
            examples[key] = each if each and math.isclose(math.fsum(each.values()) / len(each), value) else {}
            stderr = figures.get(f"{metric}_stderr,{kind}")
            scores[key] = TaskScore(
                value=float(value), stderr=float(stderr) if isinstance(stderr, int | float) else None,
                examples=sum(found["n-samples"][leaf]["effective"] for leaf in leaves),
            )  # fmt: skip
    shots = found.get("n-shot") or {}
    versions = {task: f"version {version}, {shots.get(task, 0)}-shot" for task, version in found["versions"].items()}
    return Outcome(scores, examples, versions, truncated)


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The tasks of a group, and of the groups in it; a task itself."""
    below = groups.get(name)
    if not below:
        yield name
        return
    for child in below:
        yield from _leaves(child, groups)
