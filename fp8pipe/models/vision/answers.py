"""What the outputs of a model mean: shares of classes, a probability for each label by itself, or plain numbers.

Which of them is a fact of the model (its training loss) and is stored with it. Every reader asks here: a server that
turns logits into probabilities, and every gate that asks whether two models give the same answer.

Option models are made of this, so neither numpy nor torch is imported before it is used; a server needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from fp8pipe.core.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# softmax: classes that exclude each other; sigmoid: labels of which any number may hold; none: numbers as they are.
Activation = Literal["softmax", "sigmoid", "none"]
ACTIVATIONS: Final[tuple[Activation, ...]] = get_args(Activation)

# transformers' `problem_type`, which names the loss that a head was trained with.
_OF_PROBLEM: Final[Mapping[str, Activation]] = {
    "single_label_classification": "softmax", "multi_label_classification": "sigmoid", "regression": "none",
}  # fmt: skip
# Outputs that have no classes agree where they differ by less than this share of what sets images apart.
_LARGEST_SHARE: Final = 0.5


def activation_of(outputs: int, problem: str | None = None) -> Activation:
    """What turns the outputs of a classifying head into probabilities.

    One output has nothing to be compared with, so without a stated problem its value is all there is: transformers
    trains such a head as a regression, and timm does not say.

    Args:
        outputs: number of outputs of the head.
        problem: transformers' `problem_type`; None where nothing was said.

    Raises:
        ConfigurationError: an unknown problem.
    """
    if problem is not None and problem not in _OF_PROBLEM:
        raise ConfigurationError(
            f"the problem_type {problem!r} is unknown, so nothing says how its outputs are read",
            why=f"it may be {', '.join(_OF_PROBLEM)}", fix="correct it in config.json",
        )  # fmt: skip
    found = "softmax" if problem is None else _OF_PROBLEM[problem]
    return "none" if found == "softmax" and outputs == 1 else found


def ranks(activation: Activation, outputs: int) -> bool:
    """Whether the largest output is the answer: with classes that exclude each other, and at least two of them."""
    return activation == "softmax" and outputs > 1


def probabilities(logits: np.ndarray, activation: Activation) -> np.ndarray:
    """(n, C) float32 logits -> (n, C) float32 probabilities.

    Raises:
        ValueError: the outputs are plain numbers.
    """
    import numpy as np

    if activation == "none":
        raise ValueError("these outputs are numbers, and no logits of classes")
    if activation == "sigmoid":
        shares: np.ndarray = np.exp(-np.abs(logits))  # never above 1, whatever the logit is
        shares = np.where(logits >= 0, 1 / (1 + shares), shares / (1 + shares)).astype(np.float32)
        return shares
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def agreeing(expected: Tensor, found: Tensor, activation: Activation) -> Tensor:
    """Which images have the same answer, boolean `(N,)`, of outputs `(N, C)`.

    Where classes are ranked: the same largest output. Elsewhere: outputs that differ by less than half of what sets the
    images apart (root mean square distance of `expected` from its mean; from zero where there is one image). Outputs
    that are not finite agree with nothing.
    """
    finite: Tensor = expected.isfinite().all(1) & found.isfinite().all(1)
    if ranks(activation, expected.shape[1]):
        return (expected.argmax(1) == found.argmax(1)) & finite
    varying = expected - expected.mean(0) if len(expected) > 1 else expected
    spread: Any = varying.double().square().sum(1).mean().sqrt()
    distance = (found.double() - expected.double()).norm(dim=1)
    near: Tensor = distance <= _LARGEST_SHARE * spread
    return near & finite
