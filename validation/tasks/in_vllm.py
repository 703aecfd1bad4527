"""Scores texts in vLLM, which runs in its own environment, started as a validation starts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporters.vllm.environment import VllmEnvironment
from exporters.vllm.form import ServingForm
from fp8pipe.artifact import Artifact, staged
from validation.tasks.scoring import Continuation, Score
from validation.vllm.launcher import SCORE, run_script

_SHORTEST = 16  # tokens; vLLM's smallest block


class VllmScorer:
    """A `Scorer`; every call starts an engine.

    Args:
        root: directory of the model.
        artifact: its manifest, if it is an export.
        form: how vLLM is started.
        environment: its Python environment.
        timeout_s: time limit for one engine, seconds.
    """

    def __init__(
        self, root: Path, artifact: Artifact | None, form: ServingForm, environment: VllmEnvironment, timeout_s: float
    ) -> None:
        self._root, self._artifact, self._timeout_s = root, artifact, timeout_s
        self._environment = environment
        self._form = form.with_defaults(root, on_cpu=environment.on_cpu)
        self.versions = dict(environment.versions)

    def score(self, texts: Sequence[Continuation]) -> list[Score]:
        """See `Scorer`. The engine gets the context length that the texts need, so that its cache is small."""
        longest = max(len(text.ids) for text in texts) + 1  # vLLM generates a token, which nobody reads
        form = self._form.model_copy(update={"max_model_len": max(longest, _SHORTEST)})
        variables = form.variables(VLLM_ENABLE_V1_MULTIPROCESSING="0")
        with self._model() as model:
            job: dict[str, Any] = {
                "model": str(model), "arguments": form.arguments(), "sequences": [list(text.ids) for text in texts],
                "starts": [text.start for text in texts],
            }  # fmt: skip
            result = run_script(SCORE, job, variables, self._environment, timeout_s=self._timeout_s)
        self.versions |= result["versions"]
        return [Score(float(logprob), greedy) for logprob, greedy in result["scores"]]

    @contextmanager
    def _model(self) -> Iterator[Path]:
        if self._artifact is None:
            yield self._root
        else:
            with staged(self._artifact) as folder:
                yield folder
