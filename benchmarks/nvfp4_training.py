"""What becomes of fine-tuning in four bits: losses of NVFP4 weights by how they were trained and rounded.

    python benchmarks/nvfp4_training.py --runs lora:2e-3 live:1e-3 straight-through:2e-3 --seeds 0 1 2

`lora` trains bf16 adapters, the upper bound, and rounds the merged weights in three ways: to nearest, as an export of
merged weights does; `compensated` by the second moments of the inputs (GPTQ's solver, scales by output error); and
`guided`, as `finetune --method lora --precision nvfp4` does, with tokens weighted by gradients. An update rule of
FALQON trains with `--precision nvfp4`, and its export is evaluated. `straight-through` trains A and B of LoRA through
the quantizer: in each forward pass W + B A is rounded to nearest, with block scales of its own and the global scales of
the base, so that what it ends with is in NVFP4; gradients pass the rounding unchanged.

Losses are means over answer tokens of held-out records, and over the tokens of texts that have nothing to do with the
training (`unrelated_text.py`), nats. Weights are evaluated in bf16 with unquantized inputs; for `W4A4`, inputs are
rounded to NVFP4 as well, with a tensor scale for each layer from the calibration batches. `share` is the drop of the
held-out loss from the untuned bf16 model, relative to that of the best `lora` as trained. The output has one line of
JSON per result; runs that it contains already are not repeated. The summary table is printed last.
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

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # the same setting as in fp8pipe's commands (fp8pipe/core/machine.py)

import torch
from rounded_inputs import nvfp4_inputs
from torch import nn
from torch.nn import functional
from unrelated_text import texts, unrelated_losses

from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.reopen import load_torch_model
from fp8pipe.core.config import build_config
from fp8pipe.core.devices import on_device
from fp8pipe.models.language.base import load_tokenizer
from fp8pipe.models.language.sources import resolve_model
from fp8pipe.models.language.structure import structure_of
from fp8pipe.numerics.bf16 import widen_bf16_products
from fp8pipe.numerics.nvfp4_merge import merge_packed
from fp8pipe.numerics.nvfp4_weights import dequantize_packed, global_scale, quantize_packed
from pipeline.falqon.four_bits import merge_into_nvfp4
from pipeline.falqon.rules import RULES
from pipeline.finetune.checkpoint import CheckpointStore
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loading import load_model
from pipeline.finetune.loop import Trainer
from pipeline.finetune.lora_nvfp4 import trained_layers
from pipeline.finetune.loss import heldout_loss, model_inputs
from pipeline.finetune.method import LoraMethod, Method, replace_layer
from pipeline.finetune.stage import finetune
from pipeline.finetune.text import load_text

STRAIGHT_THROUGH = "straight-through"


class RoundedLinear(nn.Module):
    """A linear layer on `Q(W + B A)`, where Q rounds to NVFP4; gradients pass Q unchanged."""

    def __init__(self, old, rank, scale):
        super().__init__()
        self.weight, self.bias, self.scale = old.weight.detach(), old.bias, scale
        self.lora_A = nn.Parameter(torch.empty(rank, old.in_features))
        self.lora_B = nn.Parameter(torch.zeros(old.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)  # as LoRA does

    def forward(self, x):
        """`(..., in)` to `(..., out)`."""
        weight = self.weight.float() + self.lora_B @ self.lora_A
        with torch.no_grad():
            change = dequantize_packed(*quantize_packed(weight, self.scale), self.scale) - weight
        return functional.linear(x, (weight + change).to(x.dtype), self.bias)


class StraightThrough(Method):
    """Trains A and B of `RoundedLinear` layers."""

    def __init__(self, rank, seed):
        self.rank, self.seed, self.layers = rank, seed, {}

    def prepare(self, model, base=None, losses=None):
        """Replace all linear layers that FALQON would train; those with one input share a global scale."""
        model.requires_grad_(False)
        torch.manual_seed(self.seed)
        for name, scale in scales_of(model).items():
            self.layers[name] = RoundedLinear(model.get_submodule(name), self.rank, scale)
            replace_layer(model, name, self.layers[name])
        return []

    def parameters(self):
        """A and B of every layer."""
        return {f"{n}.{key}": p for n, layer in self.layers.items() for key, p in layer.named_parameters()}

    def step_state(self):
        """A and B of every layer."""
        return {name: p.detach() for name, p in self.parameters().items()}


def scales_of(model):
    """The global scale of each linear layer that would be trained, by module path; needs plain linear layers."""
    structure, scales = structure_of(model), {}
    for members in structure.probed(model).input_groups:
        amax = max(float(model.get_submodule(name).weight.abs().max()) for name in members)
        scales |= dict.fromkeys(members, global_scale(amax))
    return scales


@torch.no_grad()
def moments_of(model, names, inputs):
    """The second moments of each layer's inputs, all tokens alike."""
    moments, hooks = {}, []
    for name in names:

        def observe(_, args, name=name):
            x = args[0].flatten(0, -2).float()
            moments[name] = moments.get(name, 0) + x.t() @ x

        hooks.append(model.get_submodule(name).register_forward_pre_hook(observe))  # fmt: skip
    for batch in inputs:
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return moments


