"""The comparisons of a validation: two engines, each against torch, and both against the source's numbers."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Final

import torch
from safetensors.torch import load_file

from exporters.vllm.environment import VllmEnvironment
from exporters.vllm.form import ServingForm
from exporters.vllm.plan import ExportPlan
from exporters.vllm.reopen import changed_on_purpose, file_gates
from fp8pipe.artifact import Artifact, Gate, staged
from fp8pipe.artifact.gate import failures
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.core.machine import available_bytes
from fp8pipe.core.progress import track
from validation.contents import contents_gate
from validation.record import heading
from validation.vllm.expected import ExpectedWeights, count_differences
from validation.vllm.launcher import PARITY_ARGUMENTS, ProbeJob, in_process, run_probe
from validation.vllm.record import (
    CanaryAnswer,
    LogprobReport,
    ServedReport,
    ValidationRecord,
    Verdict,
    WeightReport,
    wrong_answers,
)
from validation.vllm.reference import (
    TIE_NATS,
    Reference,
    chat_ids,
    compare_logprobs,
    judge,
    load_tokenizer,
    served_figures,
)

__all__ = ["LOGPROB_THRESHOLD", "Case", "compare"]

# fp32 engines that add in different orders differ by some 1e-5 nats on a model of 30 layers; a single wrong scale
# moves log-probabilities by tenths.
LOGPROB_THRESHOLD: Final = 1e-3
_TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Water boils at 100 degrees Celsius at sea level; on a mountain it boils at a lower temperature.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5\n",
)
_LONGEST_SEQUENCE: Final = 96  # tokens
_LONGEST_CONTEXT: Final = 1024  # tokens
# Environment variables that decide what the engine computes.
_TOLD: Final = ("FP8PIPE_VLLM_", "VLLM_", "OMP_", "ONEDNN_")


@dataclass(frozen=True)
class Case:
    """What is compared, its requirements met."""

    artifact: Artifact
    plan: ExportPlan | None  # how it must have been made; None where the source is not at hand
    environment: VllmEnvironment
    form: ServingForm
    prompts: tuple[str, ...]
    max_tokens: int
    timeout_s: float

    @property
    def source(self) -> Path:
        """Whose configuration, tokenizer and template the torch side takes."""
        return self.artifact.root if self.plan is None else self.plan.source.root

    @property
    def rounded(self) -> tuple[str, ...]:
        """Layers whose inputs the form rounds."""
        layers = self.artifact.manifest.layers if self.plan is None else self.plan.layers
        return tuple(layer.name for layer in layers if layer.activation is not None and self.form.rounds_activations)


@dataclass(frozen=True)
class _Questions:
    """What both engines are asked, in the source's tokens."""

    chat: bool
    prompt_ids: list[list[int]]
    sequences: list[list[int]]
    length: int  # tokens of context that it takes


@dataclass(frozen=True)
class _Run:
    """What one engine told, and its weights compared."""

    job: ProbeJob
    result: dict[str, Any]
    weights: WeightReport


