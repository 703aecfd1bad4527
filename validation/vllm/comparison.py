"""The comparisons of a vLLM validation: engine outputs against torch, and engine weights against the source."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Final

import torch
from torch import Tensor

from exporters.vllm.environment import VllmEnvironment
from exporters.vllm.form import ServingForm
from exporters.vllm.plan import ExportPlan
from exporters.vllm.reopen import file_gates
from exporters.vllm.reopen_files import changed_on_purpose
from fp8pipe.artifact import Artifact, Gate, staged
from fp8pipe.artifact.gate import failures
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.core.machine import available_bytes
from fp8pipe.core.progress import track
from validation.contents import contents_gate
from validation.record import heading
from validation.vllm.expected import ExpectedWeights, weight_report
from validation.vllm.held import Holding
from validation.vllm.kernel_report import kernel_report
from validation.vllm.kv_cache import cache_scales, scales_of, without_fp8_cache
from validation.vllm.launcher import PARITY_ARGUMENTS, ProbeJob, in_process, run_probe
from validation.vllm.picture import PictureQuestion, picture_question
from validation.vllm.proved import not_proved, proved
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
    Text,
    chat_ids,
    compare_logprobs,
    gaps,
    judge,
    load_tokenizer,
    losses,
    served_figures,
)

__all__ = ["LOGPROB_THRESHOLD", "Case", "compare"]

# Largest accepted difference, nats. Another summation order in fp32 changes log-probabilities by about 1e-5 nats in a
# model of 30 layers; a single wrong scale changes them by tenths of a nat.
LOGPROB_THRESHOLD: Final = 1e-3
_TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Water boils at 100 degrees Celsius at sea level; on a mountain it boils at a lower temperature.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5\n",
)
_LONGEST_SEQUENCE: Final = 96  # tokens
_LONGEST_CONTEXT: Final = 1024  # tokens
# Prefixes of environment variables that affect the engine's results; these variables are recorded.
_TOLD: Final = ("FP8PIPE_VLLM_", "VLLM_", "OMP_", "ONEDNN_")


@dataclass(frozen=True)
class Case:
    """The inputs of a validation, after all requirements have been checked."""

    artifact: Artifact
    plan: ExportPlan | None  # how the export must have been made from its source; None if the source was not found
    environment: VllmEnvironment
    form: ServingForm
    prompts: tuple[str, ...]
    max_tokens: int
    timeout_s: float

    @property
    def source(self) -> Path:
        """The directory whose configuration, tokenizer and chat template the torch model uses."""
        return self.artifact.root if self.plan is None else self.plan.source.root

    @property
    def quantized(self) -> bool:
        """Whether the export stores codes."""
        return self.artifact.manifest.number_format is not None

    @property
    def holding(self) -> Holding:
        """How the serving engine stores weights: as codes, unless the CPU plugin dequantizes them."""
        return Holding(getattr(torch, self.form.dtype), codes=self.quantized and not self.environment.dequantizes)

    @property
    def exact(self) -> bool:
        """Whether an engine can compute in fp32 without further rounding; FP8 kernels and GPU kernels cannot."""
        return self.environment.on_cpu and not self.holding.codes

    @property
    def declared(self) -> frozenset[str]:
        """Names of the layers whose inputs are quantized according to the checkpoint."""
        layers = self.artifact.manifest.layers if self.plan is None else self.plan.layers
        return frozenset(layer.name for layer in layers if layer.activation is not None)


@dataclass(frozen=True)
class _Questions:
    """The prompts and texts for both engines, tokenized with the source's tokenizer."""

    chat: bool
    prompts: list[str]
    prompt_ids: list[list[int]]
    sequences: list[list[int]]
    length: int  # required context length, tokens
    picture: PictureQuestion | None  # the last prompt, if the model accepts images


@dataclass(frozen=True)
class _Run:
    """The results of one engine, and the comparison of its weights."""

    job: ProbeJob
    result: dict[str, Any]
    weights: WeightReport


def compare(case: Case) -> ValidationRecord:
    """Make all comparisons and return the record, which the caller must write.

    Raises:
        BadArtifactError: vLLM cannot load the export although its metadata is right, or its context is too short.
        MissingCapabilityError: vLLM or the plugin cannot run in this installation.
    """
    files = [] if case.plan is None else file_gates(case.plan, case.artifact.root)
    if failures(files):  # these files show that it is another model: no engine needs to be started
        return _concluded(case, files)
    stated, unchecked = contents_gate(case.artifact, None if case.plan is None else case.source)
    asked, expected = _questions(case), ExpectedWeights(case.artifact, case.plan)
    try:
        exact, served = _engines(case, asked, expected)
    except BadArtifactError as error:
        if stated.passed:
            raise
        # Report the metadata check's finding: vLLM's own error message may name another layer, or none.
        said = [line for line in error.why.splitlines() if "Error: " in line][-1:]
        failed = ": ".join([error.what, *(line.strip() for line in said)])
        return _concluded(case, [*files, stated], unchecked=[*unchecked, f"what vLLM computes: {failed}"])
    logprobs, canary, report = _against_torch(case, asked, expected, exact, served)
    gates = [*files, stated]
    if exact is not None and logprobs is not None:
        gates += [*exact.weights.gates("in fp32"), *logprobs.gates, wrong_answers(canary, "in fp32")]
    gates += [*report.gates, wrong_answers(report.canary, "as served")]
    main = exact or served
    return _concluded(
        case, gates, versions={**case.environment.versions, **main.result["versions"]},
        dtype="float32" if exact else case.form.dtype, weights=exact and exact.weights, logprobs=logprobs,
        canary=canary, served=report, chat_template=asked.chat, unchecked=unchecked,
        load_s=round(main.result["load_s"], 3), peak_rss_bytes=main.result["peak_rss_bytes"],
    )  # fmt: skip


