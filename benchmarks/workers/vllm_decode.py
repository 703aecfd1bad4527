"""Speed of a language model in vLLM on the CPU, measured once per round in one engine that stays loaded.

    python vllm_decode.py MODEL --tokens 64 --batch 8

Figures of a round, for one sequence and for BATCH of them: tokens per second while decoding, from the difference of a
run of TOKENS + 1 tokens and a run of one token, so that the prompt does not count; and the time of that one token. Runs
in vLLM's environment, in a single process.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from protocol import serve
from vllm import LLM, SamplingParams

PROMPT = "Write a long story about a lighthouse keeper and the sea."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    engine = LLM(str(options.model), dtype="bfloat16", max_model_len=512, max_num_seqs=options.batch,
                 enforce_eager=True, enable_prefix_caching=False, seed=0)  # fmt: skip

    def seconds(sequences, tokens):
        chosen = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        started = time.perf_counter()
        engine.generate([PROMPT] * sequences, chosen, use_tqdm=False)
        return time.perf_counter() - started

    def work():
        figures = {}
        for sequences in (1, options.batch):
            first = seconds(sequences, 1)
            whole = seconds(sequences, options.tokens + 1)
            figures[f"decode_{sequences}"] = sequences * options.tokens / (whole - first)
            figures[f"first_ms_{sequences}"] = 1000 * first
        status = Path("/proc/self/status").read_text()
        return figures | {"peak_mib": int(status.split("VmHWM:")[1].split()[0]) / 1024}

    serve(work, model=options.model.name)


if __name__ == "__main__":
    main()
