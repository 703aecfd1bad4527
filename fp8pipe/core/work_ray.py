"""Work that a Ray cluster shares: actors load the inputs once, and then compute items of any job.

Ray starts the actors of a lost node again, and their items with them. The process that runs the command computes none.
Nodes need the same fp8pipe, and the same model and pictures under the same paths or hub ids.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.core.work import Item, Job, describe, described_error

__all__ = ["RayPool"]

_LOG = logging.getLogger(__name__)
_INSTALL: Final = "python -m pip install 'fp8pipe[ray]'"


class RayPool:
    """A pool of actors in a Ray cluster, one per GPU or per `threads` CPUs; a context manager that frees them.

    Args:
        address: `auto` for the cluster that this machine belongs to, `local` for one that is started on this machine,
            or `ray://HOST:PORT`.
        load: loads the inputs in an actor, and returns a function that prepares a job. It is pickled.
        threads: CPU threads that an item is computed with.
        gpu: whether an actor computes on a GPU.

    Raises:
        MissingCapabilityError: Ray is not installed, the cluster cannot be reached, or it has nothing to compute on.
    """

    def __init__(self, address: str, load: Callable[[], Callable[[Job], Item]], *, threads: int, gpu: bool) -> None:
        ray = _connect(address)
        self._ray = ray
        has = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 0)) // (1 if gpu else threads)
        if not has:
            ray.shutdown()
            raise MissingCapabilityError(
                f"the Ray cluster {address} cannot compute",
                why="no node has a GPU that it offers to Ray" if gpu else f"it offers fewer than {threads} CPUs",
                fix="add such nodes to the cluster, or use --device cpu" if gpu else "set OMP_NUM_THREADS to fewer",
            )
        options: dict[str, Any] = {"num_gpus": 1} if gpu else {"num_cpus": threads}
        kind = ray.remote(max_restarts=-1, max_task_retries=-1, **options)(_Actor)
        self._actors = [kind.remote(load) for _ in range(has)]
        _LOG.info("Ray cluster %s: %d actors", address, has)

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()

    def results(self, job: Job, item: Item) -> Iterator[tuple[int, bytes]]:
        """Number and result of each item, in the order in which they are finished; see `WorkPool`."""
        ray, shared = self._ray, self._ray.put(job)
        waiting, running = list(range(job.count))[::-1], dict[Any, Any]()
        idle = list(self._actors)
        while waiting or running:
            while waiting and idle:
                actor = idle.pop()
                running[actor.compute.remote(shared, waiting.pop())] = actor
            (done, *_), _ = ray.wait(list(running))
            idle.append(running.pop(done))
            number, result, error = ray.get(done)
            if error:
                raise described_error(error, "a node of the Ray cluster")
            yield number, result


class _Actor:
    """Computes items in a process of the cluster."""

    def __init__(self, load: Callable[[], Callable[[Job], Item]]) -> None:
        self._load = load
        self._begin: Callable[[Job], Item] | None = None
        self._current: tuple[Job, Item] | None = None

    def compute(self, job: Job, number: int) -> tuple[int, bytes, str]:
        """The number of an item, its result, and the error if there was one."""
        try:
            self._begin = self._begin or self._load()
            if self._current is None or self._current[0] != job:
                self._current = (job, self._begin(job))
            return number, self._current[1](number), ""
        except Exception as error:
            return number, b"", describe(error)


def _connect(address: str) -> Any:
    """Ray's package, connected to the cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster would report to Ray's authors
    try:
        import ray
    except ImportError as error:
        raise MissingCapabilityError("Ray is not installed", why=str(error), fix=_INSTALL) from error
    started: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, logging_level=logging.WARNING, **started)
    except ValueError as error:
        raise ConfigurationError(
            f"there is no Ray cluster at {address!r}", why=str(error), fix="give auto, local, or ray://HOST:PORT"
        ) from error
    except ConnectionError as error:
        raise MissingCapabilityError(
            f"the Ray cluster at {address!r} cannot be reached",
            why=" ".join(str(error).split())[:300],
            fix="start one with `ray start --head`, or use --ray local",
        ) from error
    return ray
