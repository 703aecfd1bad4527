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
import tempfile
from contextlib import nullcontext
from pathlib import Path

from comparison.environments import peer, project
from comparison.harness import take_turns, worker
from comparison.processes import ROOT
from comparison.results import Metric, summarize
from protocol import serve

FALQON = ("live-both", "live", "released", "accumulate")
TORCHAO = "lora-torchao-fp8"
METHODS = (*FALQON, "lora", "lora-bf16", "qlora", TORCHAO)
FUSED = "-fused"
METRICS = (
    Metric(name="tokens_per_second", label="tokens/s", better="higher"),
    Metric(name="net_mib", label="peak memory above the interpreter's, MiB", better="lower"),
    Metric(name="peak_mib", label="peak memory, MiB", better="none"),
    Metric(name="flush_share", label="share of flushing", better="none"),
)


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
    lora = name not in FALQON
    settings = {
        "model": options.model, "data": "sample:chatterbot", "rank": options.rank, "batch_size": options.batch_size,
        "sequence_length": options.tokens // options.batch_size, "steps": 1000, "log_every": 1000,
        "learning_rate": 1e-3,
        "method": name.partition("-")[0] if lora else "falqon", "device": "cpu",
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
    if name == TORCHAO:
        convert_to_fp8(model, options.rank)
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


def convert_to_fp8(model, rank):
    """Let torchao compute the layers that an adapter is trained for in FP8, with one dynamic scale per tensor.

    Emulated: codes are multiplied in fp32. Products of codes themselves have no kernel on this kind of processor: torch
    takes minutes for one of 256 x 576 x 576.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    from pipeline.falqon.convert import read_convertible

    names = set(read_convertible(model, rank).trainable)
    chosen = Float8LinearConfig(emulate=True)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in names, config=chosen)


def child(name, options):
    """The main function of a method's process: a training step for each line on standard input."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer, floor = build_trainer(name, options, scratch)

        def step():
            figures = trainer.one_step()
            peak = resident("VmHWM")
            return {"tokens_per_second": figures["tokens_per_second"], "flush_share": figures["flush_share"],
                    "peak_mib": peak, "net_mib": peak - floor}  # fmt: skip

        serve(step, method=name)


def contender(name, options, where, log, **variables):
    """A contender of the harness: the process of one method.

    Args:
        name: see `build_trainer`.
        options: the command line.
        where: the environment that it runs in.
        log: the file that receives its standard error.
        **variables: of its environment.
    """
    arguments = ["--child", name, "--rank", str(options.rank), "--batch-size", str(options.batch_size)]
    arguments += ["--tokens", str(options.tokens), "--model", options.model]
    return worker(name, where, Path(__file__), arguments, log, ours=name in FALQON, **variables)


def parser():
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*METHODS, *(name + FUSED for name in METHODS)]
    default = ["live-both", "live", "lora", "lora-bf16", "qlora", "lora-fused", "qlora-fused"]
    found.add_argument("--child", choices=names)
    found.add_argument("--methods", nargs="+", choices=names, default=default)
    found.add_argument("--rounds", type=int, default=15)
    found.add_argument("--warmup", type=int, default=2)
    found.add_argument("--model", default="sample:smollm2")
    found.add_argument("--rank", type=int, default=64)
    found.add_argument("--tokens", type=int, default=1024, help="tokens per step")
    found.add_argument("--batch-size", type=int, default=8, help="sequences of TOKENS / N tokens")
    return found


def main():
    """Run all methods in turn, and print a table and a line of JSON."""
    options = parser().parse_args()
    if options.child:
        child(options.child, options)
        return
    places = {TORCHAO: peer("torchao", ROOT / ".venv-peers")}
    with tempfile.TemporaryDirectory() as logs:
        contenders = [
            contender(name, options, places.get(name, project("torch")), Path(logs) / name) for name in options.methods
        ]
        rows = summarize(take_turns(contenders, options.rounds, options.warmup), METRICS, options.methods[0])
    for row in rows:
        figures = {name: f"{value:.5g}" for name, value in row.medians.items()}
        figures |= {f"{name}_of_first_over_this": f"{found.median:.3f}" for name, found in row.ratios.items()}
        print(row.name, row.failure, *(f"{name} {value}" for name, value in figures.items()), sep="  ")
    print(json.dumps([row.model_dump() for row in rows]))


if __name__ == "__main__":
    main()
