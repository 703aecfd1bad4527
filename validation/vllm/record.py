"""The record of a vLLM validation: what was compared, in which engine, and the verdict; written next to the export.

It contains the manifest's digest, so it does not apply to an export that has changed since. The verdict is derived from
the gates. Each gate compares data from independent origins: the export's files with the source's, the engine with
torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fp8pipe.artifact import Comparison, Gate
from fp8pipe.artifact.gate import none_of
from fp8pipe.core.config import FrozenConfig
from validation.record import EngineRecord
from validation.vllm.kernel_report import KernelReport

Verdict = Literal["ACCEPT", "CONSISTENT", "REJECT"]


class WeightReport(FrozenConfig):
    """Comparison of the weights read back from the engine with the expected ones."""

    reference: Literal["export", "source"] = Field(description="origin of the expected values")
    layers: int = Field(ge=0, description="number of compared layers that are stored as codes")
    tensors: int = Field(ge=0, description="number of tensors compared, stored as codes or not")
    elements: int = Field(ge=0, description="number of elements of those tensors")
    differing: int = Field(ge=0, description="number of elements whose fp32 bits differ")
    differing_codes: int = Field(ge=0, description="number of elements that quantize to another code")
    different: list[str] = Field(description="names of tensors that differ")
    missing: list[str] = Field(description="names of tensors that the engine does not hold")
    gemm_differs: list[str] = Field(description="tensors that the engine stores correctly but multiplies incorrectly")
    why: dict[str, str] = Field(
        default_factory=dict, description="reason by name, for tensors that are missing or differ as a whole"
    )
    unexplained: list[str] = Field(
        default_factory=list,
        description="what the engine holds that does not follow from the checkpoint, with the reason",
    )
    discarded: list[str] = Field(
        default_factory=list,
        description="tensors that the architecture does not use: the engine does not load them",
    )
    read: dict[str, int] = Field(
        description="number of tensors by how they were read: as stored, as FP8 codes, as loaded (before a layer packs "
        "them), through the GEMM (sign of zero lost), tied (not loaded, but equal to one used in its place), or "
        "computed (the engine's loader computes new values from them, element by element)"
    )
    row_error: float | None = Field(
        default=None,
        description="for weights that the export rounded: largest error of a row, relative to its bound",
    )

    def gates(self, where: str) -> list[Gate]:
        """The gates on these weights; `where` ends their names, and is "in fp32" or "as served"."""
        first = f"; the first in {self._named(self.different[:1])}" if self.different else ""
        detail = f"of {self.elements} ({self.differing_codes} codes){first}"
        found = [
            none_of(f"weights differing, {where}", max(self.differing, len(self.different)), detail),
            none_of(f"tensors missing, {where}", len(self.missing), self._named(self.missing)),
            none_of(f"unexplained in the engine, {where}", len(self.unexplained), _first(self.unexplained)),
            none_of(f"products that disagree with their weight, {where}", len(self.gemm_differs),
                    _first(self.gemm_differs)),
        ]  # fmt: skip
        if self.row_error is not None:
            detail = "error of the worst row against the source's floats, relative to half a rounding step"
            found.append(_at_most(f"rounding of rows, {where}", self.row_error, 1.0, detail))
        return found

    def _named(self, names: list[str]) -> str:
        return _first([f"{name} ({self.why[name]})" if name in self.why else name for name in names])


class LogprobReport(FrozenConfig):
    """Comparison of the log-probabilities that engine and torch model, both in fp32, assign to given texts."""

    tokens: int = Field(ge=0, description="tokens scored")
    max_abs_diff: float = Field(description="largest absolute difference, nats; NaN if any value is not finite")
    mean_abs_diff: float = Field(description="mean absolute difference, nats")
    threshold: float = Field(gt=0, description="largest difference accepted, nats")
    mean_logprob: float = Field(description="mean of the engine's log-probabilities, nats per token")

    @property
    def gates(self) -> list[Gate]:
        """The gates on these figures."""
        value = self.max_abs_diff if self.tokens else float("nan")
        detail = f"nats, over {self.tokens} tokens"
        return [_at_most("log-probabilities differ, in fp32", value, self.threshold, detail)]


class CanaryAnswer(FrozenConfig):
    """A question, the engine's answer, and whether the torch model gives the same answer."""

    prompt: str = Field(description="the question")
    answer: str = Field(description="the engine's greedy answer")
    tokens: int = Field(ge=0, description="number of tokens in the answer")
    agreeing_tokens: int = Field(
        ge=0, description="number of leading tokens that are also the torch model's greedy choice"
    )
    verdict: Literal["ok", "empty", "degenerate", "prompt-differs", "differs"] = Field(
        description="empty, degenerate: no text, or one token repeated, but so does the torch model; prompt-differs: "
        "another prompt than the tokenizer's; differs: another answer than the torch model's"
    )