@torch.no_grad()
def rounded(model, scales, moments):
    """Round all weights in place: to nearest, or compensated by second moments."""
    for name, scale in scales.items():
        weight = model.get_submodule(name).weight
        values = weight.float()
        codes = merge_packed(values, scale, moments[name]) if moments else quantize_packed(values, scale)
        weight.copy_(dequantize_packed(*codes, scale))


def configure(method, rate, seed, options):
    """The configuration of a run; for LoRA, alpha equals the rank."""
    settings = {
        "model": options.model, "data": options.data, "rank": options.rank, "learning_rate": rate, "seed": seed,
        "steps": options.steps, "batch_size": options.batch_size, "sequence_length": options.sequence_length,
        "evaluate_every": 0, "save_every": 0, "heldout_limit": options.heldout, "device": "cpu",
    }  # fmt: skip
    falqon = {"method": "falqon", "precision": "nvfp4", "update_rule": method}
    lora = {"method": "lora", "final_merge_batches": 256}  # the default of what is merged into NVFP4
    return on_device(build_config(FinetuneConfig, settings | (falqon if method in RULES else lora)))


def trained(config, method, scratch):
    """The trainer of a finished run, before any merge."""
    source = resolve_model(config.model)
    text, model = load_text(config, source), load_model(config, source)
    method.prepare(model)
    store = CheckpointStore(scratch / "checkpoints", 1)
    trainer = Trainer(config, model, method, text.train, text.heldout, store, scratch / "metrics.jsonl")
    trainer.run()
    return trainer


def run(name, rate, seed, options, scratch):
    """Results of one run, by name of what is evaluated: dicts of losses."""
    config = configure(name, rate, seed, options)
    source = resolve_model(config.model)
    text = load_text(config, source)
    judge = Judge(text, load_tokenizer(source.path))
    if name in RULES:
        artifact = finetune(config, scratch / "artifact")
        history = [json.loads(line) for line in (artifact.root / "metrics.jsonl").read_text().splitlines()]
        export = export_vllm(artifact.root, scratch / "export", VllmExportOptions(format=ExportFormat.NVFP4))
        names = [layer.name for layer in artifact.manifest.layers if layer.converted]
        return {name: losses_of(history) | judge(load_torch_model(export.root, torch.bfloat16), names)}
    if name == STRAIGHT_THROUGH:
        method = StraightThrough(config.rank, seed)
        trainer = trained(config, method, scratch)
        return {name: losses_of(trainer.history) | judge(trainer.model, method.layers)}
    trainer = trained(config, LoraMethod(rank=config.rank, alpha=config.rank, seed=seed, quantized=False), scratch)
    trainer.method.finish(trainer.model, list)
    model = trainer.method._peft.base_model.model
    model.eval()
    merged = {key: model.get_submodule(key).weight.clone() for key in trainer.method.names}
    history, scales = losses_of(trainer.history), scales_of(model)
    results = {name: history | judge(model, ())}
    for how in ("nearest", "compensated"):
        for key, weight in merged.items():
            model.get_submodule(key).weight.data.copy_(weight)
        inputs = list(trainer.calibration_inputs()) if how == "compensated" else ()
        rounded(model, scales, moments_of(model, scales, inputs) if inputs else {})
        results[f"{name}, {how}"] = history | judge(model, scales)
    for key, weight in merged.items():
        model.get_submodule(key).weight.data.copy_(weight)
    groups = structure_of(model).probed(model).input_groups
    trainer.model = model  # without peft around it
    merge_into_nvfp4(
        model,
        [trained_layers(model, names) for names in groups],
        trainer.calibration_inputs,
        trainer.calibration_losses,
    )
    results[f"{name}, guided"] = history | judge(model, scales)
    return results


