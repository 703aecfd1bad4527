"""How to interpret a vision model's outputs: class probabilities, one probability per label, or plain numbers.

The interpretation follows from the loss that the model was trained with, and is stored with the model. Servers use it
to turn logits into probabilities, and gates use it to check whether two models give the same answer.

This module is imported for the command-line options, and servers have no torch, so it imports numpy and torch only when
they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from fp8pipe.core.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# softmax: mutually exclusive classes; sigmoid: independent labels, any number of which may apply; none: plain numbers.
Activation = Literal["softmax", "sigmoid", "none"]
ACTIVATIONS: Final[tuple[Activation, ...]] = get_args(Activation)

# The activation for each value of transformers' `problem_type`, which states the loss that the head was trained with.
_OF_PROBLEM: Final[Mapping[str, Activation]] = {
    "single_label_classification": "softmax", "multi_label_classification": "sigmoid", "regression": "none",
}  # fmt: skip
# Outputs that are not ranked classes agree if their distance is at most this fraction of the spread between images.
_LARGEST_SHARE: Final = 0.5


def activation_of(outputs: int, problem: str | None = None) -> Activation:
    """The activation that turns the outputs of a classification head into probabilities.

    Without a problem type, a single output is treated as a plain number, because there is no second class to compare it
    with: transformers trains such a head as a regression, and timm's files do not state the loss.

    Args:
        outputs: number of outputs of the head.
        problem: transformers' `problem_type`; None if the model has none.

    Raises:
        ConfigurationError: the problem type is unknown.
    """
    if problem is not None and problem not in _OF_PROBLEM:
        raise ConfigurationError(
            f"the problem_type {problem!r} is unknown, so nothing says how its outputs are read",
            why=f"it may be {', '.join(_OF_PROBLEM)}", fix="correct it in config.json",
        )  # fmt: skip
    found = "softmax" if problem is None else _OF_PROBLEM[problem]
    return "none" if found == "softmax" and outputs == 1 else found


def ranks(activation: Activation, outputs: int) -> bool:
    """Whether the class with the largest output is the prediction, as with two or more mutually exclusive classes."""
    return activation == "softmax" and outputs > 1


def probabilities(logits: np.ndarray, activation: Activation) -> np.ndarray:
    """Turn logits (n, C) float32 into probabilities (n, C) float32.

    Raises:
        ValueError: the activation is "none", so the outputs are not logits.
    """
    import numpy as np

    if activation == "none":
        raise ValueError("these outputs are values, not logits of classes")
    if activation == "sigmoid":
        shares: np.ndarray = np.exp(-np.abs(logits))  # at most 1 for any logit
        shares = np.where(logits >= 0, 1 / (1 + shares), shares / (1 + shares)).astype(np.float32)
        return shares
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def agreeing(expected: Tensor, found: Tensor, activation: Activation) -> Tensor:
    """For each image, whether two models give the same answer.

    Ranked classes (see `ranks`) agree if the same output is the largest. Other outputs agree if their distance is at
    most half of the spread between images (root mean square distance of `expected` from its mean over the images, or
    from zero for a single image). Images with non-finite outputs do not agree.

    Args:
        expected: outputs of the reference model, `(N, C)`.
        found: outputs of the other model, `(N, C)`.
        activation: how the outputs are interpreted.

    Returns:
        Boolean tensor `(N,)`.
    """
    finite: Tensor = expected.isfinite().all(1) & found.isfinite().all(1)
    if ranks(activation, expected.shape[1]):
        return (expected.argmax(1) == found.argmax(1)) & finite
    varying = expected - expected.mean(0) if len(expected) > 1 else expected
    spread: Any = varying.double().square().sum(1).mean().sqrt()
    distance = (found.double() - expected.double()).norm(dim=1)
    near: Tensor = distance <= _LARGEST_SHARE * spread
    return near & finite