def _engines(case: Case, asked: _Questions, expected: ExpectedWeights) -> tuple[_Run | None, _Run]:
    """Run the fp32 engine, if the installation allows one, and the engine as `serve` starts it."""
    holdings = [Holding(torch.float32)] if case.exact else []
    digests = _digests(expected, [*holdings, case.holding])
    variables = case.form.variables(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    # Starting an engine is mostly single-threaded, so two in parallel take little longer than one.
    ended = Event()
    with ThreadPoolExecutor(2 if case.exact and _room_for_two(expected) else 1) as pool:

        def start(holding: Holding, products: bool, arguments: list[str], variables: dict[str, str]) -> Future[_Run]:
            told = (holding, digests[holding], products, arguments, variables, ended)
            return pool.submit(_run, case, asked, expected, *told)

        try:
            arguments = [*PARITY_ARGUMENTS, "--max-model-len", str(asked.length)]
            arguments += without_fp8_cache(case.artifact.root)
            first = [start(holding, False, arguments, in_process()) for holding in holdings]
            second = start(case.holding, True, case.form.arguments(), variables)
            return next((run.result() for run in first), None), second.result()
        except BaseException:  # on an interrupt too: stop the engines that are still running
            ended.set()
            raise


def _room_for_two(expected: ExpectedWeights) -> bool:
    """Whether both engines fit into memory: 3 GiB each, plus two copies of the weights in fp32."""
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
            f"the tokenizer of {case.source} gives too few tokens for the texts of the validation",
            why="every question must give at least one token, and one text at least two",
            fix="check the tokenizer's files: it must be able to encode English text",
        )
    picture = picture_question(case.source) if chat else None
    last = [] if picture is None else [picture]
    prompt_ids += [question.prompt_ids for question in last]
    length = _context_length(case.source, max(map(len, [*sequences, *prompt_ids])) + case.max_tokens)
    return _Questions(chat, [*case.prompts, *(one.prompt for one in last)], prompt_ids, sequences, length, picture)


def _context_length(source: Path, needed: int) -> int:
    """The model's context length, but at most 1024 tokens, for a small cache and a fast start."""
    from fp8pipe.models.language.structure import load_config

    text = load_config(source).get_text_config(decoder=True)
    own = getattr(text, "max_position_embeddings", None) or _LONGEST_CONTEXT
    if needed > own:
        raise BadArtifactError(
            f"{source} has a context length of {own} tokens",
            why=f"the validation needs {needed}",
            fix="ask shorter questions, or allow shorter answers",
        )
    return max(needed, min(int(own), _LONGEST_CONTEXT))


def _digests(expected: ExpectedWeights, holdings: list[Holding]) -> dict[Holding, dict[str, Any]]:
    """Digests of the expected tensors, by `Holding` and by name.

    If the source is available, entries of the first `Holding` also have `row_error`: see `ExpectedWeights.row_error`.
    """
    digests: dict[Holding, dict[str, Any]] = {holding: {} for holding in holdings}
    with track(len(expected.names), "hash weights") as progress:
        for tensor in expected:
            for holding, found in digests.items():
                found |= {held.name: held.digests() for held in tensor.held(holding)}
            if expected.reference == "source":
                digests[holdings[0]][tensor.name]["row_error"] = expected.row_error(tensor.name, tensor.value)
            progress.advance(1)
    return digests


def _run(
    case: Case, asked: _Questions, expected: ExpectedWeights, holding: Holding, digests: dict[str, Any], products: bool,
    arguments: list[str], variables: dict[str, str], ended: Event,
) -> _Run:  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fp8pipe-weights-") as dump, staged(case.artifact) as model:
        job = ProbeJob(
            model=str(model), arguments=arguments, tensors=digests, sequences=asked.sequences, products=products,
            prompts=list(case.prompts), chat=asked.chat, max_tokens=case.max_tokens, variables=variables,
            pictured=None if asked.picture is None else asked.picture.content,
        )  # fmt: skip
        result = run_probe(job, case.environment, Path(dump), timeout_s=case.timeout_s, ended=ended)
        return _Run(job, result, weight_report(expected, digests, holding, result))


