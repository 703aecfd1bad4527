"""What an export says of itself: what it rounded or left as it was, and which readers and kernels would change it."""

from __future__ import annotations

from collections.abc import Iterator

from exporters.vllm.options import ExportFormat
from exporters.vllm.plan import Action, ExportPlan
from exporters.vllm.source import HUGGING_FACE
from exporters.vllm.writer import auxiliary_warnings
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.stacks import stack_name
from fp8pipe.models.language.base import check_tokens, load_tokenizer, unknown_tensors

__all__ = ["plan_warnings"]


def plan_warnings(plan: ExportPlan) -> list[str]:
    """The warnings about an export that are recorded in its manifest."""
    warnings = [*auxiliary_warnings(plan.source.root), *_token_warnings(plan), *plan.ending.warnings()]
    if plan.source.kind == HUGGING_FACE:  # of trained models, `finetune` has warned
        warnings += unknown_tensors(plan.source.root, plan.structure)
    warnings += [] if plan.source.base is None else plan.source.base.warnings()
    return [*warnings, *_of_weights(plan), *_of_kernels(plan), *_of_what_is_left(plan)]


def _of_weights(plan: ExportPlan) -> Iterator[str]:
    """Warnings about weights that were rounded here, or that transformers reads wrongly."""
    quantized = [unit for unit in plan.units if unit.action is Action.QUANTIZE]
    if quantized:
        form = plan.options.format
        shared = "block" if form.block is not None else "row"
        how = (
            "the best of five scales for each 16 inputs, by squared error" if form.packed else f"one scale per {shared}"
        )
        trained = (
            "the trained FP8 codes were rounded again, so what is served is not what was trained"
            if plan.source.holds_codes else f"they were not trained in {'NVFP4' if form.packed else 'FP8'}"
        )  # fmt: skip
        yield (
            f"{len(quantized)} weight(s) were quantized by this export (round to nearest, {how}, from "
            f"{plan.source.kind}); {trained}"
        )
    if any(unit.quantized and unit.transposed for unit in plan.units):
        yield (
            "weights stored (in, out) hold FP8 codes: vLLM's loader transposes them; transformers does not "
            "decompress them, so it must not be used to load this export"
        )
    single = any(stack_name(plan.structure.model_type, unit.name) is not None for unit in plan.units)
    if single and not any(unit.quantized and unit.transposed for unit in plan.units):
        yield (
            "experts are stored one by one, as vLLM reads them: transformers would replace them by random ones and say "
            "so only in its log, so it must not be used to load this export"
        )


def _of_kernels(plan: ExportPlan) -> Iterator[str]:
    """Warnings about kernels that change weights, or that vLLM lacks on GPUs."""
    if plan.options.format.block is not None:
        yield (
            "vLLM's DeepGEMM kernels (Hopper and Blackwell GPUs) round weights with a scale per block again, to scales "
            "that are powers of two: serve with VLLM_USE_DEEP_GEMM=0, as fp8pipe does"
        )
    if plan.options.format.calibrated:
        yield (
            "vLLM rounds inputs to NVFP4 on GPUs of compute capability 10.0 or later only; on older ones it leaves "
            "them as they are, and so does the plugin on CPUs unless FP8PIPE_VLLM_ACTIVATIONS=quant"
        )
    if plan.options.layout == "modelopt":
        yield (
            "transformers does not read ModelOpt's layout, so it must not be used to load this export; TensorRT-LLM, "
            "which does, was not run"
        )
    experts = [unit for unit in plan.units if unit.quantized and plan.structure.is_expert(unit.module)]
    if experts and plan.options.format is ExportFormat.W8A16:
        yield (
            f"vLLM {plan.schema.vllm_version} has no kernel for GPUs with FP8 experts and unquantized inputs: "
            "to serve on GPUs, export with --format fp8; on CPUs the plugin serves this export"
        )
    if any(f"{plan.spelt[unit.module or '']}.bias" in plan.names for unit in experts):
        yield (
            f"vLLM {plan.schema.vllm_version} does not load FP8 experts with biases on GPUs and stops with an error: "
            "there this model needs --format bf16; on CPUs the plugin serves it"
        )


def _of_what_is_left(plan: ExportPlan) -> Iterator[str]:
    """Warnings about tensors that are left out or unquantized, and about a version that was not tested."""
    for unit in plan.dropped:
        yield f"{unit.entry.name} was left out: config.json ties it to a stored tensor"
    if (kind := plan.structure.architecture) in plan.schema.dropped_models:
        yield (
            f"vLLM {plan.schema.vllm_version} implements {kind} no longer: it refuses the model, or runs transformers' "
            "code, which was not tested; fp8pipe validate shows which"
        )
    if not plan.schema.tested:
        yield f"checkpoints of this schema have not been tested in vLLM {plan.schema.vllm_version} yet"
    skipped = [layer for layer in plan.layers if not layer.converted and layer.name != plan.structure.output_head]
    if plan.options.format.quantized and skipped:
        yield f"{len(skipped)} linear layer(s) stay unquantized; the first: {skipped[0].name}: {skipped[0].reason}"


def _token_warnings(plan: ExportPlan) -> list[str]:
    """Warnings about tokens of a plain model's tokenizer that have no embedding row.

    For trained models, `finetune` has already warned.
    """
    if plan.source.kind != HUGGING_FACE or plan.structure.embedding is None:
        return []
    try:
        tokenizer = load_tokenizer(plan.source.root)
    except ConfigurationError:  # no tokenizer, or an unusable one: other warnings say so
        return []
    return check_tokens(tokenizer, plan.structure.tensors[f"{plan.structure.embedding}.weight"][0], ())
