"""Work that a Ray cluster shares: actors load the inputs once, and then compute items of any job.

An actor that is lost, with its node or alone, is replaced once Ray finds room for another, and its item is computed
again. The process that runs the command computes none. Nodes need the same fp8pipe, and the same model and pictures
under the same paths or hub ids.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.ray_cluster import connect, describe, described_error
from fp8pipe.core.work import Item, Job

__all__ = ["RayPool", "actors_that_fit"]

_LOG = logging.getLogger(__name__)
_START_S: Final = 300.0  # in which Ray must have started an actor when there is none
_REPORT_S: Final = 60.0
_LOSSES: Final = 3  # an actor that is lost this often without having finished an item is not replaced
_SHOWN: Final = 300  # characters of a cause, from its end


@dataclass(eq=False, slots=True)
class _Slot:
    """Room for one actor.

    Attributes:
        actor: Ray's handle.
        started: whether the actor has a process, on a node.
        losses: how many actors were lost here since one finished an item.
    """

    actor: Any
    started: bool = False
    losses: int = 0


@dataclass(frozen=True, slots=True)
class _Call:
    slot: _Slot
    what: str  # start, load or compute
    number: int = 0  # of the item to compute


class RayPool:
    """A pool of actors in a Ray cluster, one per GPU or per `threads` CPUs of a node; a context manager that ends them.

    Args:
        address: `auto` for the cluster that this machine belongs to, `local` for one that is started on this machine,
            or `ray://HOST:PORT`.
        load: loads the inputs in an actor, and returns a function that prepares a job. It is pickled.
        threads: CPU threads that an item is computed with.
        gpu: whether an actor computes on a GPU.
        start_s: how long `results` waits for a first actor that can compute, in seconds.

    Raises:
        MissingCapabilityError: Ray is not installed, the cluster cannot be reached, or it has nothing to compute on.
    """

    def __init__(
        self, address: str, load: Callable[[], Callable[[Job], Item]], *, threads: int, gpu: bool,
        start_s: float = _START_S,
    ) -> None:  # fmt: skip
        ray = connect(address)
        self._ray, self._address, self._load, self._start_s = ray, address, load, start_s
        count = actors_that_fit(ray.nodes(), "GPU" if gpu else "CPU", 1 if gpu else threads)
        if not count:
            ray.shutdown()
            raise MissingCapabilityError(
                f"the Ray cluster {address} cannot compute",
                why="no node has a GPU that it offers to Ray" if gpu else f"no node offers {threads} CPUs",
                fix="add such nodes to the cluster, or use --device cpu" if gpu else "set OMP_NUM_THREADS to fewer",
            )
        options: dict[str, Any] = {"num_gpus": 1} if gpu else {"num_cpus": threads}
        # Lost actors are replaced here: calls of one that Ray starts again would wait until it finds room.
        self._kind = ray.remote(max_restarts=0, max_task_retries=0, **options)(_Actor)
        self._slots = [_Slot(self._kind.remote(load)) for _ in range(count)]
        self._idle: list[_Slot] = []
        self._calls = {slot.actor.start.remote(): _Call(slot, "start") for slot in self._slots}
        self._alive_at = time.monotonic()  # when an actor was last known to have started
        _LOG.info("Ray cluster %s: room for %d actors", address, count)

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()

    def results(self, job: Job, item: Item) -> Iterator[tuple[int, bytes]]:
        """Number and result of each item, in the order in which they are finished; see `WorkPool`.

        Raises:
            MissingCapabilityError: Ray starts no actor, or loses all of them.
        """
        shared, waiting, left = self._ray.put(job), list(range(job.count))[::-1], job.count
        self._alive_at = time.monotonic()
        while left:
            while waiting and self._idle:
                slot, number = self._idle.pop(), waiting.pop()
                self._calls[slot.actor.compute.remote(shared, number)] = _Call(slot, "compute", number)
            ended = self._ended()
            if ended is None:
                continue
            call, result = ended
            if result is None:
                waiting.append(call.number)
            else:
                left -= 1
                yield call.number, result

    def _ended(self) -> tuple[_Call, bytes | None] | None:
        """Wait for a call; if it is that of an item, return it and its result, which is None if its actor was lost."""
        ray = self._ray
        done, _ = ray.wait(list(self._calls), timeout=min(_REPORT_S, self._start_s))
        if not done:
            self._check_started()
            return None
        call = self._calls.pop(done[0])
        slot = call.slot
        try:
            result, error = ray.get(done[0])
        except ray.exceptions.RayError as lost:
            self._replace(slot, lost)
            return (call, None) if call.what == "compute" else None
        if error:
            raise described_error(error, "a node of the Ray cluster")
        slot.started = True
        if call.what == "start":
            self._calls[slot.actor.load.remote()] = _Call(slot, "load")
            return None
        self._idle.append(slot)
        if call.what == "load":
            return None
        slot.losses = 0
        return call, result

    def _check_started(self) -> None:
        now, count = time.monotonic(), len(self._slots)
        if any(slot.started for slot in self._slots):
            self._alive_at = now
        elif now - self._alive_at < self._start_s:
            _LOG.warning("the Ray cluster %s has started none of %d actors yet", self._address, count)
        else:
            raise MissingCapabilityError(
                f"the Ray cluster {self._address} has started none of {count} actors",
                why=f"for {self._start_s:.0f} s no node had room for one: other jobs hold devices, or nodes are lost",
                fix="see `ray status`; wait for the other jobs, or add nodes; --resume continues from what is done",
            )

    def _replace(self, slot: _Slot, lost: Exception) -> None:
        """Start another actor for a lost one, unless too many were lost in its place."""
        why = " ".join(str(lost).split())[-_SHOWN:]
        slot.started, slot.losses = False, slot.losses + 1
        self._ray.kill(slot.actor)  # one that only cannot be reached would keep its devices
        self._alive_at = time.monotonic()
        if slot.losses < _LOSSES:
            _LOG.warning("a Ray actor was lost and is replaced; its item is computed again: %s", why)
            slot.actor = self._kind.remote(self._load)
            self._calls[slot.actor.start.remote()] = _Call(slot, "start")
            return
        self._slots.remove(slot)
        _LOG.warning("a Ray actor was lost %d times, and is not replaced; %d remain", _LOSSES, len(self._slots))
        if not self._slots:
            raise MissingCapabilityError(
                f"the Ray cluster {self._address} has lost all actors",
                why=why,
                fix="see the logs of its nodes; each needs the same fp8pipe, and memory for the model and a batch",
            )


class _Actor:
    """Computes items in a process of the cluster. Each method returns a result, and the error if there was one."""

    def __init__(self, load: Callable[[], Callable[[Job], Item]]) -> None:
        self._load = load
        self._begin: Callable[[Job], Item] | None = None
        self._current: tuple[Job, Item] | None = None

    def start(self) -> tuple[bytes, str]:
        """Tell that the actor has started."""
        return b"", ""

    def load(self) -> tuple[bytes, str]:
        """Load the inputs."""
        try:
            self._begin = self._load()
        except Exception as error:
            return b"", describe(error)
        return b"", ""

    def compute(self, job: Job, number: int) -> tuple[bytes, str]:
        """Compute an item, after `load`."""
        try:
            if self._current is None or self._current[0] != job:
                assert self._begin is not None
                self._current = (job, self._begin(job))
            return self._current[1](number), ""
        except Exception as error:
            return b"", describe(error)


def actors_that_fit(nodes: Iterable[Mapping[str, Any]], kind: str, each: int) -> int:
    """How many actors fit into a cluster if nothing else runs there; an actor cannot use two nodes.

    Args:
        nodes: what `ray.nodes()` returns.
        kind: the resource that an actor needs, `CPU` or `GPU`.
        each: how much of it.
    """
    return sum(int(node["Resources"].get(kind, 0)) // each for node in nodes if node["Alive"])
