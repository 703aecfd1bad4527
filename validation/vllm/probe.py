"""Runs inside vLLM's Python: load an export in the engine and report what it holds and says.

    python -P probe.py JOB.json

Imports nothing of fp8pipe: the two environments share the files of this folder only. The job (see `launcher.ProbeJob`
for its fields) carries the arguments of vLLM's server, which its own parser reads, so that the engine is the one that
would serve; and the digest of every weight's expected value. `readback` digests the engine's own and stores only those
that differ, so that any model size needs the memory of one tensor and next to no disk.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_TOP = 20  # most probable tokens told at each place; the most that vLLM's server tells

for _name, _path in (("validation", []), ("validation.vllm", [str(Path(__file__).parent)])):
    if _name not in sys.modules:  # in vLLM's environment, where this folder is all there is of the package
        sys.modules[_name] = ModuleType(_name)
        sys.modules[_name].__path__ = _path


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job: load, read weights, examine products, score sequences, answer prompts."""
    from validation.vllm.readback import Reading

    started = time.monotonic()
    reading = Reading(job["tensors"], Path(job["dump"]), products=job["products"])
    with reading.loading():
        llm = _load(job)
    result: dict[str, Any] = {"load_s": time.monotonic() - started, "versions": _versions()}
    llm.apply_model(reading.read)
    result |= {"weights": reading.report, "unexplained": reading.unexplained, "layers": reading.layers}
    result["logprobs"] = _logprobs(llm, job["sequences"])
    result["answers"] = _answers(llm, job)
    # Linux counts kilobytes.
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["total_s"] = time.monotonic() - started
    return result


def _load(job: dict[str, Any]) -> Any:
    """The engine that these arguments and this environment start, in this process: its modules can be looked into."""
    import vllm.entrypoints.llm as offline
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", job["model"], *job["arguments"]])
    # Sizes of batches depend on what the engine is for: here, on what the server would be for.
    offline.UsageContext = SimpleNamespace(LLM_CLASS=UsageContext.OPENAI_API_SERVER)
    return offline.LLM.from_engine_args(EngineArgs.from_cli_args(arguments))


def _versions() -> dict[str, str]:
    import transformers
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _logprobs(llm: Any, sequences: list[list[int]]) -> list[list[dict[str, float]]]:
    """Log-probabilities by token, of the token that comes and the likeliest, at each place but the first.

    NaN and infinities as they come.
    """
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in sequences]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=_TOP)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        [{str(token): found.logprob for token, found in place.items()} for place in out.prompt_logprobs[1:]]
        for out in outputs
    ]


def _answers(llm: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    """To the prompts, and last to the question about a picture, where there is one."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"])
    if job["chat"]:
        contents = [*job["prompts"], *([job["pictured"]] if job["pictured"] else [])]
        outputs = llm.chat([[{"role": "user", "content": content}] for content in contents], params, use_tqdm=False)
    else:
        outputs = llm.generate(job["prompts"], params, use_tqdm=False)
    answers = ((out.prompt_token_ids, out.outputs[0]) for out in outputs)
    return [{"prompt_ids": list(ids), "token_ids": list(new.token_ids), "text": new.text} for ids, new in answers]


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they travel as strings that `float` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def main(path: str) -> None:
    """Read the job, do it, write its result beside it."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    result = run(job)
    Path(job["result"]).write_text(json.dumps(_plain(result)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
