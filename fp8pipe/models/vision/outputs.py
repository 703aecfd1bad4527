"""One way to call every vision model: pixels in, (N, C) out, whatever object its library returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fp8pipe.core.errors import ConfigurationError

__all__ = ["class_count", "vision_outputs"]


def vision_outputs(model: nn.Module, pixels: Tensor) -> Tensor:
    """Logits of a classifier, pooled features of a backbone.

    Args:
        model: a timm or transformers vision model, in eval mode.
        pixels: (N, 3, H, W), normalized.

    Returns:
        (N, C), the model's own tensor (not a copy).

    Raises:
        ConfigurationError: the model returns something else.
    """
    outputs = model(pixels)
    found = outputs if isinstance(outputs, Tensor) else _of_transformers(outputs)
    if found is None or found.ndim != 2:
        shape = "nothing of that kind" if found is None else f"shape {tuple(found.shape)}"
        raise ConfigurationError(
            f"{type(model).__name__} gives neither logits nor pooled features",
            why=f"expected one vector an image, found {shape}",
            fix="use an image classifier, or a backbone that pools its tokens",
        )
    return found


def class_count(model: nn.Module) -> int | None:
    """The number of classes of a classifier; None for a backbone."""
    if type(model).__name__.endswith(("ForImageClassification", "ForImageClassificationWithTeacher")):
        return int(model.config.num_labels) or None  # type: ignore[union-attr, arg-type]
    count: Any = getattr(model, "num_classes", None)  # timm: 0 without a head
    return count if isinstance(count, int) and count > 0 else None


def _of_transformers(outputs: Any) -> Tensor | None:
    for name in ("logits", "image_embeds", "pooler_output"):
        value = getattr(outputs, name, None)
        if isinstance(value, Tensor):
            return value
    return None
