"""A further node: it runs vLLM's workers only for a node 0 that serves the same artifact, and until that has ended.

Node 0 is the real front and supervisor over the stub; the workers are processes that only wait.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from services import Running, alive, ready, running, wait_until

from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.record import DIGEST_HEADER
from fp8pipe.cli import main
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError
from serving.config import LanguageConfig, SupervisorConfig
from serving.http.service import Proof
from serving.language.follower import Follower, Head, Missed, Seen
from serving.language.sameness import digests, run_of
from serving.language.supervisor import Child

STUB = str(Path(__file__).with_name("serve_stub.py"))
TIMES = SupervisorConfig(probe_every_s=0.05, probe_timeout_s=2, stop_grace_s=1, start_timeout_s=60)
RUN = run_of(Proof("unvalidated", "", {}), LanguageConfig().form)  # as serve_stub.py runs it
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


def no_workers() -> Child:
    """In place of `Workers` where node 0 must be refused: a follower that accepts it fails at once."""
    raise AssertionError("workers were started")


@dataclass(frozen=True)
class Watched(Head):
    """Node 0, with what each look at it has returned."""

    looks: list[Seen | Missed] = field(default_factory=list)

    def look(self) -> Seen | Missed:
        self.looks.append(found := super().look())
        return found

    def wait_for(self, kind: type[Seen] | type[Missed]) -> None:
        """Wait until a look that begins from now on has returned this."""
        begun = len(self.looks) + 1  # one may be under way
        wait_until(lambda: any(isinstance(look, kind) for look in self.looks[begun:]))

    def signal_twice(self) -> None:
        """Send this process two SIGTERM, the second once the first has been handled: two at once can arrive as one."""
        os.kill(os.getpid(), signal.SIGTERM)
        self.wait_for(Seen)
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def head(export: Path, tmp_path: Path) -> Iterator[Running]:
    """Node 0, whose vLLM starts as long as the file `hold` is there."""
    (tmp_path / "hold").touch()
    with running(STUB, str(export), str(tmp_path)) as found:
        yield found


def place(head: Running, timeout_s: float = 2) -> Watched:
    return Watched("127.0.0.1", int(head.url.rpartition(":")[2]), timeout_s)


def following(
    workers: Callable[[], Child], head: Head, export: Path, steps: Callable[[], object], *,
    run: Mapping[str, str] = RUN, times: SupervisorConfig = TIMES,
) -> None:  # fmt: skip
    """Run a follower while `steps` are taken in a thread; they have to end it."""
    artifact, failures, over = open_artifact(export, verify=False), list[BaseException](), threading.Event()

    def take() -> None:
        try:
            steps()
        except BaseException as failure:
            failures.append(failure)
            for _ in range(2):
                if not over.wait(0.5):
                    os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=take)

    async def follow() -> None:
        follower = Follower(workers, head, artifact, run, times, stay_s=60)
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
    workers, node_0 = Workers(tmp_path), place(head)

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
        node_0.wait_for(Seen)
        assert workers.running[1]
        head.process.terminate()
        assert head.process.wait(60) == 0

    following(workers, node_0, export, steps)
    assert workers.running == [False, False]


def test_while_leaving_a_slow_answer_does_not_end_the_workers_and_a_closed_port_does(
    head: Running, export: Path, tmp_path: Path
) -> None:
    workers, node_0 = Workers(tmp_path), place(head, timeout_s=0.5)

    def steps() -> None:
        wait_until(lambda: workers.running == [True])
        os.kill(os.getpid(), signal.SIGTERM)
        head.process.send_signal(signal.SIGSTOP)
        try:
            node_0.wait_for(Missed)
        finally:
            head.process.send_signal(signal.SIGCONT)
        node_0.wait_for(Seen)
        assert workers.running == [True]
        head.process.kill()

    following(workers, node_0, export, steps, times=TIMES.model_copy(update={"probe_failures": 1000}))
    assert workers.running == [False]
    assert node_0.looks[-1] == Missed(gone=True)


def test_an_odd_answer_does_not_end_workers_that_have_begun(export: Path, tmp_path: Path) -> None:
    workers, digest = Workers(tmp_path), f"sha256:{open_artifact(export, verify=False).digest}"
    said: dict[str, object] = {"status": "starting", "start": "1", "run": digests(RUN)}
    with ThreadingHTTPServer(("127.0.0.1", 0), answering(said, digest)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        node_0 = Watched("127.0.0.1", server.server_port, 2)

        def steps() -> None:
            wait_until(lambda: workers.running == [True])
            start = said.pop("start")
            node_0.wait_for(Missed)
            said["start"] = start
            node_0.wait_for(Seen)
            assert workers.running == [True]
            said["status"] = "waiting"
            wait_until(lambda: workers.running == [False])
            start = said.pop("start")
            node_0.wait_for(Missed)  # nor while it waits for the next start
            said.update(status="starting", start="2")
            wait_until(lambda: workers.running == [False, True])
            node_0.signal_twice()

        following(workers, node_0, export, steps, times=TIMES.model_copy(update={"probe_failures": 1000}))
        server.shutdown()


def answering(said: dict[str, object], digest: str) -> type[BaseHTTPRequestHandler]:
    """Answers every request with `said`, as of then."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header(DIGEST_HEADER, digest)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *arguments: object) -> None:
            return

    return Handler


def test_a_node_0_that_runs_vllm_in_another_way_is_refused(head: Running, export: Path) -> None:
    unproven = LanguageConfig().form
    for run, said in (
        (run_of(Proof("unvalidated", "", {}), LanguageConfig(dtype="float32").form), "--dtype float32"),
        (run_of(Proof("unvalidated", "activations rounded", {}), unproven), "activations rounded"),
        ({**RUN, "vllm": "0.33.1"}, "this node has vllm 0.33.1, and node 0 has not"),
    ):
        with pytest.raises(ConfigurationError, match="runs vLLM in another way") as refused:
            following(no_workers, place(head), export, lambda: None, run=run)
        assert said in refused.value.why


def test_a_second_signal_ends_the_workers_at_once(head: Running, export: Path, tmp_path: Path) -> None:
    workers, node_0 = Workers(tmp_path), place(head)

    def steps() -> None:
        wait_until(lambda: workers.running == [True])
        node_0.signal_twice()
        wait_until(lambda: workers.running == [False], longest_s=30)  # after one signal they would stay for 60 s

    following(workers, node_0, export, steps)
    assert head.process.poll() is None


def test_another_artifact_than_node_0s_is_refused(head: Running, export: Path, tmp_path: Path) -> None:
    from tiny_checkpoints import make_model, write_plain

    from exporters.vllm.export import export_vllm
    from exporters.vllm.options import VllmExportOptions

    other = tmp_path / "tiny"
    export_vllm(write_plain(tmp_path / "plain", make_model(seed=4)), other, VllmExportOptions())
    with pytest.raises(BadArtifactError) as refused:
        following(no_workers, place(head), other, lambda: None)
    for digest in (open_artifact(export).digest, open_artifact(other).digest):
        assert digest in refused.value.why


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


def test_a_node_0_that_is_not_there_or_something_else(export: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        other = Head("127.0.0.1", server.server_port, 2)
        with pytest.raises(ConfigurationError, match="not node 0's"):
            following(no_workers, other, export, lambda: None)
        server.shutdown()
    with pytest.raises(MissingCapabilityError, match="does not answer"):
        following(no_workers, other, export, lambda: None, times=TIMES.model_copy(update={"start_timeout_s": 0.5}))


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
