"""Losses of a language model on texts that have nothing to do with its training data: what tuning has made it forget.

The texts come with Python and with packages that are installed in any case: prose (the language reference in
`pydoc_data`), program code (modules of the standard library), and a licence (that of transformers).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import pydoc_data.topics
import typing

import torch
from torch.nn import functional

ROWS, TOKENS = 8, 256  # of each text


def texts():
    """The texts by name."""
    licence = next(file for file in importlib.metadata.files("transformers") if file.name == "LICENSE")
    return {
        "prose": "\n".join(pydoc_data.topics.topics.values()),
        "code": inspect.getsource(argparse) + inspect.getsource(typing),
        "licence": licence.read_text(),
    }


@torch.no_grad()
def unrelated_losses(model, tokenizer):
    """Nats per token of each text, by its name; of the first tokens that fill `ROWS` rows.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
    """
    found = {}
    for name, text in texts().items():
        ids = tokenizer(text[: 20 * ROWS * TOKENS], return_tensors="pt").input_ids[0, : ROWS * TOKENS]
        rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        found[name] = float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    return found
