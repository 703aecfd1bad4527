"""A further node: it runs vLLM's workers only for a node 0 that serves the same artifact, and until that has ended.

Node 0 is the real front and supervisor over the stub; the workers are processes that only wait.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from services import Running, alive, ready, running, wait_until

from fp8pipe.artifact import open_artifact
from fp8pipe.cli import main
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError
from serving.config import LanguageConfig, SupervisorConfig
from serving.language.follower import Follower, Head
from serving.language.supervisor import Child

STUB = str(Path(__file__).with_name("serve_stub.py"))
TIMES = SupervisorConfig(probe_every_s=0.05, probe_timeout_s=2, stop_grace_s=1, start_timeout_s=1)
NODES = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--tensor-parallel-size", "2")


class Workers:
    """The workers that a follower has started."""

    def __init__(self, folder: Path, code: str = "import time; time.sleep(1000)") -> None:
        self.folder, self.code, self.started = folder, code, list[Child]()

    def __call__(self) -> Child:
        command = [sys.executable, "-c", self.code]
        self.started.append(Child(command, dict(os.environ), self.folder / "workers.log"))
        return self.started[-1]

    @property
    def running(self) -> list[bool]:
        return [alive(child._process.pid) for child in self.started]


@pytest.fixture
def head(export: Path, tmp_path: Path) -> Iterator[Running]:
    """Node 0, whose vLLM starts as long as the file `hold` is there."""
    (tmp_path / "hold").touch()
    with running(STUB, str(export), str(tmp_path)) as found:
        yield found


def place(head: Running) -> Head:
    return Head("127.0.0.1", int(head.url.rpartition(":")[2]), 2)


def following(workers: Workers, head: Head, export: Path, steps: Callable[[], object], stay_s: float = 60) -> None:
    """Run a follower while `steps` are taken in a thread; they have to end it."""
    artifact, failures, over = open_artifact(export, verify=False), list[BaseException](), threading.Event()

    def take() -> None:
        try:
            steps()
        except BaseException as failure:
            failures.append(failure)
            for _ in range(0 if over.is_set() else 2):
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=take)

    async def follow() -> None:
        follower = Follower(workers, head, artifact, TIMES, stay_s)
        asyncio.get_running_loop().call_later(0.1, thread.start)  # once it handles signals
        await follower.run()

    asyncio.run(follow())
    over.set()
    thread.join()
    if failures:
        raise failures[0]


def test_workers_are_started_anew_with_node_0_and_stay_until_it_has_ended(
    head: Running, export: Path, tmp_path: Path
) -> None:
    workers = Workers(tmp_path)

    def steps() -> None:
        wait_until(lambda: workers.running == [True])
        (tmp_path / "hold").unlink()
        wait_until(lambda: ready(head))
        (tmp_path / "hold").touch()
        os.kill(int((tmp_path / "pids").read_text().split()[0]), signal.SIGKILL)  # vLLM on node 0
        wait_until(lambda: workers.running == [False, True])
        (tmp_path / "hold").unlink()
        wait_until(lambda: ready(head))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10 * TIMES.probe_every_s)
        assert workers.running[1]
        head.process.terminate()
        assert head.process.wait(60) == 0

    following(workers, place(head), export, steps)
    assert workers.running == [False, False]


def test_a_second_signal_ends_the_workers_at_once(head: Running, export: Path, tmp_path: Path) -> None:
    workers = Workers(tmp_path)

    def steps() -> None:
        wait_until(lambda: workers.running == [True])
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    following(workers, place(head), export, steps)
    assert workers.running == [False]
    assert head.process.poll() is None


def test_another_artifact_than_node_0s_is_refused(head: Running, export: Path, tmp_path: Path) -> None:
    from tiny_checkpoints import make_model, write_plain

    from exporters.vllm.export import export_vllm
    from exporters.vllm.options import VllmExportOptions

    other, workers = tmp_path / "tiny", Workers(tmp_path)
    export_vllm(write_plain(tmp_path / "plain", make_model(seed=4)), other, VllmExportOptions())
    with pytest.raises(BadArtifactError) as refused:
        following(workers, place(head), other, lambda: None)
    for digest in (open_artifact(export).digest, open_artifact(other).digest):
        assert digest in refused.value.why
    assert workers.started == []


def test_a_tampered_copy_is_refused_by_name_before_node_0_is_asked(export: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    result = CliRunner().invoke(main, ["serve", str(copy), *NODES, "--unvalidated", "--port", "1"])
    assert result.exit_code == 12
    assert "model.safetensors has sha256" in result.output


def test_workers_that_do_not_start_end_the_node(head: Running, export: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArtifactError, match="vLLM ended while it started") as refused:
        following(Workers(tmp_path, "raise SystemExit('no such layer')"), place(head), export, lambda: None)
    assert "no such layer" in refused.value.why


def test_a_node_0_that_is_not_there_or_something_else(export: Path, tmp_path: Path) -> None:
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        other = Head("127.0.0.1", server.server_port, 2)
        with pytest.raises(ConfigurationError, match="not node 0's"):
            following(Workers(tmp_path), other, export, lambda: None)
        server.shutdown()
    with pytest.raises(MissingCapabilityError, match="does not answer"):
        following(Workers(tmp_path), other, export, lambda: None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nnodes", "2", "--master-addr", "a"), "is 1, which cannot be divided by 2 nodes"),
        (("--nnodes", "2", "--tensor-parallel-size", "2"), "master_addr belongs to several nodes"),
        (("--master-addr", "a"), "master_addr belongs to several nodes"),
        (("--node-rank", "1"), "node_rank is 1, but 1 node(s) are numbered from 0"),
        (("--tensor-parallel-size", "3"), "4 attention heads cannot be divided by 3"),
        (("--pipeline-parallel-size", "3"), "2 layers, fewer than 3 pipeline stages"),
        (("--", "-tp", "2"), "--tensor-parallel-size is an option of this command"),
        (("--", "--nnodes=2"), "--nnodes is an option of this command"),
        (("--", "--distributed-executor-backend", "ray"), "run this command on each node"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_a_plan(export: Path, options: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(main, ["serve", str(export), "--dry-run", "--unvalidated", *options])
    assert result.exit_code == 10, result.output
    assert said in result.output


def test_vllm_gets_the_sizes_and_the_node() -> None:
    config = LanguageConfig(
        tensor_parallel_size=2, pipeline_parallel_size=2, nnodes=2, node_rank=1, master_addr="10.0.0.1"
    )
    line = " ".join([*config.arguments(), *config.node_arguments()])
    assert "--tensor-parallel-size 2 --pipeline-parallel-size 2" in line
    assert "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29501" in line
    assert (config.devices, config.devices_here) == (4, 2)
