"""Measure tokens per second and peak memory of FALQON and its baselines, with interleaved steps.

Each method trains in its own process, so that its peak memory can be measured. The parent process lets the methods make
one optimizer step in turn (A B C D A B C D ...), so that a slowdown of the machine affects all of them. Ratios are
medians of the ratios within a round.

    python benchmarks/training_speed.py --rounds 15

`peak` is the largest resident memory of the process during training; `net` is that minus the memory that Python, torch
and transformers used before the model was loaded. `lora-bf16` is LoRA with adapters stored and updated in bf16, which
is faster but less precise than the usual fp32 adapters under autocast (`lora`). All methods use fp8pipe's training
loop, with its loss and its attention; `NAME-fused` runs a method with torch's fused attention instead, the default of
peft and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import median

METHODS = ("live", "released", "accumulate", "lora", "lora-bf16", "qlora")
FUSED = "-fused"


def resident(key):
    """The field `key` of /proc/self/status, such as `VmRSS`, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def build_trainer(name, options, scratch):
    """Create a `Trainer` whose model is loaded and prepared.

    Args:
        name: the method (one of `METHODS`), optionally with the suffix `-fused`.
        options: the command line.
        scratch: directory for checkpoints and metrics.

    Returns:
        The trainer, and the resident memory before the model was loaded, in MiB.
    """
    fused, name = name.endswith(FUSED), name.removesuffix(FUSED)
    from fp8pipe.core.config import build_config
    from fp8pipe.models.language.sources import resolve_model
    from fp8pipe.numerics.bf16 import widen_bf16_products
    from pipeline.finetune.checkpoint import CheckpointStore
    from pipeline.finetune.config import FinetuneConfig
    from pipeline.finetune.loop import Trainer
    from pipeline.finetune.processes import build_method
    from pipeline.finetune.stage import load_model
    from pipeline.finetune.text import load_text

    widen_bf16_products()
    lora = name.startswith(("lora", "qlora"))
    settings = {
        "model": "sample:smollm2", "data": "sample:chatterbot", "rank": options.rank, "batch_size": options.batch_size,
        "sequence_length": 1024 // options.batch_size, "steps": 1000, "log_every": 1000, "learning_rate": 1e-3,
        "method": name.removesuffix("-bf16") if lora else "falqon", "device": "cpu",
    }  # fmt: skip
    config = build_config(
        FinetuneConfig, settings if lora else settings | {"update_rule": name, "initialisation": "randomized-svd"}
    )
    source = resolve_model(config.model)
    text = load_text(config, source)
    floor = resident("VmRSS")
    model, method = load_model(config, source), build_method(config)
    if fused:
        model.set_attn_implementation("sdpa")
    method.prepare(model)
    if name == "lora-bf16":
        for parameter in method.parameters().values():
            parameter.data = parameter.data.bfloat16()
        method.forward_context = nullcontext
    store = CheckpointStore(Path(scratch) / "checkpoints", 1)
    trainer = Trainer(config, model, method, text.train, text.heldout, store, Path(scratch) / "metrics.jsonl")
    model.train()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, so that it is the peak of training only
    return trainer, floor


def child(name, options):
    """The main function of a method's process: for each line on stdin, make a step and print its metrics as JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer, floor = build_trainer(name, options, scratch)
        print(json.dumps({"ready": name}), flush=True)
        for _ in sys.stdin:
            figures = trainer.one_step()
            peak = resident("VmHWM")
            print(json.dumps(figures | {"peak": peak, "net": peak - floor}), flush=True)


class Contender:
    """The process of one method, and the metrics of its steps."""

    def __init__(self, name, options):
        command = [sys.executable, __file__, "--child", name, "--rank", str(options.rank)]
        command += ["--batch-size", str(options.batch_size)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        self.name, self.steps = name, []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.answer()

    def answer(self):
        """Read the next line of JSON from the process."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early with exit code {self.process.wait()}")
        return json.loads(line)

    def step(self):
        """Let the process make one step, and store its metrics."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self.answer())

    def median(self, key, skip):
        """The median of a metric over all steps but the first `skip`."""
        return median(step[key] for step in self.steps[skip:])


def main():
    """Run all methods in turn, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*METHODS, *(name + FUSED for name in METHODS)]
    default = ["live", "lora", "lora-bf16", "qlora", "lora-fused", "qlora-fused"]
    parser.add_argument("--child", choices=names)
    parser.add_argument("--methods", nargs="+", choices=names, default=default)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 1024 / N tokens")
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return
    contenders = [Contender(name, options) for name in options.methods]
    for _ in range(options.warmup + options.rounds):
        for contender in contenders:
            contender.step()
    first, skip, rows = contenders[0], options.warmup, []
    for contender in contenders:
        pairs = zip(first.steps[skip:], contender.steps[skip:], strict=True)
        rows.append(
            {
                "method": contender.name, "tokens_per_second": round(contender.median("tokens_per_second", skip), 1),
                "speed_of_first_over_this": round(
                    median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs), 3
                ),
                "peak_mib": round(contender.steps[-1]["peak"]), "net_mib": round(contender.steps[-1]["net"]),
                "net_of_first_over_this": round(first.steps[-1]["net"] / contender.steps[-1]["net"], 3),
                "flush_share": round(contender.median("flush_share", skip), 5),
            }
        )  # fmt: skip
        contender.process.stdin.close()
        contender.process.wait()
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
