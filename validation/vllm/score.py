"""Runs inside vLLM's Python: loads a model into the engine and scores the ends of texts.

    python -P score.py JOB.json

The job has `model` and `arguments` (those of vLLM's server), `sequences` of token ids, `starts` (how many tokens of
each come before the scored part), and the path of the `result`. The engine is started as in `probe.py`, so that it is
the same as in serving.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

for _name, _path in (("validation", []), ("validation.vllm", [str(Path(__file__).parent)])):
    if _name not in sys.modules:  # in vLLM's environment, where the package itself is not installed
        sys.modules[_name] = ModuleType(_name)
        sys.modules[_name].__path__ = _path


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job.

    Returns:
        `scores`: for each sequence the sum of the log-probabilities of its scored tokens, nats, and whether each of
        them is the most probable one; `versions`; `load_s` and `total_s` in seconds.
    """
    from validation.vllm.probe import load, versions

    started = time.monotonic()
    llm = load(job)
    loaded = time.monotonic() - started
    scores = _scores(llm, job["sequences"], job["starts"])
    return {"scores": scores, "versions": versions(), "load_s": loaded, "total_s": time.monotonic() - started}


def _scores(llm: Any, sequences: list[list[int]], starts: list[int]) -> list[tuple[float, bool]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False)
    found = []
    for ids, start, out in zip(sequences, starts, outputs, strict=True):
        places = [place[token] for token, place in zip(ids[start:], out.prompt_logprobs[start:], strict=True)]
        found.append((sum(place.logprob for place in places), all(place.rank == 1 for place in places)))
    return found


def main(path: str) -> None:
    """Read the job, run it, and write its result."""
    from validation.vllm.probe import plain

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    Path(job["result"]).write_text(json.dumps(plain(run(job))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
