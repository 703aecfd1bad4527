"""Trains a two-layer Llama on the CPU and on a device, from the same codes and on the same text, and compares both."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fp8pipe.models.compat import import_transformers
from pipeline.falqon.method import FalqonMethod
from pipeline.falqon.rules import Initialisation, update_rule
from pipeline.finetune.loss import answer_count, answer_loss

_BATCH, _LENGTH, _VOCABULARY = 8, 48, 64


def build(device: torch.device) -> Any:
    """A two-layer Llama in bf16 on `device`, with random weights from a fixed seed."""
    transformers = import_transformers()
    settings = transformers.LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(settings).to(torch.bfloat16).to(device)


def text(seed: int) -> Tensor:
    """Token ids `(8, 48)` in a pattern that can be learned: each row counts up in constant steps, modulo 64."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randint(0, _VOCABULARY, (_BATCH, 1), generator=random)
    return (start + torch.arange(_LENGTH) * torch.randint(1, 4, (_BATCH, 1), generator=random)) % _VOCABULARY


def train(method: FalqonMethod, model: Any, device: torch.device, steps: int) -> list[float]:
    """Train for `steps` steps, then merge the adapter into the codes; returns the loss of each step."""
    model.train()
    optimizer = torch.optim.AdamW(list(method.parameters().values()), lr=2e-3, fused=True)
    losses = []
    for step in range(steps):
        ids = text(step % 4)
        loss = answer_loss(model, {"input_ids": ids.to(device)}, ids, float(answer_count(ids)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step, measure=False)
        losses.append(float(loss.detach()))
    model.eval()
    method.finish(model, lambda: [{"input_ids": text(seed).to(device)} for seed in range(4)])
    return losses


def compare(rule_name: str, device: torch.device, steps: int) -> dict[str, Any]:
    """Train with an update rule on the CPU and on the device, and compare loss curves and final codes.

    Returns:
        `loss_difference`: largest difference between the loss curves, nats; `first_loss`, `last_loss`: on the device;
        `codes_changed`: share of codes that training changed on the CPU; `codes_agreeing`: share of final codes that
        are equal on both; `changes_agreeing`: the same among codes that changed on either; `losses`: both curves;
        `passed`: whether the curves agree and the loss decreased.
    """
    losses, ends, start = {}, {}, None
    for where, place in {"cpu": torch.device("cpu"), "device": device}.items():
        model = build(torch.device("cpu"))
        rule = update_rule(rule_name)
        method = FalqonMethod(rule, rank=8, rows=None, initialisation=Initialisation.RANDOMIZED_SVD, seed=0)
        method.prepare(model)
        if start is None:
            start = copy.deepcopy(_codes(method))
        losses[where] = train(method, model.to(place), place, steps)
        ends[where] = _codes(method)
    assert start is not None
    here, there = ends["cpu"], ends["device"]
    either = (here != start) | (there != start)
    agreeing = here == there
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    first, last = losses["device"][0], losses["device"][-1]
    return {
        "loss_difference": difference, "first_loss": first, "last_loss": last,
        "codes_changed": _share(here != start), "codes_agreeing": _share(agreeing),
        "changes_agreeing": _share(agreeing[either]), "losses": losses,
        # bf16 activations may differ in their last bit (2^-8), and the differences accumulate over steps.
        "passed": difference <= 0.02 * first and last < first,
    }  # fmt: skip


def _codes(method: FalqonMethod) -> Tensor:
    """The weight codes of all layers, uint8, one-dimensional, on the CPU."""
    return torch.cat([layer.weight_codes.cpu().view(torch.uint8).flatten() for layer in method.layers.values()])


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else 1.0
