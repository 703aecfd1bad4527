"""Fine-tuning: tokens per second and peak memory of FALQON, LoRA, QLoRA and LoRA on torchao's FP8 layers."""

from __future__ import annotations

import training_speed as speed

from comparison.environments import peer, project
from comparison.harness import Comparison, Contender, Settings
from comparison.models import language_model
from comparison.results import Metric

_ABOUT = """{model} on short conversations, rank {rank}, {tokens} tokens per optimizer step, on the CPU.
A round is one step of every method, so all train on equally many tokens; *tokens in an hour* is what each trains on
in equal time. Memory is the peak while training, less what Python, torch and transformers hold before the model is
loaded.

* `live-both`, `live`, `released`: FALQON's update rules, on FP8 weights.
* `lora`: LoRA on bf16 weights, fp32 adapters under autocast (peft); `lora-bf16`: adapters in bf16, too.
* `qlora`: QLoRA with NF4 weights and bf16 compute (bitsandbytes).
* `lora-torchao-fp8`: LoRA on layers that torchao computes in FP8 with dynamic scales per tensor. Emulated, as
  processors have no kernel for products of FP8 codes.
* `-fused`: with torch's fused attention, the default of peft and transformers. All others share this project's loop,
  its loss and its attention, which is faster on a CPU.

This is speed at equal work, not quality: docs/update-rules.md compares losses of what is exported."""
_QUICK = ["live-both", "live", "lora-bf16", "qlora", speed.TORCHAO]
_FULL = ["live-both", "live", "released", "lora", "lora-bf16", "qlora", speed.TORCHAO, "lora-fused", "qlora-fused"]


class _Hourly:
    """A worker whose figures also say how many tokens it trains on in an hour."""

    def __init__(self, inner: Contender) -> None:
        self._inner = inner.start()

    def round(self) -> dict[str, float]:
        figures = dict(self._inner.round())
        return figures | {"tokens_in_an_hour": 3600 * figures["tokens_per_second"]}

    def close(self) -> None:
        self._inner.close()


def build(settings: Settings) -> Comparison:
    """The comparison on SmolLM2-135M (a tiny model in quick sizes)."""
    tokens, rank, batch = settings.choose((1024, 64, 8), (64, 8, 1))
    model, what = ("sample:smollm2", "SmolLM2-135M-Instruct") if not settings.quick else language_model(settings)
    options = speed.parser().parse_args(["--tokens", str(tokens), "--batch-size", str(batch), "--rank", str(rank),
                                         "--model", str(model)])  # fmt: skip
    usual, torchao = project("torch", "transformers", "peft", "bitsandbytes"), peer("torchao", settings.environments)

    def contender(name: str) -> Contender:
        where = torchao if name == speed.TORCHAO else usual
        log = settings.work / f"training-{name}.log"
        inner = speed.contender(name, options, where, log, OMP_NUM_THREADS=str(settings.threads))
        return Contender(name, where, lambda: _Hourly(inner), inner.ours)

    hourly = Metric(name="tokens_in_an_hour", label="tokens in an hour", better="none")
    return Comparison(
        title="Fine-tuning",
        about=_ABOUT.format(model=what, rank=rank, tokens=tokens),
        metrics=(*speed.METRICS[:2], hourly, *speed.METRICS[2:]),
        contenders=tuple(map(contender, settings.choose(_FULL, _QUICK))),
        baseline="live-both",
        rounds=settings.choose(15, 1),
        warmup=settings.choose(2, 0),
    )
