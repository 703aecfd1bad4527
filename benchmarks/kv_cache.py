"""What an FP8 key/value cache costs: loss on held-out answers in vLLM, by the scales of the cache.

    python benchmarks/kv_cache.py ARTIFACT [--dtype bfloat16] [--records 256] [--output runs/kv_cache]

ARTIFACT is what `fp8pipe finetune` wrote. It is exported with and without `--kv-cache fp8`, and the records that its
training held out are scored in three engines, which differ in nothing but the cache: in the compute dtype, in FP8 with
the calibrated scales, and in FP8 with scales of 1, which vLLM uses for a checkpoint without any. Losses are means over
answer tokens, nats; the last column is the change of the loss, and the standard error of that change from the
differences per token. Then the same in torch in fp32, which rounds nothing else, also with one scale per head (vLLM's
kernels for CPUs take one per layer), and for a model that computes the same with keys 64 times as large (and queries
1/64), as models with other norms have them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from pathlib import Path

import torch

from exporters.tensorrt.language.source import open_language
from exporters.text import read_text
from exporters.vllm.environment import find_vllm_python, inspect_environment
from exporters.vllm.export import export_vllm
from exporters.vllm.form import ServingForm
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.reopen import load_torch_model
from fp8pipe.artifact import open_artifact
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.kv_cache import rounding_cache
from fp8pipe.models.language.text import IGNORED
from validation.vllm.kv_cache import scales_of
from validation.vllm.launcher import ProbeJob, run_probe


def in_vllm(export, form, text, environment):
    """Losses of all answer tokens in an engine, `(tokens,)`."""
    chosen = form.with_defaults(export, on_cpu=environment.on_cpu)
    job = ProbeJob(
        model=str(export), arguments=chosen.arguments(), tensors={}, sequences=[x.input_ids for x in text],
        prompts=["Hello"], max_tokens=1, variables=chosen.variables(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as dump:
        places = run_probe(job, environment, Path(dump), timeout_s=3600)["logprobs"]
    told = [
        -float(place[str(token)])
        for x, found in zip(text, places, strict=True)
        for token, label, place in zip(x.input_ids[1:], x.labels[1:], found, strict=True)
        if label != IGNORED
    ]
    return torch.tensor(told, dtype=torch.float64)


@torch.no_grad()
def in_torch(model, text, cache):
    """The same in a transformers model; `cache()` makes the cache of a forward pass."""
    losses = []
    for x in text:
        logits = model(input_ids=torch.tensor([x.input_ids]), past_key_values=cache()).logits[0, :-1]
        labels = torch.tensor(x.labels[1:])
        keep = labels != IGNORED
        losses.append(torch.nn.functional.cross_entropy(logits[keep], labels[keep], reduction="none"))
    return torch.cat(losses).double()


@torch.no_grad()
def per_head(model, text):
    """Scales by layer, each `(heads, 1, 1)`: amax / 448 of every head's keys and values."""
    found = {}

    class Watching(import_transformers().DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            seen = [states.abs().amax((0, 2, 3)) for states in (key_states, value_states)]
            before = found.setdefault(layer_idx, seen)
            found[layer_idx] = [torch.maximum(*pair) for pair in zip(before, seen, strict=True)]
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    for x in text:
        model(input_ids=torch.tensor([x.input_ids]), past_key_values=Watching(config=model.config))
    return {layer: tuple((amax / 448)[:, None, None] for amax in pair) for layer, pair in found.items()}


def enlarge_keys(model, factor):
    """Multiply keys by a power of two and divide queries by it: no score changes, not even by rounding."""
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data *= factor
        layer.self_attn.q_proj.weight.data /= factor


def show(where, losses, plain):
    """Print one line; returns its figures."""
    mean, change = float(losses.mean()), losses - plain
    relative = float(change.mean() / plain.mean())
    error = float(change.std() / math.sqrt(len(change)) / plain.mean())
    print(f"{where:44}{mean:10.5f}{relative:+10.3%} +- {error:.3%}", flush=True)
    return {"loss": mean, "relative_change": relative, "standard_error": error}


def main():
    """Parse, export, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("runs/kv_cache"))
    options = parser.parse_args()
    exports = {None: options.output / "plain", "fp8": options.output / "fp8"}
    for cache, place in exports.items():
        export_vllm(options.artifact, place, VllmExportOptions(kv_cache=cache, force=True))
    language = open_language(options.artifact)
    read = read_text(language.root, language.artifact, None, 32)
    text = [x for x in read.heldout if len(x.input_ids) > 1][: options.records]
    environment = inspect_environment(find_vllm_python(None))
    form = ServingForm(dtype=options.dtype, max_model_len=1024)
    unity = form.model_copy(update={"kv_cache_dtype": "fp8"})
    engines = [
        ("in the compute dtype", exports[None], form), ("FP8, calibrated", exports["fp8"], form),
        ("FP8, scales of 1", exports[None], unity),
    ]  # fmt: skip
    figures, scored = {}, []
    for name, export, chosen in engines:
        scored.append(in_vllm(export, chosen, text, environment))
        figures[name] = show(f"vLLM, {options.dtype}: {name}", scored[-1], scored[0])
    model = load_torch_model(exports["fp8"], torch.float32)
    scales = {s.layer: (s.k, s.v) for s in scales_of(open_artifact(exports["fp8"]), None).values()}
    heads = per_head(model, read.calibration)
    plain = in_torch(model, text, lambda: None)
    large = {layer: (64 * k, v) for layer, (k, v) in scales.items()}
    kinds = [
        ("calibrated", scales, 1), ("calibrated per head", heads, 1), ("scales of 1", {}, 1),
        ("calibrated, keys x 64", large, 64), ("scales of 1, keys x 64", {}, 1),
    ]  # fmt: skip
    for name, chosen, factor in kinds:
        enlarge_keys(model, factor)
        losses = in_torch(model, text, lambda chosen=chosen: rounding_cache(model, chosen))
        figures[f"torch: {name}"] = show(f"torch, fp32: FP8, {name}", losses, plain)
    facts = {"tokens": len(plain), "records": len(text), "processor": platform.processor() or platform.machine()}
    print(json.dumps({**facts, "vllm": environment.vllm, "torch": torch.__version__, "figures": figures}))


if __name__ == "__main__":
    main()
