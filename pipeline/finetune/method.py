"""What the training loop asks of a method, so that FALQON and its baselines run through one and the same loop.

And what else depends on the method: the device (FP8 tensor cores are FALQON's need alone, its baselines compute in
bf16), and what will stand in the way of an export.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fp8pipe.artifact import LayerRecord
from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.models.language.structure import ModelStructure
from pipeline.falqon.final_merge import Inputs
from pipeline.falqon.flush import FlushReport
from pipeline.falqon.gradient import Losses
from pipeline.finetune.deploy import Trained

_SHOWN = 3  # names in a warning
_FP8, _BF16 = (8, 9), (8, 0)  # CUDA compute capabilities


def export_warnings(structure: ModelStructure) -> list[str]:
    """What the FP8 export of a tuned model will refuse, said before hours of training; empty for most models.

    The exporter's linter has the last word, and speaks about a finished checkpoint. This can be told from the
    architecture alone.
    """
    if not (loose := structure.loose):
        return []
    more = ", ..." if len(loose) > _SHOWN else ""
    return [
        f"{len(loose)} matrices belong to no linear layer (stacked experts, for one) and stay as they are: "
        f"{', '.join(loose[:_SHOWN])}{more}. The FP8 export will refuse this model; --format bf16 remains"
    ]


def hardware(method: str, device: str) -> str:
    """What a run needs, in words."""
    if device == "cpu":
        return "a CPU"
    (major, minor), why = (_FP8, "FP8") if method == "falqon" else (_BF16, "bf16")
    return f"a CUDA GPU of compute capability {major}.{minor} or newer ({why})"


def check_device(device: str, method: str = "falqon") -> None:
    """Refuse a device that is not there.

    Raises:
        MissingCapabilityError: CUDA asked for and absent, or too old for the method.
    """
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise MissingCapabilityError(
            "no CUDA device is available", why="torch.cuda.is_available() is false", fix="use --device cpu"
        )
    capability, least = torch.cuda.get_device_capability(), _FP8 if method == "falqon" else _BF16
    if capability < least:
        raise MissingCapabilityError(
            f"{torch.cuda.get_device_name()} cannot run {method}",
            why=f"its compute capability is {capability[0]}.{capability[1]}; {method} needs {hardware(method, device)}",
            fix="use a newer GPU, or --device cpu",
        )


class Method(Trained, Protocol):
    """A way to fine-tune; see `pipeline.falqon.method` and `pipeline.finetune.lora`."""

    def prepare(
        self, model: nn.Module, stored: dict[str, Tensor] | None = None, losses: Losses | None = None
    ) -> list[LayerRecord]:
        """Change `model` in place so that only the method's parameters train.

        Args:
            model: as loaded.
            stored: an earlier `base_state`.
            losses: runs a few training batches on the unprepared model, yielding each one's loss.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """Module paths of the linear layers that train."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by a stable name."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """Context of every forward pass (autocast, or nothing)."""

    def after_step(self, step: int, measure: bool) -> FlushReport | None:
        """Called after the optimizer stepped; a report when something was flushed and `measure` asks for it."""

    def health(self, step: int) -> FlushReport | None:
        """The survival of the buffered update, were it flushed now; None where that has no meaning."""

    def base_state(self) -> dict[str, Tensor]:
        """What preparation computed and steps do not change."""

    def step_state(self) -> dict[str, Tensor]:
        """What steps change, beside the optimizer's own state."""

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Restore `step_state` in place."""

    def finish(self, model: nn.Module, inputs: Inputs) -> dict[str, FlushReport]:
        """Bring the weights into the form that is deployed; what a final merge did, by layer, where there is one."""
