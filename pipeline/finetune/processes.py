"""The processes of a run: here one, which does everything itself; `distributed.processes` implements several.

The stage asks this interface wherever it matters that others take part: who writes, who waits, and what is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from fp8pipe.artifact import Artifact, ArtifactWriter
from pipeline.falqon.method import FalqonMethod
from pipeline.falqon.nvfp4_method import Nvfp4Method
from pipeline.finetune.batches import Batches
from pipeline.finetune.checkpoint import CheckpointStore
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loop import Trainer
from pipeline.finetune.lora_nvfp4 import Nvfp4LoraMethod
from pipeline.finetune.loss import heldout_loss
from pipeline.finetune.method import LoraMethod, Method
from pipeline.finetune.weights import Weights

T = TypeVar("T")


def build_method(
    config: FinetuneConfig,
    falqon: Callable[..., FalqonMethod] = FalqonMethod,
    lora: Callable[..., LoraMethod] = LoraMethod,
) -> Method:
    """Create the configured training method, by calling `falqon` or `lora` with the arguments of their defaults."""
    if config.method == "falqon":
        how = config.initialisation or config.rule.initialisation
        of_falqon = Nvfp4Method if config.precision == "nvfp4" else falqon
        return of_falqon(config.rule, rank=config.rank, rows=config.rows, initialisation=how, seed=config.seed)
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    of_lora = Nvfp4LoraMethod if config.precision == "nvfp4" else lora
    return of_lora(rank=config.rank, alpha=alpha, seed=config.seed, quantized=config.method == "qlora")


class RunWriter(Protocol):
    """What every process does with the writer of the artifact; only the main one has an `ArtifactWriter`.

    Attributes:
        output: final directory of the artifact.
        root: directory in which it is written.
    """

    output: Path
    root: Path

    def __enter__(self) -> RunWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

    def warn(self, message: str) -> None:
        """See `ArtifactWriter.warn`."""


class Processes:
    """One process.

    Attributes:
        size: number of processes.
        main: whether this is the process that writes and prints.
        facts: what the manifest says about the processes, beside its other facts on the runtime.
    """

    size: int = 1
    main: bool = True
    facts: dict[str, Any] = {}  # noqa: RUF012

    def check(self, config: FinetuneConfig) -> None:
        """Refuse a configuration that these processes cannot run.

        Raises:
            ConfigurationError: it is refused; never in one process.
        """

    def in_turn(self, function: Callable[[], T]) -> T:
        """The result of `function`, which the main process runs before the others do."""
        return function()

    def same(self, value: T, what: str) -> T:
        """`value`, after making sure that it is the same in all processes; `what` names it in messages.

        Raises:
            ConfigurationError: it differs between processes.
        """
        return value

    def writer(self, output: Path, **options: Any) -> RunWriter:
        """The writer of the artifact; see `ArtifactWriter` for the options."""
        return ArtifactWriter(output, **options)

    def method(self, config: FinetuneConfig, store: CheckpointStore) -> Method:
        """The configured training method."""
        return build_method(config)

    def trainer(
        self, config: FinetuneConfig, model: nn.Module, method: Method, train: Batches, heldout: Batches,
        store: CheckpointStore, metrics_file: Path,
    ) -> Trainer:  # fmt: skip
        """The trainer of the prepared model."""
        return Trainer(config, model, method, train, heldout, store, metrics_file)

    def heldout_loss(self, model: nn.Module, heldout: Batches, device: str) -> float:
        """See `loss.heldout_loss`; over all batches of an epoch."""
        return heldout_loss(model, (heldout.at(i) for i in range(len(heldout))), device)

    def results(self, method: Method) -> tuple[Weights, dict[str, Tensor]]:
        """The deployed weights and the adapter; in processes that do not write, nothing."""
        return method.deployed_weights(), method.adapter()

    def spill_bytes(self, method: Method) -> int:
        """Bytes of files that `results` has still to write next to the checkpoints, while these are there."""
        return 0

    def finished(self, write: Callable[[], Artifact], output: Path) -> Artifact:
        """The artifact that the main process writes with `write`."""
        return write()


@contextmanager
def processes_of(config: FinetuneConfig) -> Iterator[Processes]:
    """The processes of this run, for as long as the context lasts: several if a launcher such as torchrun started them.

    Raises:
        ConfigurationError: several processes cannot run this configuration.
        MissingCapabilityError: there are more processes on this machine than GPUs.
    """
    from fp8pipe.core.launch import launched

    place = launched()
    if place is None:
        yield Processes()
        return
    from pipeline.finetune.distributed.group import joined

    with joined(place, config.device) as processes:
        processes.check(config)
        yield processes
