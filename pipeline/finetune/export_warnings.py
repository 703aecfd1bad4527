"""What will stand in the way of an FP8 export, said before hours of training rather than after them.

The exporter's linter has the last word, and speaks about a finished checkpoint. What can be told from the architecture
alone is told here.
"""

from __future__ import annotations

from torch import nn

_KNOWN = (nn.Linear, nn.Embedding)
_SHOWN = 3  # names in a warning


def export_obstacles(model: nn.Module) -> list[str]:
    """Warnings about what the FP8 export of a model tuned from `model` will refuse; empty for most models.

    Args:
        model: as transformers builds it, before any method has changed it; the meta device will do.
    """
    strangers = [
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        if not isinstance(module, _KNOWN) and type(module).__name__ != "Conv1D"
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]
    if not strangers:
        return []
    more = ", ..." if len(strangers) > _SHOWN else ""
    return [
        f"{len(strangers)} matrices belong to no linear layer (stacked experts, for one) and stay as they are: "
        f"{', '.join(strangers[:_SHOWN])}{more}. The FP8 export will refuse this model; --format bf16 remains"
    ]