def _against_torch(
    case: Case, asked: _Questions, expected: ExpectedWeights, exact: _Run | None, served: _Run
) -> tuple[LogprobReport | None, list[CanaryAnswer], ServedReport]:
    """Compare the engines with a torch model, first in fp32 and then with the rounding of the serving engine.

    Returns:
        Log-probabilities of the fp32 engine (None without one), its answers, and the report on the serving engine.
    """
    reference = Reference(case.source, expected.stored)
    true, behind = _exact_tables(reference, asked, [run for run in (exact, served) if run is not None])
    logprobs, first, places = None, [], served.result["logprobs"]
    if exact is not None:
        logprobs = compare_logprobs(true, asked.sequences, exact.result["logprobs"], LOGPROB_THRESHOLD)
        first = _judged(asked, exact, behind[0], TIE_NATS)
    rounded = _rounded(case, expected)
    kernels = kernel_report(served.result["layers"], expected.quantized, rounded, codes=case.holding.codes)
    wide = [expected.module(name) for name in expected.quantized if case.holding.codes and not kernels.packed]
    modules = map(expected.module, rounded)
    reference.take_form(case.holding.dtype, modules, wide, expected.group, expected.input_divisors)
    if (scales := cache_scales(case.form, scales_of(case.artifact, case.plan))) is not None:
        reference.round_cache(scales, toward_zero=case.environment.on_cpu)
    form = reference.logprobs([Text.of(ids) for ids in asked.sequences])
    figures = served_figures(true, form, places) | losses(true, form, asked.sequences, places)
    report = ServedReport(
        form=case.form.in_words(case.environment, case.artifact.root), arguments=list(served.job.arguments),
        variables={k: v for k, v in sorted(served.job.variables.items()) if k.startswith(_TOLD)},
        weights=served.weights, kernels=kernels if expected.quantized else None, **figures,
        max_abs_diff=compare_logprobs(true, asked.sequences, places, LOGPROB_THRESHOLD).max_abs_diff,
        canary=_judged(asked, served, behind[-1], max(TIE_NATS, 2 * figures["noise_margin"])),
        load_s=round(served.result["load_s"], 3), total_s=round(served.result["total_s"], 3),
    )  # fmt: skip
    return logprobs, first, report


def _exact_tables(
    reference: Reference, asked: _Questions, runs: Sequence[_Run]
) -> tuple[list[Tensor], list[list[list[float]]]]:
    """The fp32 model's log-probabilities of the sequences, and the gaps of each engine's answers.

    All in one call, since every call reads the model once. An answer's tokens are known, so that one pass tells of each
    whether it is the greedy choice.
    """
    answers = [[answer["token_ids"] for answer in run.result["answers"]] for run in runs]
    texts = [_answered(asked, number, tokens) for said in answers for number, tokens in enumerate(said)]
    tables = iter(reference.logprobs([*map(Text.of, asked.sequences), *texts]))
    true = [next(tables) for _ in asked.sequences]
    return true, [[gaps(next(tables), tokens) for tokens in said] for said in answers]


def _answered(asked: _Questions, number: int, tokens: list[int]) -> Text:
    """A question with its answer; log-probabilities are wanted of the answer alone."""
    ids, picture = asked.prompt_ids[number], asked.picture
    if picture is not None and asked.prompts[number] == picture.prompt:
        return Text(picture.answered(tokens), len(ids) - 1)
    return Text.of([*ids, *tokens], len(ids) - 1)


def _judged(asked: _Questions, run: _Run, behind: list[list[float]], tie: float) -> list[CanaryAnswer]:
    questions = zip(asked.prompts, asked.prompt_ids, run.result["answers"], behind, strict=True)
    return [judge(*question, tie=tie) for question in questions]


def _rounded(case: Case, expected: ExpectedWeights) -> list[str]:
    """Names of the weights in layers whose inputs are quantized with these serving options."""
    if not case.form.rounds_activations(case.environment, case.artifact.root):
        return []
    return [
        name for name in expected.quantized
        if {name.removesuffix(".weight"), expected.module(name)} & case.declared
    ]  # fmt: skip


def _concluded(case: Case, gates: list[Gate], **found: Any) -> ValidationRecord:
    """Create the record: REJECT if a gate failed, else ACCEPT, or CONSISTENT without the source."""
    reasons, known = failures(gates), case.plan is not None
    verdict: Verdict = "REJECT" if reasons else "ACCEPT" if known else "CONSISTENT"
    served: ServedReport | None = found.get("served")
    unchecked = found.pop("unchecked", [])
    return ValidationRecord(
        **heading(case.artifact), engine="vllm", reference="source" if known else "export",
        source_digest=None if case.plan is None else case.plan.source.parent.digest,
        changed=[] if case.plan is None else changed_on_purpose(case.plan),
        **{"versions": case.environment.versions, "dtype": "float32", **found}, gates=gates,
        proved=[] if reasons else proved(case, served),
        not_proved=[*not_proved(case, served), *unchecked], reasons=reasons, verdict=verdict,
    )  # fmt: skip