class Judge:
    """Evaluates a model on held-out records and unrelated text, with inputs as they are and rounded to NVFP4."""

    def __init__(self, text, tokenizer):
        self.tokenizer = tokenizer
        self.heldout = [text.heldout.at(i) for i in range(len(text.heldout))]
        self.inputs = [model_inputs(text.train.at(i), "cpu") for i in range(4)]

    def __call__(self, model, quantized):
        """All losses by name; `quantized` has the paths of the layers whose inputs are rounded for W4A4, if any."""
        found = {"deployed": heldout_loss(model, self.heldout, "cpu"), **unrelated_losses(model, self.tokenizer)}
        if quantized:
            with nvfp4_inputs(model, list(quantized), self.inputs):
                found["w4a4"] = heldout_loss(model, self.heldout, "cpu")
        return found


def losses_of(history):
    """Held-out losses before training, and as trained."""
    found = [line["heldout_loss"] for line in history if "heldout_loss" in line]
    return {"untuned": found[0], "trained": found[-1]}


def summarise(rows):
    """Print mean and standard deviation of the results by name and learning rate."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["result"], row["rate"]].append(row)
    bounds = [group for (name, _), group in groups.items() if name == "lora"]
    best = min(bounds, key=lambda group: mean(row["trained"] for row in group)) if bounds else None
    columns = ("untuned", "trained", "deployed", "w4a4", *texts())
    print(
        f"{'result':28}{'rate':>8}{'seeds':>6}"
        + "".join(f"{key:>10}" for key in columns)
        + f"{'+-':>8}{'share':>8}{'s':>7}"
    )
    for (name, rate), group in sorted(groups.items()):
        means = {key: mean(row[key] for row in group) if key in group[0] else None for key in columns}
        spread = stdev(row["deployed"] for row in group) if len(group) > 1 else 0.0
        share = ""
        if best is not None:
            start, end = (mean(row[key] for row in best) for key in ("untuned", "trained"))
            share = f"{(start - means['deployed']) / (start - end):8.3f}"
        cells = "".join(" " * 10 if value is None else f"{value:10.4f}" for value in means.values())
        seconds = mean(row["seconds"] for row in group)
        print(f"{name:28}{rate:8.0e}{len(group):6}{cells}{spread:8.4f}{share}{seconds:7.0f}")


def main():
    """Make the runs that are not in the output yet, and print the summary table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", required=True, help="NAME:LEARNING_RATE; NAME is lora, live, or straight-through"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="sample:smollm2")
    parser.add_argument("--data", default="sample:chatterbot")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--heldout", type=int, default=256, help="held-out records that are evaluated, at most")
    parser.add_argument("--output", type=Path, default=Path("runs/nvfp4_training.jsonl"))
    options = parser.parse_args()
    widen_bf16_products()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    for seed in options.seeds:
        for name, rate in (spec.split(":") for spec in options.runs):
            if any((row["result"], row["rate"], row["seed"]) == (name, float(rate), seed) for row in rows):
                continue
            started = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=options.output.parent) as scratch:
                results = run(name, float(rate), seed, options, Path(scratch))
            facts = {
                "rate": float(rate), "seed": seed, "seconds": round(time.perf_counter() - started, 1),
                "steps": options.steps, "tokens_a_step": options.batch_size * options.sequence_length,
                "rank": options.rank, "torch": torch.__version__, "processor": platform.machine(),
            }  # fmt: skip
            rows += [{"result": result, **losses, **facts} for result, losses in results.items()]
            with options.output.open("a") as handle:
                handle.write("".join(json.dumps(row) + "\n" for row in rows[-len(results) :]))
    summarise(rows)


if __name__ == "__main__":
    main()
