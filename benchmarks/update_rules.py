"""Compare ways to train and number formats by what is exported: losses, a task, speed, memory and size.

Every run makes an artifact with `fp8pipe finetune`, in a process of its own whose peak memory is measured, and exports
it. The checkpoints are loaded back and evaluated with their weights alone, and with inputs rounded as an engine rounds
them (FP8: one dynamic scale per token). LoRA and QLoRA do what FALQON replaces: train bf16 adapters and round the
merged weights in the export. The losses on unrelated texts (`unrelated_text.py`) tell what the weights have forgotten,
and the task (`answer_choice.py`) whether the held-out questions get their answers.

    python benchmarks/update_rules.py --runs live:1e-3 lora:2e-3 live/nvfp4:1e-3 lora/nvfp4:2e-3 --seeds 0 1 2

A run is METHOD[/PRECISION]:RATE; METHOD is an update rule, `lora` or `qlora`. The output has one line of JSON per
export; runs that it already contains are not repeated. The summary table is printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # the same setting as in fp8pipe's commands (fp8pipe/core/machine.py)

import torch
import yaml
from answer_choice import NAME, write_task
from comparison.processes import run_measured
from rounded_inputs import fp8_inputs, nvfp4_inputs
from unrelated_text import texts, unrelated_losses

from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.reopen import load_torch_model
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.kinds import TunedDetails
from fp8pipe.core.config import build_config
from fp8pipe.models.language.base import load_tokenizer
from fp8pipe.models.language.sources import resolve_model
from fp8pipe.numerics.bf16 import widen_bf16_products
from pipeline.falqon.rules import RULES
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loss import heldout_loss, model_inputs
from pipeline.finetune.text import load_text
from validation.tasks.evaluate import evaluate_export
from validation.tasks.record import EvaluateConfig

FORMATS = {"fp8": ("fp8",), "nvfp4": ("nvfp4",), "bf16": ("bf16", "fp8", "nvfp4")}  # by the precision of the artifact


def configure(method, precision, rate, seed, options):
    """The settings of a run; for LoRA and QLoRA, alpha equals the rank."""
    falqon = method in RULES
    settings = {
        "model": options.model, "data": options.data, "rank": options.rank, "learning_rate": rate, "seed": seed,
        "steps": options.steps, "batch_size": options.batch_size, "sequence_length": options.sequence_length,
        "evaluate_every": 0, "save_every": 0, "log_every": 1, "method": "falqon" if falqon else method,
        "device": "cpu",
    }  # fmt: skip
    return settings | ({"update_rule": method} if falqon else {}) | ({"precision": precision} if precision else {})


class Judge:
    """Evaluates exports on held-out records, unrelated texts and the task."""

    def __init__(self, config, tasks):
        source = resolve_model(config.model)
        text = load_text(config, source)
        self.tokenizer, self.tasks = load_tokenizer(source.path), tasks
        self.heldout = [text.heldout.at(i) for i in range(len(text.heldout))]
        self.inputs = [model_inputs(text.train.at(i), "cpu") for i in range(4)]  # for the scales of W4A4

    def __call__(self, export, form):
        """The figures of an export, by name."""
        model = load_torch_model(export, torch.bfloat16)
        found = {"weights": heldout_loss(model, self.heldout, "cpu"), **unrelated_losses(model, self.tokenizer)}
        names = [layer.name for layer in open_artifact(export).manifest.layers if layer.converted]
        if form != "bf16":
            with fp8_inputs(model, names) if form == "fp8" else nvfp4_inputs(model, names, self.inputs):
                found["rounded_inputs"] = heldout_loss(model, self.heldout, "cpu")
        del model
        asked = {"tasks": NAME, "task_dir": str(self.tasks), "engine": "transformers"}
        score = evaluate_export(export, build_config(EvaluateConfig, asked)).scores[NAME]["acc"]
        size = sum(file.stat().st_size for file in export.glob("*.safetensors"))
        return found | {"task": score.value, "task_stderr": score.stderr, "bytes": size}


def run(method, precision, rate, seed, options):
    """Train a model, and evaluate its exports; returns one dict of figures per export."""
    settings = configure(method, precision, rate, seed, options)
    config = build_config(FinetuneConfig, settings)
    with tempfile.TemporaryDirectory(dir=options.output.parent) as place:
        scratch = Path(place)
        (scratch / "run.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "fp8pipe", "finetune", "--config", scratch / "run.yaml"]
        measured = run_measured([*command, "--output", scratch / "artifact"], scratch / "log")
        artifact = open_artifact(scratch / "artifact")
        history = [json.loads(line) for line in (artifact.root / "metrics.jsonl").read_text().splitlines()]
        losses = [line["heldout_loss"] for line in history if "heldout_loss" in line]
        merge = artifact.manifest.details_of(TunedDetails).final_merge
        facts = {
            "method": method, "precision": precision, "rate": rate, "seed": seed,
            "untuned": losses[0], "trained": losses[-1], "seconds": round(measured.seconds, 1),
            "tokens_per_second": median(line["tokens_per_second"] for line in history if "tokens_per_second" in line),
            "peak_bytes": measured.resident_bytes, "anonymous_bytes": measured.anonymous_bytes,
            "final_merge": merge.model_dump() if merge else None,
            "steps": config.steps, "tokens_a_step": config.batch_size * config.sequence_length, "rank": config.rank,
            "torch": torch.__version__, "processor": platform.processor() or platform.machine(),
        }  # fmt: skip
        judge = Judge(config, write_task(scratch / "tasks", config))
        kept = precision or ("fp8" if method in RULES else "bf16")
        rows = []
        for form in FORMATS[kept]:
            export = export_vllm(artifact.root, scratch / form, VllmExportOptions(format=ExportFormat(form)))
            rows.append(facts | {"format": form, **judge(export.root, form)})
    return rows


def summarise(rows):
    """Print means over seeds by method, precision, learning rate and format, with standard deviations of losses.

    `share` is the reduction of the loss by tuning and exporting, relative to that of the best LoRA in bf16 (of the best
    row, if LoRA has not run); the reference is the loss of the untuned model in bf16.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row["method"], row["precision"] or "", row["rate"], row["format"]].append(row)
    bounds = [group for (method, *_, form), group in groups.items() if (method, form) == ("lora", "bf16")]
    best = min(bounds or groups.values(), key=lambda group: mean(row["weights"] for row in group))
    untuned, tuned = mean(row["untuned"] for row in best), mean(row["weights"] for row in best)
    other = "".join(f"{name:>9}" for name in texts())
    heads = f"{'trained':>9}{'weights':>9}{'+-':>8}{'share':>7}{'rounded inputs':>16}{'+-':>8}{'share':>7}"
    print(f"{'run':30}{'format':8}{'seeds':>6}{heads}{other}{'task':>7}{'tokens/s':>10}{'peak MB':>9}{'MB':>8}{'s':>7}")
    for (method, precision, rate, form), group in sorted(groups.items()):
        name = f"{method}{'/' if precision else ''}{precision}:{rate:.0e}"
        cells = [f"{mean(row['trained'] for row in group):9.4f}"]
        for key, width in (("weights", 9), ("rounded_inputs", 16)):
            losses = [row[key] for row in group if key in row]
            spread = f"{stdev(losses):8.4f}" if len(losses) > 1 else " " * 8
            share = f"{(untuned - mean(losses)) / (untuned - tuned):7.3f}" if losses else " " * 7
            cells.append((f"{mean(losses):{width}.4f}" if losses else " " * width) + spread + share)
        cells += [f"{mean(row[name] for row in group):9.3f}" for name in texts()]
        sizes = (("task", 7, 3, 1), ("tokens_per_second", 10, 0, 1), ("peak_bytes", 9, 0, 1e6), ("bytes", 8, 1, 1e6))
        cells += [f"{mean(row[key] for row in group) / unit:{w}.{digits}f}" for key, w, digits, unit in sizes]
        print(f"{name:30}{form:8}{len(group):6}{''.join(cells)}{mean(row['seconds'] for row in group):7.0f}")


def parse(spec):
    """METHOD[/PRECISION]:RATE as a tuple; the precision is None if it is not given."""
    name, rate = spec.split(":")
    method, _, precision = name.partition("/")
    return method, precision or None, float(rate)


def main():
    """Make the runs that are not in the output yet, and print the summary table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, type=parse, help="METHOD[/PRECISION]:LEARNING_RATE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="sample:smollm2")
    parser.add_argument("--data", default="sample:chatterbot")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("runs/rules.jsonl"))
    options = parser.parse_args()
    widen_bf16_products()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {(row["method"], row["precision"], row["rate"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for method, precision, rate in options.runs:
            if (method, precision, rate, seed) in done:
                continue
            rows += (found := run(method, precision, rate, seed, options))
            with options.output.open("a") as handle:
                handle.write("".join(json.dumps(row) + "\n" for row in found))
    summarise(rows)


if __name__ == "__main__":
    main()