class ServedReport(FrozenConfig):
    """The engine as started by `serve`, compared with two torch models: one with the same rounding, and one in fp32.

    The noise figures are differences between the two torch models and do not depend on the engine.
    """

    form: str = Field(description="how the engine ran: device, dtype, compiled or eager, activations")
    arguments: list[str] = Field(description="the arguments of vLLM's server")
    variables: dict[str, str] = Field(description="the plugin's and vLLM's environment variables that were set")
    weights: WeightReport = Field(
        description="weights read back: FP8 codes and scales bit for bit, others against values rounded once"
    )
    kernels: KernelReport | None = Field(default=None, description="kernels of quantized layers, if there are any")
    tokens: int = Field(ge=0, description="number of positions at which the next token's probabilities were compared")
    noise_kl: float = Field(
        description="mean KL divergence of the torch model with the same rounding from the fp32 torch model, nats"
    )
    engine_kl: float = Field(description="mean KL divergence of the engine from the fp32 torch model, nats")
    form_kl: float = Field(
        description="mean KL divergence of the engine from the torch model with the same rounding, nats"
    )
    bound_kl: float = Field(description="largest divergence accepted, nats; follows from the noise")
    max_abs_diff: float = Field(description="largest difference of a scored log-probability from fp32, nats")
    loss: float | None = Field(default=None, description="mean loss of the texts in the engine, nats per token")
    exact_loss: float | None = Field(default=None, description="the same loss in the fp32 torch model")
    bound_loss: float | None = Field(
        default=None,
        description="largest difference accepted: twice the change of losses between the torch models",
    )
    noise_margin: float = Field(
        description="largest change, between the torch models, in the margin of the most likely token"
    )
    decided: int = Field(
        ge=0, description="number of positions at which the fp32 model's margin is more than twice that"
    )
    decided_otherwise: int = Field(
        ge=0, description="number of those at which the engine's most likely token is another"
    )
    agreement: float = Field(description="share of all positions at which engine and fp32 model choose the same token")
    canary: list[CanaryAnswer] = Field(description="questions and answers")
    load_s: float = Field(ge=0, description="time to load the engine, seconds")
    total_s: float = Field(ge=0, description="time of the whole run, seconds")

    @property
    def gates(self) -> list[Gate]:
        """The gates on these figures."""
        why = f"nats per token, mean over {self.tokens} positions; noise between the torch models {self.noise_kl:.3g}"
        found = [] if self.kernels is None else self.kernels.gates
        if self.loss is not None and self.exact_loss is not None and self.bound_loss is not None:
            said = f"nats per token: {self.loss:.4f} in the engine, {self.exact_loss:.4f} in fp32"
            found.append(_at_most("loss differs, as served", abs(self.loss - self.exact_loss), self.bound_loss, said))
        return [
            *self.weights.gates("as served"),
            *found,
            _at_most("divergence from fp32, as served", self.engine_kl, self.bound_kl, why),
            _at_most("divergence from the form in torch, as served", self.form_kl, self.bound_kl, why),
            none_of("first choices that differ where they are decided, as served", self.decided_otherwise,
                    f"of {self.decided} such positions among {self.tokens}; {self.agreement:.1%} of all agree"),
        ]  # fmt: skip


class ValidationRecord(EngineRecord):
    """The record of one validation."""

    # Version 3 added gates, the comparison with the source's files, and `served`.
    schema_version: int = Field(default=3, description="version of this schema")
    dtype: str = Field(
        description="compute dtype of the engine without rounding (float32) or, without one, of the served engine"
    )
    versions: dict[str, str] = Field(description="versions of the engine's packages")
    reference: Literal["export", "source"] = Field(description="what everything was compared with")
    source_digest: str | None = Field(default=None, description="the source's digest; none without one")
    changed: list[str] = Field(description="keys of config.json and generation_config.json changed on purpose")
    weights: WeightReport | None = Field(
        default=None, description="weights read back in fp32; none if the engine cannot run in fp32, see `served`"
    )
    logprobs: LogprobReport | None = Field(
        default=None, description="log-probabilities in fp32; none under the same condition"
    )
    canary: list[CanaryAnswer] = Field(default_factory=list, description="questions and answers")
    served: ServedReport | None = Field(default=None, description="the engine as `fp8pipe serve` starts it")
    chat_template: bool = Field(default=False, description="whether the questions went through the chat template")
    load_s: float = Field(default=0.0, ge=0, description="time to load the engine, seconds")
    peak_rss_bytes: int = Field(default=0, ge=0, description="largest resident memory of the engine, bytes")
    gates: list[Gate] = Field(description="the comparisons with their thresholds")
    proved: list[str] = Field(description="what holds, in words")
    not_proved: list[str] = Field(description="what was not tested, and why")
    reasons: list[str] = Field(description="why it was rejected; empty when accepted")
    verdict: Verdict = Field(description="ACCEPT; CONSISTENT if the source was not found; REJECT")


def wrong_answers(answers: list[CanaryAnswer], where: str) -> Gate:
    """A gate that requires every answer to be the torch model's; poor answers that both give are only listed."""
    found = [(a.verdict in _WRONG, f"{a.prompt!r} ({a.verdict}): {a.answer!r}") for a in answers if a.verdict != "ok"]
    wrong = [text for is_wrong, text in found if is_wrong]
    own = [f"{text} (also the torch model's answer)" for is_wrong, text in found if not is_wrong]
    return none_of(f"wrong answers, {where}", len(wrong), "; ".join([f"of {len(answers)}", *wrong, *own]))


_WRONG = ("prompt-differs", "differs")


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def _at_most(name: str, value: float, threshold: float, detail: str) -> Gate:
    return Gate(name=name, value=value, comparison=Comparison.AT_MOST, threshold=threshold, detail=detail)
