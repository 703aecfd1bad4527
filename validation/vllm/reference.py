"""The torch side of a validation: transformers models with the weights that the engine should have.

In fp32, torch and the engine compute the same formulas with the same weights, without quantizing activations, so they
agree to fp32 rounding, and a difference of 0.001 nats indicates a defect. The serving engine cannot agree so closely:
bf16 sums depend on the summation order, and a tiny difference can round an activation to another code. So there are two
torch models, one in fp32 and one that rounds as the serving engine does. The difference between them is the rounding
noise, measured without the engine. The engine's own rounding is another sample of the same noise, so the engine may
deviate from fp32 by up to twice the noise, which is four times the KL divergence, since that grows with the square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.kv_cache import cache_argument, rounding_cache
from fp8pipe.models.language.parts import PART_BYTES, PartedModel, StoredWeights
from fp8pipe.numerics.bf16 import widen_bf16_products
from fp8pipe.numerics.plain import grid_numbers
from fp8pipe.numerics.plain_nvfp4 import round_nvfp4
from validation.vllm.record import CanaryAnswer, LogprobReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# If the log-probabilities of the two most probable tokens differ by less than this (nats), either token is accepted as
# the greedy choice, since the summation order of an engine may change their order.
TIE_NATS: Final = 1e-3
_DEGENERATE_FROM: Final = 6  # tokens; a shorter answer may legitimately repeat a token
_DEGENERATE_SHARE: Final = 0.9
_NOISE_FACTOR: Final = 4.0
_TOLD: Final = 20  # number of tokens for which the engine reports log-probabilities at each position
# Added to the accepted KL divergence, for engines that do not round: on the order of the square of TIE_NATS.
_KL_FLOOR: Final = 1e-6

Answer = dict[str, Any]
Places = Sequence[Sequence[Mapping[str, float | str]]]  # per sequence and position: log-probabilities by token


def load_tokenizer(source: Path) -> Any:
    """Load the tokenizer of a model directory, without network access."""
    return import_transformers().AutoTokenizer.from_pretrained(
        str(source), local_files_only=True, trust_remote_code=False
    )


def chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one user message with the chat template applied, including the generation prompt."""
    talk = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [int(token) for token in encoded["input_ids"]]


@dataclass(frozen=True, slots=True)
class Text:
    """What a model is asked about.

    Attributes:
        inputs: arguments of the model, a batch of one.
        start: position from which on the log-probabilities of the next token are wanted.
    """

    inputs: Mapping[str, Tensor]
    start: int = 0

    @classmethod
    def of(cls, ids: Sequence[int], start: int = 0) -> Text:
        """A text alone, of these token ids."""
        return cls({"input_ids": torch.tensor([list(ids)])}, start)


