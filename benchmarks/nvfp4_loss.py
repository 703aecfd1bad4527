"""What NVFP4 costs: loss of a model in torch, as stored, with weights rounded to NVFP4 by two rules, and with inputs.

    python benchmarks/nvfp4_loss.py [--model sample:smollm2] [--tokens 768] [TEXT ...]

The weights that an export in NVFP4 rounds are rounded with its global scales: with the block scale nearest to amax / 6,
and with the search among five scales for the smallest squared error, which is what exports do. Last, the inputs of
these layers are rounded, too, with the global scales of an export in `nvfp4-w4a4` that was calibrated on 16 records of
--calibration-data. The model computes in fp32, so that nothing else differs. Texts are files; without any, the sources
of three modules of Python's standard library, which mix prose and code, of the Python that runs this. Of each, the
first tokens are scored. Losses are means over tokens, nats; beside them the change from the stored weights and its
standard error, from the differences per token, and the rounding error of the weights relative to their norm. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import platform
import statistics
import textwrap
from pathlib import Path

import torch

from exporters.vllm.export import plan_export
from exporters.vllm.inputs import measured, read_calibration
from exporters.vllm.nvfp4 import value_rows, with_global_scales
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.models.checkpoint.tensors import read_tensor
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.sources import resolve_model
from fp8pipe.models.language.structure import build_model
from fp8pipe.numerics.nvfp4_weights import NEAREST, SEARCHED, dequantize_packed, quantize_packed
from fp8pipe.numerics.plain_nvfp4 import round_nvfp4

RULES = {
    "as stored": None, "nvfp4, nearest scale": NEAREST, "nvfp4, searched scale": SEARCHED, "nvfp4-w4a4": SEARCHED,
}  # fmt: skip


def weights_of(plan, offsets):
    """All weights by name, fp32, those in NVFP4 rounded with these candidates; and the error relative to the norm."""
    state, error, norm = {}, 0.0, 0.0
    for unit in plan.units:
        stored = read_tensor(unit.entry)
        if not unit.packed:
            state[unit.entry.name] = stored.float()
            continue
        values = value_rows(unit, range(unit.entry.shape[0]), stored).float()
        packed = values if offsets is None else dequantize_packed(
            *quantize_packed(values, unit.global_scale, offsets), unit.global_scale)  # fmt: skip
        error += float((packed - values).double().square().sum())
        norm += float(values.double().square().sum())
        state[unit.entry.name] = packed
    return state, math.sqrt(error / norm)


def round_inputs(model, plan):
    """From now on, the inputs of layers in NVFP4 are rounded with the plan's scales."""
    for unit in (unit for unit in plan.units if unit.packed):
        divisor = plan.input_scales[unit.entry.name.removesuffix("weight") + "input_global_scale"]
        model.get_submodule(unit.module).register_forward_pre_hook(
            lambda _, args, divisor=divisor: (round_nvfp4(args[0], divisor),)
        )


@torch.no_grad()
def losses_of(model, texts):
    """Losses of all tokens but the first of each text, `(tokens,)`."""
    found = []
    for ids in texts:
        logits = model(input_ids=ids[None]).logits[0, :-1]
        found.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    return torch.cat(found).double()


def main():
    """Parse, round, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", type=Path, metavar="TEXT")
    parser.add_argument("--model", default="sample:smollm2")
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--calibration-data", default="sample:chatterbot")
    options = parser.parse_args()
    root = resolve_model(options.model).path
    given = {"calibration_data": options.calibration_data, "calibration_records": 16}
    plan = with_global_scales(plan_export(root, VllmExportOptions(format=ExportFormat.NVFP4_W4A4, **given)))
    plan = measured(plan, read_calibration(plan))
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(root)
    files = options.texts or [Path(module.__file__) for module in (heapq, statistics, textwrap)]
    texts = [torch.tensor(tokenizer(file.read_text())["input_ids"][: options.tokens]) for file in files]
    figures, by_rule, plain = {}, {}, None
    for rule, offsets in RULES.items():
        state, error = weights_of(plan, offsets)
        model = build_model(root, state, torch.float32)
        if rule == "nvfp4-w4a4":
            round_inputs(model, plan)
        losses = losses_of(model, texts)
        plain = losses if plain is None else plain
        change = losses - plain
        mean, spread = float(change.mean()), float(change.std()) / math.sqrt(len(change))
        figures[rule] = {"loss": float(losses.mean()), "change": mean, "standard_error": spread, "weights": error}
        print(f"{rule:24}{losses.mean():9.4f}{mean:+9.4f} +- {spread:.4f}   weights off by {error:.2%}", flush=True)
        by_rule[rule] = losses
    between = {}
    for one, other in itertools.pairwise(list(RULES)[1:]):
        change = by_rule[other] - by_rule[one]
        mean, spread = float(change.mean()), float(change.std()) / math.sqrt(len(change))
        between[other] = {"change": mean, "standard_error": spread}
        print(f"{other} against the line before{'':9}{mean:+9.4f} +- {spread:.4f}")
    facts = {"tokens": len(losses), "texts": [file.name for file in files], "python": platform.python_version()}
    print(json.dumps({**facts, "torch": torch.__version__, "figures": figures, "against_the_line_before": between}))


if __name__ == "__main__":
    main()
