"""The sentences in a vLLM validation record that say what was proved and what was not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporters.vllm.reopen_files import changed_on_purpose
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
        but = f", except {', '.join(changed)}" if any(GENERATION_FILE in key for key in changed) else ""
        found.append(f"config.json, tokenizer, chat template and generation config are the source's{but}")
    if scales := scales_of(case.artifact, case.plan):
        found.append(f"the scales of the FP8 key/value cache inside the engine, in {len(scales)} layers, are {whose}")
    if served is not None:
        found += [] if served.kernels is None else list(_products(served.kernels))
        if any(answer.prompt.startswith(PICTURED) for answer in served.canary):
            found.append("a question about an image, sent as a client would send it, gets the torch model's answer")
        found.append(
            f"as served ({served.form}) it diverges from fp32 by {served.engine_kl:.2g} nats per token; a torch model "
            f"with the same rounding diverges by {served.noise_kl:.2g}"
        )
    return found


def not_proved(case: Case, served: ServedReport | None) -> list[str]:
    """What was not tested, and why."""
    found = []
    if case.plan is None:
        found.append("that the files hold what was exported: the source was not found (name it with --against)")
    if served is None:
        found.append("what the engine computes: it was not run to the end, because the export's files are wrong")
    if case.declared and not case.form.rounds_activations(case.environment, case.artifact.root):
        found.append(
            "kernels of a GPU, which round activations: these serving settings do not" if case.environment.on_cpu
            else "rounding of activations, which the checkpoint declares: this GPU has no arithmetic in their format"
        )  # fmt: skip
    if case.form.rounds_cache and not scales_of(case.artifact, case.plan):
        found.append(NO_SCALES)
    if served is not None:
        found += list(_unseen(case, served))
    return [*found, "serving settings other than those named"]


def _weights(case: Case, whose: str, kernels: KernelReport | None) -> str:
    if not case.holding.codes or kernels is None:
        places = "bit for bit in fp32, and rounded once as served" if case.exact else "rounded once as served"
        return f"every weight inside the engine is {whose}, {places}"
    what = "product of an input with one FP8 weight" if kernels.packed else "FP8 code and scale"
    return f"every {what} inside the engine is {whose}, bit for bit, and so is every other weight, rounded once"


def _products(kernels: KernelReport) -> Iterator[str]:
    names = ", ".join(f"{name} ({count})" for name, count in sorted(kernels.kernels.items()))
    done = f"{kernels.rounding} of {kernels.layers} layers round their inputs to E4M3"
    yield f"each quantized layer, run separately, multiplies by the weight that it stores, with {names}; {done}"
    if kernels.codes:
        but = ", except ties, since a kernel divides approximately" if APPROXIMATE in kernels.ways else ""
        yield f"{kernels.codes} codes of activations, read from kernels, are correct bit for bit{but}"


def _unseen(case: Case, served: ServedReport) -> Iterator[str]:
    if served.weights.read.get("computed"):
        yield "what vLLM's loader computes from weights, element by element: only log-probabilities test it"
    if not case.exact:
        why = "FP8 kernels round" if case.holding.codes else "sums are rounded on a GPU"
        yield f"log-probabilities to the last bit: {why}, so they are compared within that noise"
    kernels = served.kernels
    if kernels is None:
        return
    if kernels.packed:
        names = ", ".join(sorted(kernels.kernels))
        yield f"codes and scales as bytes: {names} packs them in its own order; one-hot inputs show their products"
    if kernels.rounding and not kernels.codes:
        yield "codes of activations: they cannot be read from kernels; outputs show that inputs are rounded"
    if kernels.codes and not case.form.enforce_eager:
        yield "codes of activations inside the compiled graph: each layer was run separately, outside it"
