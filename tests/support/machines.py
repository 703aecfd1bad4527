"""Machines with addresses of their own, on one network: Linux network namespaces, each connected to a bridge.

A machine is cut off by taking its cable out of the bridge: no interface goes down, no connection is reset, packets are
lost without a word, as behind a switch that fails. Needs root.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rank_work
import torch
from ranks import serve

from fp8pipe.core import launch, silence, work
from pipeline.finetune.distributed.trainer import RankedTrainer
from pipeline.vit import ranks as vit_ranks

_CLONE_NEWNET = 0x40000000
_PORT = 29500
_ENDED_S = 90  # more than any of these runs takes on a busy machine


@dataclass(frozen=True)
class Network:
    """Machines 0 to `size` - 1, with the addresses 10.99.0.1 and up on the interface eth0."""

    name: str
    size: int

    def machine(self, number: int) -> str:
        """The name of a machine's network namespace."""
        return f"{self.name}-{number}"

    def cut(self, number: int) -> None:
        """Take the machine's cable out."""
        _ip("-n", self.name, "link", "set", f"port{number}", "nomaster")

    def heal(self, number: int) -> None:
        """Put the machine's cable back."""
        _ip("-n", self.name, "link", "set", f"port{number}", "master", "bridge0")


@contextmanager
def network(size: int) -> Iterator[Network]:
    """A network of `size` machines; skips the test where none can be made."""
    import pytest  # not in the processes of machines

    made = Network(f"fp8pipe-{os.getpid()}", size)
    names = [made.name, *map(made.machine, range(size))]
    try:
        try:
            _ip("netns", "add", made.name)
            _ip("-n", made.name, "link", "add", "name", "bridge0", "type", "bridge")
            _ip("-n", made.name, "link", "set", "bridge0", "up")
            for number in range(size):
                _connect(made, number)
        except FileNotFoundError:
            pytest.skip("network namespaces need the command ip (package iproute2)")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces need root, and a kernel with veth and bridges: {error.stderr.strip()}")
        yield made
    finally:
        for name in names:
            if Path("/run/netns", name).exists():
                _ip("netns", "del", name)


def _connect(network: Network, number: int) -> None:
    name, port = network.machine(number), f"port{number}"
    _ip("netns", "add", name)
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "link", "add", "name", "eth0", "type", "veth", "peer", "name", port, "netns", network.name)
    _ip("-n", name, "addr", "add", f"10.99.0.{number + 1}/24", "dev", "eth0")
    _ip("-n", name, "link", "set", "eth0", "up")
    _ip("-n", network.name, "link", "set", port, "master", "bridge0")
    _ip("-n", network.name, "link", "set", port, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def run_on(
    network: Network, function: Callable[..., Any], *arguments: Any, interface: str = "eth0", barrier_s: float = 300.0
) -> list[int | None]:
    """The exit codes of `function(*arguments)` in one process on each machine; None for one that does not end.

    Each machine has its own torchrun agent, with the static rendezvous that torchrun uses unless told otherwise. gloo
    listens on `interface`: the name of this host, which it would resolve, has an address of another network. An agent
    whose process has ended well waits `barrier_s` seconds at most for the others.
    """
    serve()
    context = multiprocessing.get_context("forkserver")
    agents = [
        context.Process(target=_agent, args=(network, number, interface, barrier_s, function, arguments))
        for number in range(network.size)
    ]
    for agent in agents:
        agent.start()
    try:
        for agent in agents:
            agent.join(_ENDED_S)
        return [agent.exitcode for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # with its process
            agent.join(10)
            agent.kill()


def _agent(
    network: Network,
    number: int,
    interface: str,
    barrier_s: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    exit_barrier = SimpleElasticAgent._exit_barrier

    def barrier(agent: Any) -> None:
        agent._exit_barrier_timeout = barrier_s
        exit_barrier(agent)

    SimpleElasticAgent._exit_barrier = barrier
    _enter(network.machine(number))
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    config = LaunchConfig(  # processes are forked, as the server that forks others cannot be reached from here
        min_nodes=network.size, max_nodes=network.size, nproc_per_node=1, start_method="fork", monitor_interval=0.05,
        run_id="machines", rdzv_backend="static", rdzv_endpoint=f"10.99.0.1:{_PORT}", rdzv_configs={"rank": number},
        max_restarts=0,
    )  # fmt: skip
    try:
        elastic_launch(config, _process)(function, *arguments)
    except ChildFailedError as error:
        sys.exit(error.failures[number].exitcode)


def _process(function: Callable[..., Any], *arguments: Any) -> None:
    # The agent's handler would wait for a call that waits for the network.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # as in the process that the bits are compared with
    function(*arguments)


def _enter(name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open() as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):  # os.setns is new in Python 3.12
            raise OSError(ctypes.get_errno(), f"the namespace {name} cannot be entered")


def unconnected_command(output: str) -> None:
    """The command `finetune` in processes that do not come so far as to read the model."""
    launch.GRACE_S = silence.GRACE_S = 1.0  # for the one that waits for the other to connect
    rank_work.command({"base": "none", "data": "none"}, output, "none", 0, 0)


def cut_command(
    settings: dict[str, Any], output: str, network: Network, step: int, heals_after_s: float, silence_s: float
) -> None:
    """The command `finetune`, in which rank 1 cuts its machine off before one step; 0 seconds: for ever."""

    def cut() -> None:
        network.cut(1)
        Path(f"{output}-cut").touch()
        if heals_after_s:
            threading.Timer(heals_after_s, network.heal, [1]).start()

    def one_step(trainer: RankedTrainer) -> Any:
        if trainer.step == step:  # before that, a busy machine may be silent for longer
            silence.SILENCE_S = silence_s
        return one_step_of(trainer)

    one_step_of = RankedTrainer.one_step
    RankedTrainer.one_step = one_step
    rank_work._FAULTS["cut"] = cut
    rank_work.command(settings, output, "cut", 1, step)


def cut_quantize_command(config: str, output: str, network: Network, silence_s: float) -> None:
    """The command `quantize-vit`, in which rank 1 cuts its machine off for ever when it has loaded its model."""

    def opener(*arguments: Any) -> Any:
        begin = job_opener(*arguments)
        silence.SILENCE_S, silence.GRACE_S = silence_s, 1.0
        network.cut(1)
        return begin

    job_opener = vit_ranks.job_opener
    vit_ranks.job_opener = opener  # rank 0 does not call it
    work.HEARTBEAT_TIMEOUT_S = silence_s
    rank_work.command_line(
        ["quantize-vit", "--config", config, "--output", output], f"{output}-{os.environ['RANK']}.log"
    )
