"""The sentences in a vLLM validation record that say what was proved and what was not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporters.vllm.reopen import changed_on_purpose
from fp8pipe.models.language.ending import GENERATION_FILE
from validation.vllm.kv_cache import NO_SCALES, scales_of
from validation.vllm.picture import PICTURED
from validation.vllm.products import APPROXIMATE

if TYPE_CHECKING:
    from validation.vllm.comparison import Case
    from validation.vllm.kernel_report import KernelReport
    from validation.vllm.record import ServedReport

__all__ = ["not_proved", "proved"]


def proved(case: Case, served: ServedReport | None) -> list[str]:
    """What was proved, given that all gates passed."""
    whose = "the source's" if case.plan is not None else "those of the export's files"
    found = [_weights(case, whose, None if served is None else served.kernels)]
    if case.plan is not None:
        changed = changed_on_purpose(case.plan)
        but = f", but for {', '.join(changed)}" if any(GENERATION_FILE in key for key in changed) else ""
        found.append(f"config.json, tokenizer, chat template and generation config are the source's{but}")
    if scales := scales_of(case.artifact, case.plan):
        found.append(f"the scales of the FP8 key/value cache inside the engine, in {len(scales)} layers, are {whose}")
    if served is not None:
        found += [] if served.kernels is None else list(_products(served.kernels))
        if any(answer.prompt.startswith(PICTURED) for answer in served.canary):
            found.append("a question about a picture, sent as a client sends it, gets the torch model's answer")
        found.append(
            f"as served ({served.form}) it diverges from fp32 by {served.engine_kl:.2g} nats a token; the form itself "
            f"does by {served.noise_kl:.2g} in torch"
        )
    return found


def not_proved(case: Case, served: ServedReport | None) -> list[str]:
    """What was not tested, and why."""
    found = []
    if case.plan is None:
        found.append("that the files hold what was exported: the source is not at hand (name it with --against)")
    if served is None:
        found.append("what the engine computes: none ran to its end, since the export is not what it should be")
    if case.declared and not case.form.rounds_activations(case.environment):
        found.append(
            "FP8 kernels of a GPU, which round activations: this form does not" if case.environment.on_cpu
            else "rounding of activations, which the checkpoint declares: this GPU has no FP8 arithmetic"
        )  # fmt: skip
    if case.form.rounds_cache and not scales_of(case.artifact, case.plan):
        found.append(NO_SCALES)
    if served is not None:
        found += list(_unseen(case, served))
    return [*found, "forms of serving other than the one named"]


def _weights(case: Case, whose: str, kernels: KernelReport | None) -> str:
    if not case.holding.codes or kernels is None:
        places = "bit for bit in fp32, and rounded once as served" if case.exact else "rounded once as served"
        return f"every weight inside the engine is {whose}, {places}"
    what = "product of one FP8 weight" if kernels.packed else "FP8 code and scale"
    return f"every {what} inside the engine is {whose}, bit for bit, and every other weight is, rounded once"


def _products(kernels: KernelReport) -> Iterator[str]:
    names = ", ".join(f"{name} ({count})" for name, count in sorted(kernels.kernels.items()))
    done = f"{kernels.rounding} of {kernels.layers} round their inputs to E4M3"
    yield f"each quantized layer, run by itself, multiplies by the weight that it holds, in {names}; {done}"
    if kernels.codes:
        but = ", but for ties, since a kernel divides approximately" if APPROXIMATE in kernels.ways else ""
        yield f"{kernels.codes} codes of activations, seen where kernels multiply them, are right bit for bit{but}"


def _unseen(case: Case, served: ServedReport) -> Iterator[str]:
    if served.weights.read.get("computed"):
        yield "what vLLM's loader computes from weights, number by number, but by the log-probabilities"
    if not case.exact:
        why = "FP8 kernels round" if case.holding.codes else "sums are rounded on a GPU"
        yield f"log-probabilities to the last bits: {why}, so they are held within the noise of the form"
    kernels = served.kernels
    if kernels is None:
        return
    if kernels.packed:
        names = ", ".join(sorted(kernels.kernels))
        yield f"codes and scales as bytes: {names} packs them in an order of its own; products with one-hot inputs tell"
    if kernels.rounding and not kernels.codes:
        yield "codes of activations: no kernel shows them, and products tell that inputs are rounded"
    if kernels.codes and not case.form.enforce_eager:
        yield "codes of activations inside the compiled graph: each layer was run by itself, outside it"
