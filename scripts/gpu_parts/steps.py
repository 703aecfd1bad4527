"""Training steps with the shapes of LLaMA-7B: time, throughput, memory and host syncs, compared with the cost model.

The step is that of `fp8pipe finetune` (`pipeline.finetune.loop`): forward, backward, gradient clipping, AdamW, flush.
Weights are random and created on the device; A is random, too, since its initialization is not part of a step. Models
of two and of four layers separate the cost per layer from the fixed cost; the full model is measured if it fits into
memory.

In rows named `compiled`, each decoder layer is compiled, as `fp8pipe finetune` does on CUDA where it can. For the other
rows, compilation is turned off.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from fp8pipe.core.config import build_config
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.text import IGNORED, Encoded
from gpu_parts.context import Context, LeftOut
from gpu_parts.lora import PlainLoraMethod
from gpu_parts.timing import counted_syncs, heaviest, peak_bytes, reset_peak, timed
from pipeline.dry_run.costs import (
    BOTH,
    BOTH_COMPILED,
    LIVE,
    LIVE_COMPILED,
    LORA,
    QLORA,
    Decoder,
    Step,
    Way,
    estimate,
)
from pipeline.dry_run.devices import Device, device_reported
from pipeline.falqon.method import FalqonMethod
from pipeline.falqon.rules import Initialisation, update_rule
from pipeline.finetune.batches import Batches
from pipeline.finetune.checkpoint import CheckpointStore
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loop import Trainer
from pipeline.finetune.method import LoraMethod, Method

# LLaMA-7B, and the step of the FALQON paper: 16 sequences of 528 tokens, rank 64, gradient checkpointing.
_LLAMA_7B: Final = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip
_TINY: Final = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128,
    "max_position_embeddings": 128,
}  # fmt: skip
_STEP, _TINY_STEP = Step(16, 528, 64, checkpointing=True), Step(2, 32, 8, checkpointing=True)
_WAYS: Final[dict[str, Way]] = {
    "live": LIVE, "live, compiled": LIVE_COMPILED, "live-both": BOTH, "live-both, compiled": BOTH_COMPILED,
    "lora": LORA, "qlora": QLORA,
}  # fmt: skip
_RULES: Final = ("live", "live-both", "released")  # of FALQON


@dataclass(frozen=True, slots=True)
class Run:
    """One row: a training method, the number of decoder layers, and whether they are compiled."""

    method: str
    layers: int
    compiled: bool = False

    @property
    def way(self) -> str:
        """The method, and whether decoder layers are compiled: a key of `_WAYS`, if the cost model covers it."""
        return f"{self.method}, compiled" if self.compiled else self.method

    @property
    def name(self) -> str:
        """The name of the row."""
        return f"{self.way}, {self.layers} layers"


def runs(tiny: bool) -> list[Run]:
    """The rows to measure, most important first."""
    if tiny:
        return [Run("live", 1), Run("released", 1), Run("lora", 1), Run("qlora", 1)]
    four = [Run("live", 4), Run("lora", 4), Run("live", 4, compiled=True), Run("qlora", 4), Run("released", 4)]
    both = [Run("live-both", 4), Run("live-both", 4, compiled=True)]
    two = [Run("live", 2), Run("lora", 2), Run("live", 2, compiled=True)]
    return [
        *four, *both, Run("live", 32), Run("lora", 32), *two, Run("live", 32, compiled=True), Run("qlora", 32),
        Run("released", 32),
    ]  # fmt: skip


def run(context: Context) -> None:
    """Emit the rows of this part."""
    first, second, *others = runs(context.tiny)
    for one in (first, second):
        context.row(one.name, partial(_measure, one, context), _needs(one, context))
    context.row(f"profile, {first.name}", partial(_profile, first, context), _needs(first, context))
    for one in others:
        context.row(one.name, partial(_measure, one, context), _needs(one, context))


def _needs(one: Run, context: Context) -> float:
    """Estimated duration of a row, seconds; it is skipped if less time is left."""
    return 0.0 if context.tiny else 15.0 + (45.0 if one.compiled else 0.0) + (20.0 if one.layers > 4 else 0.0)


def _measure(one: Run, context: Context) -> dict[str, Any]:
    shapes, step = (_TINY, _TINY_STEP) if context.tiny else (_LLAMA_7B, _STEP)
    with tempfile.TemporaryDirectory() as scratch:
        trainer, used = _trainer(one, shapes, step, context, Path(scratch))
        if trainer.compiled != one.compiled:
            raise LeftOut("decoder layers are not compiled here; the log says what is missing")
        losses: list[float] = []
        for _ in range(2):  # warm-up: the first step creates the optimizer state, and compiles
            losses.append(trainer.one_step()["loss"])
        reset_peak(context.device)
        taken = timed(trainer.one_step, context.device, rounds=3 if context.tiny else 7, warmup=1)
        peak = peak_bytes(context.device)
        with counted_syncs(context.device) as syncs:
            losses.append(trainer.one_step()["loss"])
    found = {
        "method": used, "layers": one.layers, "compiled": one.compiled, "tokens": step.tokens,
        "tokens_per_second": step.tokens / taken["seconds"], **taken, "peak_bytes": peak,
        "syncs": len(syncs) if context.on_cuda else None, "sync_places": sorted(set(syncs))[:12], "losses": losses,
    }  # fmt: skip
    sheet = device_reported(torch.cuda.get_device_name(context.device)) if context.on_cuda else None
    return found | beside_model(one, shapes, step, taken["seconds"], peak, sheet)


def _profile(one: Run, context: Context) -> dict[str, Any]:
    """Profile one training step: the kernels that take the most time."""
    shapes, step = (_TINY, _TINY_STEP) if context.tiny else (_LLAMA_7B, _STEP)
    with tempfile.TemporaryDirectory() as scratch:
        trainer, _ = _trainer(one, shapes, step, context, Path(scratch))
        for _ in range(2):
            trainer.one_step()
        return heaviest(trainer.one_step, context.device)


def beside_model(
    one: Run, shapes: dict[str, int], step: Step, seconds: float, peak: int | None, sheet: Device | None
) -> dict[str, Any]:
    """The cost model's estimate for the same step, and the ratios of measured to estimated values.

    Args:
        one: the row.
        shapes: configuration of the model.
        step: batch size, sequence length and rank.
        seconds: measured time of a step.
        peak: measured peak of allocated memory, bytes; None on a CPU.
        sheet: data sheet of the device; None if it is unknown.

    Returns:
        Entries for the row; empty if the cost model does not cover the method or the device.
    """
    way = _WAYS.get(one.way)
    if way is None or sheet is None:
        return {}
    decoder = Decoder.of_config(import_transformers().LlamaConfig(**shapes, num_hidden_layers=one.layers))
    assert decoder is not None
    found = estimate(decoder, step, way, sheet)
    # torch's peak does not include the CUDA context, which the estimate includes; it is small in comparison.
    ratio = None if peak is None else peak / found.memory_bytes
    return {
        "estimated_step_seconds": found.seconds, "seconds_over_estimate": seconds / found.seconds,
        "estimated_memory_bytes": found.memory_bytes, "memory_over_estimate": ratio,
    }  # fmt: skip


def _trainer(
    one: Run, shapes: dict[str, int], step: Step, context: Context, scratch: Path
) -> tuple[Trainer, str]:  # fmt: skip
    """The trainer of `fp8pipe finetune` for a random model, and the name of the method's implementation."""
    method, used = _method(one.method, step.rank)
    model = build_model(shapes, one.layers, context.device)
    method.prepare(model)
    model.train()
    config = build_config(FinetuneConfig, {
        "model": "random", "data": "random", "method": "falqon" if one.method in _RULES else one.method,
        "rank": step.rank, "batch_size": step.batch, "sequence_length": step.length, "steps": 1000, "log_every": 1000,
        "gradient_checkpointing": True, "packing": False, "device": context.device.type, "learning_rate": 1e-4,
    })  # fmt: skip
    text = batches(step, shapes["vocab_size"])
    store = CheckpointStore(scratch / "checkpoints", 1)
    with nullcontext() if one.compiled else _uncompiled():
        return Trainer(config, model, method, text, text, store, scratch / "metrics.jsonl"), used


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Within the `with` block, trainers are created without compilation."""

    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCH_COMPILE_DISABLE"]


def _method(name: str, rank: int) -> tuple[Method, str]:
    if name in _RULES:
        rule = update_rule(name)
        return FalqonMethod(rule, rank=rank, rows=None, initialisation=Initialisation.RANDOM, seed=0), "falqon"
    quantized, peft = name == "qlora", find_spec("peft") is not None
    if quantized and not (peft and find_spec("bitsandbytes")):
        raise LeftOut("peft and bitsandbytes are not both installed")
    kind = LoraMethod if peft else PlainLoraMethod
    return kind(rank=rank, alpha=rank, seed=0, quantized=quantized), "peft" if peft else "own LoRA, peft is absent"


def build_model(shapes: dict[str, int], layers: int, device: torch.device) -> Any:
    """A Llama with random bf16 weights, created on the device, with gradient checkpointing as in `fp8pipe finetune`."""
    transformers = import_transformers()
    settings = transformers.LlamaConfig(**shapes, num_hidden_layers=layers, use_cache=False)
    with torch.device(device):
        model = transformers.LlamaForCausalLM._from_config(settings, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def batches(step: Step, vocabulary: int) -> Batches:
    """Two batches of full sequences of random tokens, all of them answer tokens, as the cost model assumes."""
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, vocabulary, (2 * step.batch, step.length), generator=random).tolist()
    examples = [Encoded(ids, [IGNORED, *ids[1:]]) for ids in drawn]
    return Batches(examples, step.batch, step.length, seed=0, packing=False, pad_id=0)