class Reference:
    """The torch model, with one part of its weights in memory at a time; computes in fp32 until `take_form` is called.

    Args:
        source: directory whose config.json defines the model.
        weights: fp32 tensors of its checkpoint.
        part_bytes: as `PartedModel`.
    """

    def __init__(self, source: Path, weights: StoredWeights, part_bytes: int = PART_BYTES) -> None:
        widen_bf16_products()
        self._parted = PartedModel(source, weights, part_bytes)
        self.model: PreTrainedModel = self._parted.model
        self._cache: Callable[[], dict[str, Any]] = dict  # the key/value cache of a forward pass, as its arguments

    def take_form(
        self, dtype: torch.dtype, rounded: Iterable[str] = (), wide: Iterable[str] = (), group: int | None = None,
        divisors: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Change the model in place, so that it rounds as the serving engine does.

        Args:
            dtype: dtype of parameters and activations; weights are rounded to it once.
            rounded: layers whose inputs are quantized, to E4M3 if not in `divisors`.
            wide: layers whose kernels multiply FP8 codes: their weights stay fp32, and only outputs are rounded.
            group: number of neighbouring features of an input that share a scale; None for one scale per token.
            divisors: of inputs that are quantized to NVFP4, the reciprocals of their global scales, by layer.
        """
        modules, multiply_codes = dict(self.model.named_modules()), set(wide)

        def rounded_once(name: str, key: str, values: Tensor) -> Tensor:
            if name not in multiply_codes:
                return values.to(dtype)
            return values if key == "weight" else values.to(dtype).float()

        self._parted.change(rounded_once)
        for name in multiply_codes:
            modules[name].register_forward_pre_hook(lambda _, args: (args[0].float(),))
            modules[name].register_forward_hook(lambda _, args, product: product.to(dtype))
        for name in rounded:
            divisor = (divisors or {}).get(name)
            change = partial(_rounded, group=group) if divisor is None else partial(round_nvfp4, divisor=divisor)
            modules[name].register_forward_pre_hook(lambda _, args, change=change: (change(args[0]), *args[1:]))

    def round_cache(self, scales: Mapping[int, tuple[float, float]], *, toward_zero: bool) -> None:
        """From now on, round keys and values to E4M3; the arguments are those of `rounding_cache`."""
        self._cache = lambda: cache_argument(self.model, rounding_cache(self.model, scales, toward_zero=toward_zero))

    def logprobs(self, texts: Sequence[Text]) -> list[Tensor]:
        """Log-probabilities of the next token from each text's start on: fp32 `(length - start, vocabulary)` each.

        Texts are not batched: each is computed as if it was the only one.
        """
        return self._parted.run([partial(self._logprobs, text) for text in texts])

    @torch.inference_mode()
    def _logprobs(self, text: Text) -> Tensor:
        logits = self.model(**text.inputs, **self._cache()).logits[0]  # (L, V)
        return torch.log_softmax(logits.float(), dim=-1)[text.start :].clone()


def gaps(table: Tensor, tokens: Sequence[int]) -> list[float]:
    """How much less probable each token of an answer is than a model's most probable token, nats.

    Args:
        table: the model's log-probabilities from the answer's first token on, `(answer + 1, vocabulary)`.
        tokens: token ids of the answer.

    Returns:
        Differences of log-probabilities, one per token of the answer; 0 for the most probable token.
    """
    chosen = table[:-1].gather(1, torch.tensor(list(tokens), dtype=torch.int64)[:, None])[:, 0]
    return [float(gap) for gap in table[:-1].amax(dim=1) - chosen]


def judge(prompt: str, prompt_ids: Sequence[int], answer: Answer, gaps: Sequence[float], tie: float) -> CanaryAnswer:
    """Compare an answer of the engine with the torch model's greedy choices.

    Args:
        prompt: the question.
        prompt_ids: its token ids from the source's tokenizer and chat template.
        answer: `prompt_ids`, `token_ids` and `text` from the probe.
        gaps: the gaps of the answer's tokens, from `gaps`.
        tie: a token whose gap is at most this large is accepted as the greedy choice, nats.
    """
    tokens: list[int] = answer["token_ids"]
    same_prompt = list(prompt_ids) == list(answer["prompt_ids"])
    behind = next((place for place, gap in enumerate(gaps) if not gap <= tie), len(tokens))
    agreeing = behind if same_prompt else 0
    return CanaryAnswer(
        prompt=prompt,
        answer=answer["text"],
        tokens=len(tokens),
        agreeing_tokens=agreeing,
        verdict=_verdict(answer["text"], tokens, same_prompt, agreeing),
    )


def _rounded(values: Tensor, group: int | None = None) -> Tensor:
    """Quantize to E4M3 and dequantize, with one scale per token or group: `amax / 448`, at least vLLM's minimum scale.

    Returns a tensor with the shape and dtype of `values`.
    """
    wide = values.float() if group is None else values.float().unflatten(-1, (-1, group))
    scale = (wide.abs().amax(dim=-1, keepdim=True) / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return (grid_numbers(wide / scale) * scale).view(values.shape).to(values.dtype)


def compare_logprobs(
    ours: Sequence[Tensor], sequences: Sequence[Sequence[int]], engine: Places, threshold: float
) -> LogprobReport:
    """Compare the log-probabilities of given texts in the engine with those of the torch model.

    Args:
        ours: results of `Reference.logprobs`, `(L, V)` for each sequence.
        sequences: token ids of each sequence; all tokens except the first are scored.
        engine: the engine's log-probabilities, starting at position 1.
        threshold: largest accepted difference, nats.
    """
    differences, scores = [], []
    for table, ids, places in zip(ours, sequences, engine, strict=True):
        targets = torch.tensor(list(ids[1:]))
        expected = table[:-1].gather(1, targets[:, None])[:, 0]
        scores.append(torch.tensor([float(place[str(t)]) for t, place in zip(ids[1:], places, strict=True)]))
        differences.append((expected - scores[-1]).abs())
    all_differences, all_scores = torch.cat(differences), torch.cat(scores)
    return LogprobReport(
        tokens=all_differences.numel(),
        max_abs_diff=float(all_differences.max()),
        mean_abs_diff=float(all_differences.mean()),
        threshold=threshold,
        mean_logprob=float(all_scores.mean()),
    )


def served_figures(exact: Sequence[Tensor], form: Sequence[Tensor], engine: Places) -> dict[str, Any]:
    """The figures of `ServedReport` that are computed from log-probabilities.

    Args:
        exact: log-probabilities of the fp32 model, `(L, V)` for each sequence.
        form: log-probabilities of the model that rounds as the engine does, `(L, V)` for each sequence.
        engine: log-probabilities of the engine, only for the most probable tokens, starting at position 1.
    """
    true, rounded = torch.cat([t[:-1] for t in exact]), torch.cat([t[:-1] for t in form])  # (places, V)
    places = [place for sequence in engine for place in sequence]
    likeliest = rounded.topk(min(_TOLD, rounded.shape[1]))  # the tokens that an engine would report for this model
    told = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    noise = _mean_divergence(true, [dict(zip(map(str, tokens), values, strict=True)) for tokens, values in told])
    first, second = true.topk(2).indices.T
    lead = _lead(true, first, second)
    margin = float((lead - _lead(rounded, first, second)).abs().max())
    chosen = torch.tensor([int(max(place, key=lambda token: float(place[token]))) for place in places])
    decided, other = lead > 2 * margin, chosen != first
    return {
        "tokens": len(places),
        "noise_kl": noise,
        "engine_kl": _mean_divergence(true, places),
        "form_kl": _mean_divergence(rounded, places),
        "bound_kl": _NOISE_FACTOR * noise + _KL_FLOOR,
        "noise_margin": margin,
        "decided": int(decided.sum()),
        "decided_otherwise": int((decided & other).sum()),
        "agreement": 1.0 - float(other.float().mean()),
    }


def losses(
    exact: Sequence[Tensor], form: Sequence[Tensor], sequences: Sequence[Sequence[int]], engine: Places
) -> dict[str, float]:
    """The losses of `ServedReport`: means over all tokens except the first of each sequence, nats per token.

    The error of a mean is at most the root mean square error of its terms. The engine's loss may deviate by twice the
    root mean square error of the torch model with the same rounding. For the arguments see `served_figures` and
    `compare_logprobs`.
    """
    targets = [torch.tensor(list(ids[1:])) for ids in sequences]
    true, rounded = (
        torch.cat([t[:-1].gather(1, ids[:, None])[:, 0] for t, ids in zip(tables, targets, strict=True)]).double()
        for tables in (exact, form)
    )
    told = [float(place[str(int(token))]) for ids, places in zip(targets, engine, strict=True)
            for token, place in zip(ids, places, strict=True)]  # fmt: skip
    noise = float((rounded - true).square().mean().sqrt())
    return {
        "loss": -math.fsum(told) / len(told), "exact_loss": -float(true.mean()), "bound_loss": 2 * noise + TIE_NATS,
    }  # fmt: skip


def _lead(table: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return table.gather(1, first[:, None])[:, 0] - table.gather(1, second[:, None])[:, 0]


def _mean_divergence(table: Tensor, places: Sequence[Mapping[str, float | str]]) -> float:
    """Mean KL divergence of the engine's distribution from torch's, over all positions, nats.

    All tokens that the engine does not report are treated as one class. NaN values give NaN.
    """
    found = []
    for ours, place in zip(table.double(), places, strict=True):
        told = torch.tensor([int(token) for token in place])
        theirs = torch.tensor([float(value) for value in place.values()], dtype=torch.float64)
        p, q = ours[told].exp(), theirs.exp()
        rest_p, rest_q = (1 - p.sum()).clamp(min=1e-12), (1 - q.sum()).clamp(min=1e-12)
        found.append((p * (ours[told] - theirs)).sum() + rest_p * (rest_p / rest_q).log())
    return float(torch.stack(found).mean())


def _verdict(text: str, tokens: list[int], same_prompt: bool, agreeing: int) -> Any:
    if not same_prompt:
        return "prompt-differs"
    if not tokens or agreeing < len(tokens):
        return "differs"
    if not text.strip():
        return "empty"
    most = max(tokens.count(token) for token in set(tokens))
    if len(tokens) >= _DEGENERATE_FROM and most >= _DEGENERATE_SHARE * len(tokens):
        return "degenerate"
    return "ok"
