"""The torch side of a validation: a transformers model in fp32 with the export's dequantized weights.

Both sides compute the same formulas on the same weights (no activation quantization), so they agree to fp32
rounding. Comparing W8A8 arithmetic token by token would prove nothing: rounding flips spread through a deep network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exporters.vllm.reopen import load_torch_model
from fp8pipe.models.compat import import_transformers
from validation.vllm.record import CanaryAnswer, LogprobReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Reference", "chat_ids", "load_tokenizer"]

# Below this gap between the two best choices either is greedy: engines add in different orders.
_TIE_NATS = 1e-3
_DEGENERATE_FROM = 6  # tokens; a shorter answer may well repeat itself
_DEGENERATE_SHARE = 0.9


def load_tokenizer(export: Path) -> Any:
    """The export's own tokenizer."""
    return import_transformers().AutoTokenizer.from_pretrained(str(export), local_files_only=True)


def chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one user message through the chat template, ready for the answer."""
    talk = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [int(token) for token in encoded["input_ids"]]


class Reference:
    """The fp32 model and the two comparisons with it.

    Args:
        export: directory of an export to vLLM.
    """

    def __init__(self, export: Path) -> None:
        self.model: PreTrainedModel = load_torch_model(export, torch.float32)

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """Log-probabilities of every next token: fp32 `(len(ids), vocabulary)`."""
        logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0]  # (L, V)
        return torch.log_softmax(logits.float(), dim=-1)

    def compare(
        self, sequences: Sequence[Sequence[int]], engine: Sequence[Sequence[float | str]], threshold: float
    ) -> LogprobReport:
        """Score `sequences` and compare with the engine's scores (of each token but the first)."""
        differences, scores = [], []
        for ids, theirs in zip(sequences, engine, strict=True):
            targets = torch.tensor(list(ids[1:]))
            ours = self.logprobs(ids)[:-1].gather(1, targets[:, None])[:, 0]
            scores.append(torch.tensor([float(value) for value in theirs]))
            differences.append((ours - scores[-1]).abs())
        all_differences, all_scores = torch.cat(differences), torch.cat(scores)
        return LogprobReport(
            tokens=all_differences.numel(),
            max_abs_diff=float(all_differences.max()),
            mean_abs_diff=float(all_differences.mean()),
            threshold=threshold,
            mean_logprob=float(all_scores.mean()),
        )

    def judge(self, prompt: str, prompt_ids: Sequence[int], answer: dict[str, Any]) -> CanaryAnswer:
        """Judge one answer of the engine.

        Args:
            prompt: the question.
            prompt_ids: its tokens by the export's tokenizer and template.
            answer: the probe's `prompt_ids`, `token_ids` and `text`.
        """
        tokens: list[int] = answer["token_ids"]
        same_prompt = list(prompt_ids) == list(answer["prompt_ids"])
        agreeing = self._agreeing(list(prompt_ids), tokens) if same_prompt and tokens else 0
        return CanaryAnswer(
            prompt=prompt,
            answer=answer["text"],
            tokens=len(tokens),
            agreeing_tokens=agreeing,
            verdict=_verdict(answer["text"], tokens, same_prompt, agreeing),
        )

    def _agreeing(self, prompt_ids: list[int], tokens: list[int]) -> int:
        """Leading tokens that are this model's greedy choice; a tie counts as agreement."""
        table = self.logprobs(prompt_ids + tokens)[len(prompt_ids) - 1 : -1]  # (answer, V)
        chosen = table.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        greedy = (table.amax(dim=1) - chosen) <= _TIE_NATS
        return len(tokens) if bool(greedy.all()) else int((~greedy).nonzero()[0])


def _verdict(text: str, tokens: list[int], same_prompt: bool, agreeing: int) -> Any:
    if not same_prompt:
        return "prompt-differs"
    if not tokens or not text.strip():
        return "empty"
    most = max(tokens.count(token) for token in set(tokens))
    if len(tokens) >= _DEGENERATE_FROM and most >= _DEGENERATE_SHARE * len(tokens):
        return "degenerate"
    return "ok" if agreeing == len(tokens) else "differs"