def compare(case: Case) -> ValidationRecord:
    """Compare everything; the record is not written.

    Raises:
        BadArtifactError: vLLM cannot load the export, or its context is too short.
        MissingCapabilityError: vLLM, or the plugin, refused this installation.
    """
    files = [] if case.plan is None else file_gates(case.plan, case.artifact.root)
    if failures(files):  # no engine is needed to tell that this is another model
        return _concluded(case, files)
    stated, unchecked = contents_gate(case.artifact, None if case.plan is None else case.source)
    asked, dtype = _questions(case), getattr(torch, case.form.dtype)
    expected = ExpectedWeights(case.artifact, case.plan)
    digests = _digests(expected, (torch.float32, dtype))
    arguments = [*PARITY_ARGUMENTS, "--max-model-len", str(asked.length)]
    variables = case.form.variables(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    # Most of a start is one thread's work: side by side two take little longer than one.
    ended = Event()
    with ThreadPoolExecutor(2 if _room_for_two(expected) else 1) as pool:
        try:
            first = pool.submit(
                _run, case, asked, expected, digests, torch.float32, arguments, in_process(), ended
            )  # fmt: skip
            second = pool.submit(
                _run, case, asked, expected, digests, dtype, case.form.arguments(), variables, ended
            )  # fmt: skip
            exact, served = first.result(), second.result()
        except BaseException:  # an interruption, too: what still runs is ended
            ended.set()
            raise
    logprobs, canary, report = _against_torch(case, asked, expected, exact, served)
    gates = [
        *files, stated, *exact.weights.gates("in fp32"), *logprobs.gates, wrong_answers(canary, "in fp32"),
        *report.gates, wrong_answers(report.canary, "as served"),
    ]  # fmt: skip
    return _concluded(
        case, gates, versions={**case.environment.versions, **exact.result["versions"]}, weights=exact.weights,
        logprobs=logprobs, canary=canary, served=report, chat_template=asked.chat,
        unchecked=unchecked, load_s=round(exact.result["load_s"], 3), peak_rss_bytes=exact.result["peak_rss_bytes"],
    )  # fmt: skip


def _room_for_two(expected: ExpectedWeights) -> bool:
    """Whether memory holds both engines: each itself and its cache, and two copies of its weights, fp32 the larger."""
    stored = sum(entry.size_bytes for entry in expected.entries.values())
    return available_bytes() > 2 * (3 * 2**30 + 8 * stored)


def _questions(case: Case) -> _Questions:
    tokenizer = load_tokenizer(case.source)
    chat = bool(getattr(tokenizer, "chat_template", None))
    prompt_ids = [chat_ids(tokenizer, p) if chat else list(tokenizer(p)["input_ids"]) for p in case.prompts]
    texts = [list(tokenizer(text)["input_ids"])[:_LONGEST_SEQUENCE] for text in _TEXTS]
    sequences = [ids for ids in [*texts, *prompt_ids] if len(ids) > 1]
    if not sequences or not all(prompt_ids):
        raise BadArtifactError(
            f"the tokenizer of {case.source} makes too few tokens of the validation's texts",
            why="every question must become a token, and one text at least two",
            fix="check the tokenizer's files: does it know words of English?",
        )
    length = _context_length(case.source, max(map(len, sequences)) + case.max_tokens)
    return _Questions(chat, prompt_ids, sequences, length)


def _context_length(source: Path, needed: int) -> int:
    """The model's own context, at most 1024 tokens: a small cache, a fast start."""
    from fp8pipe.models.language.structure import load_config

    own = getattr(load_config(source), "max_position_embeddings", None) or _LONGEST_CONTEXT
    if needed > own:
        raise BadArtifactError(
            f"{source} has a context of {own} tokens",
            why=f"the validation needs {needed}",
            fix="ask shorter questions, or allow shorter answers",
        )
    return max(needed, min(int(own), _LONGEST_CONTEXT))


def _digests(expected: ExpectedWeights, dtypes: tuple[torch.dtype, ...]) -> dict[torch.dtype, dict[str, Any]]:
    """By dtype and name; those of what the export rounded also say how far its rows are off, part of the bound."""
    digests: dict[torch.dtype, dict[str, Any]] = {dtype: {} for dtype in dtypes}
    with track(len(expected.names), "hash weights") as progress:
        for tensor in expected:
            for dtype, found in digests.items():
                found[tensor.name] = tensor.as_held(dtype).digests() | {"quantized": tensor.scale is not None}
            if expected.reference == "source":
                digests[torch.float32][tensor.name]["row_error"] = expected.row_error(tensor.name, tensor.value)
            progress.advance(1)
    return digests


def _run(
    case: Case, asked: _Questions, expected: ExpectedWeights, digests: dict[torch.dtype, dict[str, Any]],
    dtype: torch.dtype, arguments: list[str], variables: dict[str, str], ended: Event,
) -> _Run:  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fp8pipe-weights-") as dump, staged(case.artifact) as model:
        job = ProbeJob(
            model=str(model), arguments=arguments, tensors=digests[dtype], sequences=asked.sequences,
            prompts=list(case.prompts), chat=asked.chat, max_tokens=case.max_tokens, variables=variables,
        )  # fmt: skip
        result = run_probe(job, case.environment, Path(dump), timeout_s=case.timeout_s, ended=ended)
        return _Run(job, result, _compare_weights(expected, digests[dtype], dtype, result["weights"]))


def _against_torch(
    case: Case, asked: _Questions, expected: ExpectedWeights, exact: _Run, served: _Run
) -> tuple[LogprobReport, list[CanaryAnswer], ServedReport]:
    """Both engines against torch: the fp32 model first, which then takes the form."""
    reference = Reference(case.source, ((tensor.name, tensor.value) for tensor in expected))
    true = [reference.logprobs(ids) for ids in asked.sequences]
    logprobs = compare_logprobs(true, asked.sequences, exact.result["logprobs"], LOGPROB_THRESHOLD)
    gaps = [
        [reference.gaps(ids, answer["token_ids"]) for ids, answer in zip(asked.prompt_ids, run.result["answers"],
                                                                         strict=True)]
        for run in (exact, served)
    ]  # fmt: skip
    reference.take_form(getattr(torch, case.form.dtype), case.rounded)
    form = [reference.logprobs(ids) for ids in asked.sequences]
    places = served.result["logprobs"]
    figures = served_figures(true, form, places)
    tie = max(TIE_NATS, 2 * figures["noise_margin"])
    first, second = (
        [judge(*question, tie=leeway) for question in zip(case.prompts, asked.prompt_ids, run.result["answers"], behind,
                                                         strict=True)]
        for run, behind, leeway in ((exact, gaps[0], TIE_NATS), (served, gaps[1], tie))
    )  # fmt: skip
    report = ServedReport(
        form=case.form.in_words(on_cpu=case.environment.on_cpu), arguments=list(served.job.arguments),
        variables={k: v for k, v in sorted(served.job.variables.items()) if k.startswith(_TOLD)},
        weights=served.weights, **figures,
        max_abs_diff=compare_logprobs(true, asked.sequences, places, LOGPROB_THRESHOLD).max_abs_diff, canary=second,
        load_s=round(served.result["load_s"], 3), total_s=round(served.result["total_s"], 3),
    )  # fmt: skip
    return logprobs, first, report


def _compare_weights(
    expected: ExpectedWeights, digests: dict[str, Any], dtype: torch.dtype, found: dict[str, dict[str, Any]]
) -> WeightReport:
    """Turn the probe's findings into counts; only tensors that differ are looked at again."""
    report: dict[str, Any] = dict.fromkeys(("layers", "tensors", "elements", "differing", "differing_codes"), 0)
    different, missing = [], []
    read: dict[str, int] = {}
    errors = [digest["row_error"] for digest in digests.values() if "row_error" in digest]
    for name, digest in digests.items():
        finding = found[name]
        if finding["status"] == "missing":
            missing.append(name)
            continue
        if finding["status"] != "match":
            different.append(name)
            tensor, actual = expected.read(name).as_held(dtype), load_file(finding["file"])["value"]
            bits, codes = count_differences(tensor, actual)
            report["differing"] += bits
            report["differing_codes"] += codes
            errors += [expected.row_error(name, actual)] if dtype is torch.float32 else []
        report["elements"] += torch.Size(digest["shape"]).numel()
        report["tensors"] += 1
        report["layers"] += int(digest["quantized"])
        read[finding["read"]] = read.get(finding["read"], 0) + 1
    return WeightReport(
        **report, reference=expected.reference, different=different, missing=missing,
        gemm_differs=[name for name, finding in found.items() if finding.get("gemm_differs")], read=read,
        row_error=max(errors, key=lambda error: (error != error, error)) if errors else None,  # NaN is the worst
    )  # fmt: skip


def _concluded(case: Case, gates: list[Gate], **found: Any) -> ValidationRecord:
    """The record; gates say whether it is a rejection, and the reference what else it can be."""
    reasons, known = failures(gates), case.plan is not None
    verdict: Verdict = "REJECT" if reasons else "ACCEPT" if known else "CONSISTENT"
    served: ServedReport | None = found.get("served")
    unchecked = found.pop("unchecked", [])
    return ValidationRecord(
        **heading(case.artifact), engine="vllm", dtype="float32", reference="source" if known else "export",
        source_digest=None if case.plan is None else case.plan.source.parent.digest,
        changed=[] if case.plan is None else changed_on_purpose(case.plan),
        **{"versions": case.environment.versions, **found}, gates=gates,
        proved=[] if reasons else _proved(case, served),
        not_proved=[*_not_proved(case, served), *unchecked], reasons=reasons, verdict=verdict,
    )  # fmt: skip


def _proved(case: Case, served: ServedReport | None) -> list[str]:
    whose = "the source's" if case.plan is not None else "those of the export's files"
    found = [f"every weight inside the engine is {whose}, bit for bit in fp32, and rounded once as served"]
    if case.plan is not None:
        found.append("config.json, tokenizer, chat template and generation config are the source's")
    if served is not None:
        found.append(
            f"as served ({served.form}) it diverges from fp32 by {served.engine_kl:.2g} nats a token; the form itself "
            f"does by {served.noise_kl:.2g} in torch"
        )
    return found


def _not_proved(case: Case, served: ServedReport | None) -> list[str]:
    found = []
    if case.plan is None:
        found.append("that the files hold what was exported: the source is not at hand (name it with --against)")
    if served is None:
        found.append("what the engine computes: it was not started, since the files are not the source's")
    declared = any(layer.activation is not None for layer in case.artifact.manifest.layers)
    if declared and not case.form.rounds_activations:
        found.append("FP8 kernels of a GPU, which round activations: this form does not")
    return [*found, "forms of serving other than the one named"]
