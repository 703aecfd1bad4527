"""The torch side of a validation: transformers models with the numbers that the engine ought to hold.

In fp32 both sides compute the same formulas on the same weights (no activation is rounded), so they agree to fp32
rounding, and a difference of 0.001 nats tells a fault. In the form that serves they cannot: bf16 sums depend on their
order, and rounded activations flip. So there are two torch models, one in fp32 and one that rounds as the form does.
What lies between them is the form's own noise, measured without the engine; the engine, whose rounding is another
draw of the same noise, may lie twice as far (a divergence four times as large, which grows with the square).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.parts import PART_BYTES, PartedModel, StoredWeights
from fp8pipe.numerics.bf16 import widen_bf16_products
from fp8pipe.numerics.plain import grid_numbers
from validation.vllm.record import CanaryAnswer, LogprobReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Below this gap between the two best choices either is greedy: engines add in different orders.
TIE_NATS: Final = 1e-3
_DEGENERATE_FROM: Final = 6  # tokens; a shorter answer may well repeat itself
_DEGENERATE_SHARE: Final = 0.9
_NOISE_FACTOR: Final = 4.0
_TOLD: Final = 20  # tokens that the engine tells at each place
# What differences of TIE_NATS amount to (half their square), for forms that do not round at all.
_KL_FLOOR: Final = 1e-6

Answer = dict[str, Any]
Places = Sequence[Sequence[Mapping[str, float | str]]]  # of each sequence, log-probabilities by token


def load_tokenizer(source: Path) -> Any:
    """The tokenizer of a directory."""
    return import_transformers().AutoTokenizer.from_pretrained(
        str(source), local_files_only=True, trust_remote_code=False
    )


def chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one user message through the chat template, ready for the answer."""
    talk = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [int(token) for token in encoded["input_ids"]]


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, and the place from which on the next token's log-probabilities are asked for."""

    ids: Sequence[int]
    start: int = 0


class Reference:
    """A torch model, fp32 until `take_form`, whose weights are in memory a part at a time.

    Args:
        source: directory whose config.json names the model.
        weights: by checkpoint name, in the orientation stored; fp32.
        part_bytes: as `PartedModel`'s.
    """

    def __init__(self, source: Path, weights: StoredWeights, part_bytes: int = PART_BYTES) -> None:
        widen_bf16_products()
        self._parted = PartedModel(source, weights, part_bytes)

    @property
    def model(self) -> PreTrainedModel:
        """The model, of which not all weights are there."""
        return self._parted.model

    def take_form(self, dtype: torch.dtype, rounded: Iterable[str] = (), wide: Iterable[str] = ()) -> None:
        """Compute as the form does from here on.

        Args:
            dtype: of parameters and activations; weights are rounded to it once.
            rounded: layers whose inputs are rounded to E4M3, one scale per token.
            wide: layers whose kernels multiply codes: only their results are rounded to the dtype.
        """
        modules, multiply_codes = dict(self.model.named_modules()), set(wide)

        def rounded_once(name: str, key: str, numbers: Tensor) -> Tensor:
            if name not in multiply_codes:
                return numbers.to(dtype)
            return numbers if key == "weight" else numbers.to(dtype).float()

        self._parted.change(rounded_once)
        for name in multiply_codes:
            modules[name].register_forward_pre_hook(lambda _, args: (args[0].float(),))
            modules[name].register_forward_hook(lambda _, args, product: product.to(dtype))
        for name in rounded:
            modules[name].register_forward_pre_hook(lambda _, args: (_rounded(args[0]),))

    def logprobs(self, texts: Sequence[Text]) -> list[Tensor]:
        """Log-probabilities of every next token of each text: fp32 `(len(ids) - start, vocabulary)`.

        Texts are not batched: each is computed as if it was asked for alone.

        Raises:
            OutOfMemoryError: as `PartedModel.run`.
        """
        return self._parted.run([partial(self._logprobs, text) for text in texts])

    @torch.inference_mode()
    def _logprobs(self, text: Text) -> Tensor:
        logits = self.model(input_ids=torch.tensor([list(text.ids)])).logits[0]  # (L, V)
        return torch.log_softmax(logits.float(), dim=-1)[text.start :].clone()


def gaps(table: Tensor, tokens: Sequence[int]) -> list[float]:
    """How far each token of an answer is behind a model's first choice, nats.

    Args:
        table: the model's log-probabilities, from the answer's first token on; `(answer + 1, vocabulary)`.
        tokens: the answer.
    """
    chosen = table[:-1].gather(1, torch.tensor(list(tokens), dtype=torch.int64)[:, None])[:, 0]
    return [float(gap) for gap in table[:-1].amax(dim=1) - chosen]


def judge(prompt: str, prompt_ids: Sequence[int], answer: Answer, gaps: Sequence[float], tie: float) -> CanaryAnswer:
    """Judge one answer of the engine.

    Args:
        prompt: the question.
        prompt_ids: its tokens by the source's tokenizer and template.
        answer: the probe's `prompt_ids`, `token_ids` and `text`.
        gaps: of its tokens, from `gaps`.
        tie: a choice that is behind the first one by no more is as good, nats.
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


def _rounded(values: Tensor) -> Tensor:
    """To E4M3 and back, one scale per token: `amax / 448`, floored as in the engine's kernels; shape and dtype kept."""
    wide = values.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return (grid_numbers(wide / scale) * scale).to(values.dtype)


def compare_logprobs(
    ours: Sequence[Tensor], sequences: Sequence[Sequence[int]], engine: Places, threshold: float
) -> LogprobReport:
    """The engine's scores of each token but the first, against those of `Reference.logprobs`."""
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
    """The figures of `ServedReport` that follow from log-probabilities.

    Args:
        exact: of each sequence, those of the fp32 model `(L, V)`.
        form: those of the model that rounds as the form does.
        engine: those of the engine, of the likeliest tokens; the first at place 1.
    """
    true, rounded = torch.cat([t[:-1] for t in exact]), torch.cat([t[:-1] for t in form])  # (places, V)
    places = [place for sequence in engine for place in sequence]
    likeliest = rounded.topk(min(_TOLD, rounded.shape[1]))  # what an engine of these numbers would tell
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
    """The losses of `ServedReport`: means over all tokens but the first of each sequence, nats.

    A mean is at most as far off as its tokens are in quadratic mean; the engine's may be twice as far as the form's.
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
    """Mean over places of KL(torch, engine), the tokens that the engine does not tell taken as one; NaN stays NaN."""
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
