"""Compare the held-out loss of exported models by method, update rule and learning rate, over several seeds.

Every run makes an artifact (`finetune`) and exports it to an FP8 checkpoint (`export`). The checkpoint is evaluated as
an engine would serve it: with FP8 weights, and activations cast to FP8 with one dynamic scale per token. Runs with LoRA
do what FALQON replaces: train bf16 adapters, merge them, and quantize the result to FP8 with one scale per channel. The
losses on unrelated texts (`unrelated_text.py`) tell what the exported weights have forgotten.

    python benchmarks/update_rules.py --runs live:2e-3 lora:1e-3 released:2e-3 --seeds 0 1 2 --output runs/rules.jsonl

The output has one line of JSON per run; runs that it already contains are not repeated. The summary table is printed
last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from fp8pipe.artifact.kinds import TunedDetails

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # the same setting as in fp8pipe's commands (fp8pipe/core/machine.py)

import torch
from unrelated_text import texts, unrelated_losses

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.reopen import load_torch_model
from fp8pipe.artifact import open_artifact
from fp8pipe.core.config import build_config
from fp8pipe.models.language.base import load_tokenizer
from fp8pipe.models.language.sources import resolve_model
from fp8pipe.numerics.grids import E4M3, amax_scale
from pipeline.falqon.rules import RULES
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loss import heldout_loss
from pipeline.finetune.stage import finetune
from pipeline.finetune.text import load_text


def cast_tokens(module, args):
    """A forward pre-hook that rounds a layer's input to FP8 with one dynamic scale per token, as engines do."""
    x = args[0]
    scale = amax_scale(x.float().abs().amax(-1, keepdim=True), E4M3)
    return ((E4M3.cast(x.float() / scale).float() * scale).to(x.dtype),)


def configure(method, rate, seed, options):
    """The configuration of a run; for LoRA and QLoRA, alpha equals the rank.

    Args:
        method: an update rule of FALQON, `lora` or `qlora`.
        rate: the peak learning rate.
        seed: the seed.
        options: the command line.
    """
    falqon = method in RULES
    settings = {
        "model": options.model, "data": options.data, "rank": options.rank, "learning_rate": rate, "seed": seed,
        "steps": options.steps, "batch_size": options.batch_size, "sequence_length": options.sequence_length,
        "evaluate_every": 0, "save_every": 0, "method": "falqon" if falqon else method,
    }  # fmt: skip
    return build_config(FinetuneConfig, settings | ({"update_rule": method} if falqon else {}))


def evaluate_export(export, config):
    """Losses of an export: of held-out records, with FP8 weights alone and with FP8 activations, and of other texts."""
    model = load_torch_model(export, torch.bfloat16)
    text = load_text(config, resolve_model(config.model))
    batches = [text.heldout.at(i) for i in range(len(text.heldout))]
    found = {"exported_weights": heldout_loss(model, batches, "cpu")}
    found |= unrelated_losses(model, load_tokenizer(resolve_model(config.model).path))
    for name in [layer.name for layer in open_artifact(export).manifest.layers if layer.converted]:
        model.get_submodule(name).register_forward_pre_hook(cast_tokens)
    return found | {"exported": heldout_loss(model, batches, "cpu")}


def run(method, rate, seed, options):
    """Train, export and evaluate a model; returns the figures of the run. For the arguments see `configure`."""
    config = configure(method, rate, seed, options)
    with tempfile.TemporaryDirectory(dir=options.output.parent) as scratch:
        started = time.perf_counter()
        artifact = finetune(config, Path(scratch) / "artifact")
        seconds = time.perf_counter() - started
        history = [json.loads(line) for line in (artifact.root / "metrics.jsonl").read_text().splitlines()]
        export = export_vllm(artifact.root, Path(scratch) / "export", VllmExportOptions())
        losses_of_export = evaluate_export(export.root, config)
    losses = [line["heldout_loss"] for line in history if "heldout_loss" in line]
    merge = artifact.manifest.details_of(TunedDetails).final_merge
    return {
        "method": method, "rate": rate, "seed": seed, "untuned": losses[0], "trained": losses[-1],
        **losses_of_export, "seconds": round(seconds, 1),
        "final_merge": merge.model_dump() if merge else None,
        "steps": config.steps, "tokens_a_step": config.batch_size * config.sequence_length, "rank": config.rank,
        "torch": torch.__version__, "processor": platform.processor() or platform.machine(),
    }  # fmt: skip


def summarise(rows):
    """Print mean and standard deviation by method and learning rate.

    `share` is the reduction of the loss by tuning and exporting, relative to that of the best LoRA before its export (of
    the best rule, if LoRA has not run).
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row["method"], row["rate"]].append(row)
    bounds = [group for (method, _), group in groups.items() if method == "lora"]
    best = min(bounds or groups.values(), key=lambda group: mean(row["trained"] for row in group))
    untuned, tuned = mean(r["untuned"] for r in best), mean(r["trained"] for r in best)
    heads = f"{'trained':>9}{'exported W':>12}{'exported':>10}{'+-':>8}{'share':>8}"
    print(f"{'method':24}{'rate':>8}{'seeds':>6}{heads}" + "".join(f"{name:>9}" for name in texts()))
    for (method, rate), group in sorted(groups.items()):
        exported = [r["exported"] for r in group]
        share = (untuned - mean(exported)) / (untuned - tuned)
        spread = stdev(exported) if len(exported) > 1 else 0.0
        print(
            f"{method:24}{rate:8.0e}{len(group):6}{mean(r['trained'] for r in group):9.4f}"
            f"{mean(r['exported_weights'] for r in group):12.4f}{mean(exported):10.4f}{spread:8.4f}{share:8.3f}"
            + "".join(f"{mean(row[name] for row in group):9.4f}" for name in texts())
        )


def main():
    """Make the runs that are not in the output yet, and print the summary table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", required=True, help="METHOD:LEARNING_RATE; METHOD is an update rule, lora or qlora"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="sample:smollm2")
    parser.add_argument("--data", default="sample:chatterbot")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("runs/rules.jsonl"))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {(row["method"], row["rate"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for method, rate in (spec.split(":") for spec in options.runs):
            if (method, float(rate), seed) in done:
                continue
            rows.append(run(method, float(rate), seed, options))
            with options.output.open("a") as handle:
                handle.write(json.dumps(rows[-1]) + "\n")
    summarise(rows)


if __name__ == "__main__":
    main()
