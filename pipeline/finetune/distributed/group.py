"""The process group of a run, and how its processes take turns, agree, and exchange values."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from fp8pipe.core.devices import use_own_gpu
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError, GateFailedError, InterruptedRunError, first_line
from fp8pipe.core.launch import GRACE_S, MEETING, RankContext, within
from fp8pipe.core.rank_store import Heartbeats
from fp8pipe.core.silence import SilenceWatch

if TYPE_CHECKING:
    from pipeline.finetune.distributed.processes import SeveralProcesses

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
# Only for what nothing else ends, such as a cut between two machines that both reach the store: a computation that
# takes longer between two operations is taken for stuck.
_TIMEOUT: Final = timedelta(minutes=30)
_POLL_S: Final = 0.1
_runs = itertools.count()  # of this process: a script may call for several, in the same order in all processes


class Group:
    """The processes of a run.

    Args:
        place: the place of this process.
        device: `cpu` or `cuda`.
        store: the key-value store of this run alone.

    Attributes:
        rank: number of this process.
        size: number of processes.
        mesh: all processes in one dimension.
    """

    def __init__(self, place: RankContext, device: str, store: Store) -> None:
        self.device, self.store, self._place = device, store, place
        self.rank, self.size = place.rank, place.size
        self.mesh: DeviceMesh = init_device_mesh(device, (place.size,))
        self._turns = 0

    def in_turn(self, function: Callable[[], T]) -> T:
        """The result of `function`, which rank 0 runs before the others do, however long that takes."""
        self._turns += 1
        key = f"turn/{self._turns}"
        if self.rank == 0:
            result = function()
            self.store.set(key, "over")
            return result
        self.wait(key)
        return function()

    def wait(self, key: str) -> None:
        """Wait until rank 0 has set this key of the store; unlike in a collective operation, for any time.

        Raises:
            InterruptedRunError: a process has failed; the message names its rank.
        """
        while not self.store.check([key]):
            if failed := self._place.failed():
                raise _given_up(f"rank {failed[0]} has failed", failed[0])
            time.sleep(_POLL_S)

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values`, of any dtype and shape, over all processes, on the CPU."""
        summed = values.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.cpu()

    def all_gather_object(self, value: T) -> list[T]:
        """`value` of each process, by rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def require_same(self, value: object, what: str) -> None:
        """Make sure that `value` is the same in all processes.

        Raises:
            ConfigurationError: it differs; the message names the ranks.
        """
        found = self.all_gather_object(repr(value))
        if others := [rank for rank, one in enumerate(found) if one != found[0]]:
            raise ConfigurationError(
                f"{what} differs between the processes of this run",
                why=f"rank 0 has {_brief(found[0], found[others[0]])}; rank {others[0]} has "
                f"{_brief(found[others[0]], found[0])}",
                fix="give every process the same options, files and versions of packages",
            )

    def require_equal(self, tensors: dict[str, Tensor]) -> None:
        """Make sure that tensors that every process has computed are the same everywhere, bit for bit.

        Raises:
            GateFailedError: they differ; the message names the first tensor that does.
        """
        found = self.all_gather_object({name: _digest(tensor) for name, tensor in tensors.items()})
        for name in tensors:
            if others := [rank for rank, one in enumerate(found) if one[name] != found[0][name]]:
                raise GateFailedError(
                    f"{name} is not the same in all processes",
                    why=f"ranks {', '.join(map(str, others))} have other bits than rank 0 (sha256)",
                    fix="use GPUs of one kind; if they are, check them for errors. --resume goes back to the last "
                    "checkpoint",
                )


@contextmanager
def joined(place: RankContext, device: str) -> Iterator[SeveralProcesses]:
    """The processes of a run on `device`, one of its devices for each process, for as long as the context lasts.

    Of an error in this context, the other processes are told. The process group is then left as it is, as to destroy
    it would wait for operations that are pending, so no other run can follow.

    Raises:
        ConfigurationError: the script has made a process group of its own, or the processes cannot connect.
        InterruptedRunError: a process has failed, now or in an earlier run of this one.
        MissingCapabilityError: there are more processes on this machine than GPUs.
    """
    if failed := place.failed():
        earlier = dist.is_initialized()
        what = "an earlier run of this process failed" if earlier else f"rank {failed[0]} has failed"
        raise _given_up(what, failed[0])
    store: Any = PrefixStore(f"fp8pipe/run/{next(_runs)}", place.store)  # its annotations are incomplete
    try:
        needed = range(place.size) if place.rank == 0 else (0, place.rank)
        with (
            Heartbeats(store, place.rank, needed) as heartbeats,
            SilenceWatch(place, heartbeats, needed) as watch,
            _connected(place, device, store) as group,
        ):
            from pipeline.finetune.distributed.processes import SeveralProcesses

            watch.hosts = group.all_gather_object(platform.node())
            yield SeveralProcesses(group)
    except BaseException as error:
        code = error.exit_code if isinstance(error, Fp8PipeError) else 1
        with contextlib.suppress(RuntimeError, TimeoutError):  # the store may be gone, or cut off; the error says more
            within(GRACE_S, lambda: place.fail(code))
        raise


@contextmanager
def _connected(place: RankContext, device: str, store: Store) -> Iterator[Group]:
    own = use_own_gpu(place.local) if device == "cuda" else None
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if dist.is_initialized():
        raise ConfigurationError(
            "a process group exists already",
            why="this script has called torch.distributed.init_process_group",
            fix="leave that to fp8pipe, or call destroy_process_group before",
        )
    try:
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=MEETING, device_id=own
        )
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):  # what gloo cannot do if it listens on an interface of another network
            raise
        raise ConfigurationError(
            "the processes of this run cannot connect to each other",
            why=first_line(error),
            fix="set GLOO_SOCKET_IFNAME, on each machine, to the network interface that the other machines reach (and "
            "NCCL_SOCKET_IFNAME for GPUs); see docs/distributed.md",
        ) from error
    _set_pg_timeout(_TIMEOUT)  # gloo has one timeout for both, and a packet to a wrong interface may vanish
    _LOG.info("%d processes, connected by %s", place.size, backend)
    yield Group(place, device, store)
    dist.barrier()  # rank 0 may hold the store, so it must not leave first
    dist.destroy_process_group()


def _given_up(what: str, rank: int) -> InterruptedRunError:
    return InterruptedRunError(
        what,
        why=f"rank {rank} of this launch has failed, and the others cannot go on without it",
        fix=f"see the error of rank {rank}, and start the processes again; resume continues from the last checkpoint",
    )


def _digest(tensor: Tensor) -> str:
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(values).hexdigest()


def _brief(mine: str, other: str) -> str:
    """The place at which a text begins to differ from another one."""
    start = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    return f"...{mine[max(0, start - 40) : start + 40]}..."
