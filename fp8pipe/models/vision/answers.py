"""How to interpret a model's outputs: class probabilities, one probability per label, or plain numbers.

This follows from the model's training loss and is stored with the model. It is used by servers, which turn logits into
probabilities, and by every gate that checks whether two models give the same answer.

Option models import this module, so numpy and torch are imported only when used; a server needs no torch.
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

# transformers' `problem_type`, which names the loss that the head was trained with.
_OF_PROBLEM: Final[Mapping[str, Activation]] = {
    "single_label_classification": "softmax", "multi_label_classification": "sigmoid", "regression": "none",
}  # fmt: skip
# Outputs without classes agree if they differ by less than this share of the spread between images.
_LARGEST_SHARE: Final = 0.5


def activation_of(outputs: int, problem: str | None = None) -> Activation:
    """The activation that turns the outputs of a classification head into probabilities.

    A single output has no other class to compare with, so unless a problem type is given it is taken as a plain number:
    transformers trains such a head as a regression, and timm does not say.

    Args:
        outputs: number of outputs of the head.
        problem: transformers' `problem_type`; None if it is not given.

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
    """Whether the largest output is the answer: true for two or more mutually exclusive classes."""
    return activation == "softmax" and outputs > 1


def probabilities(logits: np.ndarray, activation: Activation) -> np.ndarray:
    """(n, C) float32 logits -> (n, C) float32 probabilities.

    Raises:
        ValueError: the outputs are plain numbers.
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
    """Which images have the same answer, boolean `(N,)`, from outputs `(N, C)`.

    With ranked classes: the same largest output. Otherwise: outputs that differ by less than half of the spread between
    images (root mean square distance of `expected` from its mean, or from zero for a single image). Non-finite outputs
    agree with nothing.
    """
    finite: Tensor = expected.isfinite().all(1) & found.isfinite().all(1)
    if ranks(activation, expected.shape[1]):
        return (expected.argmax(1) == found.argmax(1)) & finite
    varying = expected - expected.mean(0) if len(expected) > 1 else expected
    spread: Any = varying.double().square().sum(1).mean().sqrt()
    distance = (found.double() - expected.double()).norm(dim=1)
    near: Tensor = distance <= _LARGEST_SHARE * spread
    return near & finite
