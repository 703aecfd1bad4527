"""Runs inside vLLM's Python: loads an export into the engine and reports its weights and outputs.

    python -P probe.py JOB.json

Imports nothing from fp8pipe, since the two environments share only the files of this folder. The job (see
`launcher.ProbeJob`) contains the arguments of vLLM's server and the digest of every expected weight. vLLM's own parser
parses the arguments, so that the engine is the same as in serving. `readback` computes the digests of the engine's
weights and saves only the weights that differ, so that a model of any size needs extra memory for only one tensor and
hardly any disk space.
"""

from __future__ import annotations

import gc
import json
import math
import resource
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_TOP = 20  # most probable tokens reported at each position; the maximum of vLLM's server

for _name, _path in (("validation", []), ("validation.vllm", [str(Path(__file__).parent)])):
    if _name not in sys.modules:  # in vLLM's environment, where the package itself is not installed
        sys.modules[_name] = ModuleType(_name)
        sys.modules[_name].__path__ = _path


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job: load the model, check weights and matrix multiplications, score sequences, answer prompts.

    Returns:
        `weights`, `unexplained` and `layers` of `readback.Reading`; `logprobs`; `answers`; `versions`; `load_s` and
        `total_s` in seconds; `peak_rss_bytes`.
    """
    from validation.vllm.readback import Reading

    started = time.monotonic()
    reading = Reading(job["tensors"], Path(job["dump"]), products=job["products"])
    with reading.loading():
        llm = load(job)
    result: dict[str, Any] = {"load_s": time.monotonic() - started, "versions": versions()}
    llm.apply_model(reading.read)
    result |= {"weights": reading.report, "unexplained": reading.unexplained, "layers": reading.layers}
    result["logprobs"] = _logprobs(llm, job["sequences"])
    result["answers"] = _answers(llm, job)
    # On Linux, ru_maxrss is in kilobytes.
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["total_s"] = time.monotonic() - started
    return result


def load(job: dict[str, Any]) -> Any:
    """Start the engine with the job's arguments, in this process, so that its modules can be accessed."""
    import vllm.entrypoints.llm as offline
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    gc.freeze()  # vLLM collects garbage nine times while it starts, half a second each if it looks at all its modules
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", job["model"], *job["arguments"]])
    # The default batch sizes depend on the usage context, so the context of the server is set.
    offline.UsageContext = SimpleNamespace(LLM_CLASS=UsageContext.OPENAI_API_SERVER)
    return offline.LLM.from_engine_args(EngineArgs.from_cli_args(arguments))


def versions() -> dict[str, str]:
    """Versions of the packages that determine what the engine computes."""
    import transformers
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _logprobs(llm: Any, sequences: list[list[int]]) -> list[list[dict[str, float]]]:
    """Score sequences of token ids.

    Returns:
        For each sequence and each position except the first: the log-probabilities of the actual token and of the 20
        most probable ones, in nats, by token id. They may be NaN or infinite.
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
    """Greedy answers to the prompts, and to the question about an image, if there is one."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"])
    if job["chat"]:
        contents = [*job["prompts"], *([job["pictured"]] if job["pictured"] else [])]
        outputs = llm.chat([[{"role": "user", "content": content}] for content in contents], params, use_tqdm=False)
    else:
        outputs = llm.generate(job["prompts"], params, use_tqdm=False)
    answers = ((out.prompt_token_ids, out.outputs[0]) for out in outputs)
    return [{"prompt_ids": list(ids), "token_ids": list(new.token_ids), "text": new.text} for ids, new in answers]


def plain(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by strings that `float` can parse."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def main(path: str) -> None:
    """Read the job, run it, and write its result."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    result = run(job)
    Path(job["result"]).write_text(json.dumps(plain(result)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
