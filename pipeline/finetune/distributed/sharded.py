"""What the training loop and the stage ask of a method on a sharded model, beside what they ask of every method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

from pipeline.finetune.method import Method
from pipeline.finetune.weights import Weights


class ShardedMethod(Method, Protocol):
    """A method in one of several processes.

    Attributes:
        experts: names of the trained layers that belong to an expert, which tokens may not reach.
        replicas: number of replicas of the parameters, whose processes compute the same steps.
    """

    experts: tuple[str, ...] = ()
    replicas: int = 1

    def observed_experts(self, see: Callable[[str], None]) -> AbstractContextManager[None]:
        """A context in which `see` is called with the name of each of `experts` that is used."""
        return nullcontext()

    def trained_in(self, name: str) -> list[nn.Parameter]:
        """The trained parameters of one of `experts`."""

    def collect(self) -> tuple[Weights, dict[str, Tensor]]:
        """The deployed weights, and the adapter; empty but in the main process, though all must take part."""

    def spill_bytes(self) -> int:
        """Bytes that `collect` has still to write next to the checkpoints."""
