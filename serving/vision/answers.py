"""From the engine's logits to what a client reads: the best classes, with probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np

from serving.http.problems import Problem

__all__ = ["class_answers", "probabilities", "read_top_k"]

_TOP_K = 5


def read_top_k(value: Any, classes: int) -> int:
    """How many classes; 5 where nothing was said.

    Raises:
        Problem: 400, no whole number from 1 on.
    """
    if value is None:
        return min(_TOP_K, classes)
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not (text.isascii() and text.isdigit()) or len(text) > 6 or int(text) < 1:
        raise Problem(
            400, "invalid_top_k", "top_k must be a whole number from 1 on", f"the model has {classes} classes"
        )
    return min(int(text), classes)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax in float32: (n, C) -> (n, C)."""
    shares: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def class_answers(logits: np.ndarray, classes: tuple[str, ...], top_k: int) -> list[dict[str, Any]]:
    """The best classes of each image, ties in the order of the classes."""
    shares = probabilities(logits)
    best = np.argsort(-shares, axis=1, kind="stable")[:, :top_k]
    return [
        {"classes": [{"index": int(i), "name": classes[i], "probability": float(row[i])} for i in order]}
        for row, order in zip(shares, best, strict=True)
    ]
