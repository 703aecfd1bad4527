"""A further node of a model that several nodes compute: it runs vLLM's workers here, for the server on node 0.

`fp8pipe serve` is started on every node, with the same options and its own `--node-rank`. So every node hashes its own
copy of the export against the manifest before vLLM may load it there. A manifest that fits its files could still be
that of another export; so a further node asks node 0 which artifact it serves (every response of its HTTP service names
the digest) and how it runs vLLM (see `sameness`), and starts vLLM only if both are the same as here. No node loads
weights before the processes of all nodes have met.

vLLM's processes of one start belong together: if those of one node end, the others' are useless. Node 0 starts vLLM
again after a crash, as on a single node, and its `/readyz` names the start. When that changes, vLLM is started again
here, too. After SIGTERM the workers stay until node 0 has finished its requests, for as long as its drain may take.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from exporters.vllm.environment import engine_failure
from fp8pipe.artifact import Artifact
from fp8pipe.artifact.record import DIGEST_HEADER
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError
from serving.config import SupervisorConfig
from serving.language.sameness import differences
from serving.language.supervisor import Child, State

logger = logging.getLogger(__name__)
_REPORT_EVERY_S = 60.0
_LOOKS_AFTER = 4  # node 0 is asked less often than vLLM is probed: it logs every request


@dataclass(frozen=True, slots=True)
class Seen:
    """What node 0 says of itself.

    Attributes:
        digest: of the artifact that it serves, as in the header.
        state: of its vLLM, a value of `State`, or `draining`.
        start: identifies one start of its vLLM.
        run: digests of how it runs vLLM, see `sameness`.
    """

    digest: str
    state: str
    start: str
    run: dict[str, str]


@dataclass(frozen=True, slots=True)
class Missed:
    """A look without an answer of node 0.

    Attributes:
        gone: nothing listens there, or the connection was closed without an answer: its service has ended. A look that
            took too long does not tell that.
        odd: what something else has answered; empty if nothing did.
    """

    gone: bool = False
    odd: str = ""


@dataclass(frozen=True, slots=True)
class Head:
    """Node 0's HTTP service, as the other nodes reach it."""

    host: str
    port: int
    timeout_s: float

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def look(self) -> Seen | Missed:
        """Ask node 0."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        try:
            connection.request("GET", "/readyz")
            reply = connection.getresponse()
            body = reply.read()
        except (OSError, http.client.HTTPException) as error:
            return Missed(gone=isinstance(error, ConnectionError))
        finally:
            connection.close()
        try:
            document = json.loads(body)
            run = {str(name): str(digest) for name, digest in document["run"].items()}
            return Seen(reply.headers[DIGEST_HEADER], str(document["status"]), str(document["start"]), run)
        except (ValueError, KeyError, TypeError, AttributeError):
            return Missed(odd=f"GET /readyz returned {reply.status} without the start of its vLLM")


class Follower:
    """Runs vLLM's workers on this node, once for each start of vLLM on node 0.

    Args:
        start: starts vLLM here and returns its child.
        head: node 0.
        artifact: the export on this node, whose files have been hashed.
        run: how vLLM runs on this node, from `run_of`.
        config: timeouts and intervals.
        stay_s: longest time after SIGTERM that node 0 may need for its requests, seconds.
    """

    def __init__(
        self, start: Callable[[], Child], head: Head, artifact: Artifact, run: Mapping[str, str],
        config: SupervisorConfig, stay_s: float,
    ) -> None:  # fmt: skip
        self._start, self._head, self._artifact, self._run = start, head, artifact, run
        self._config, self._stay_s = config, stay_s
        self._leaving = asyncio.Event()
        self._leave_at: float | None = None
        self._last = ""

    async def run(self) -> None:
        """Run until a signal arrives.

        Raises:
            BadArtifactError: node 0 serves another artifact; or vLLM's first start failed, see `engine_failure`, which
                raises other errors, too.
            ConfigurationError: something else answers at node 0's address, or node 0 runs vLLM in another way.
            MissingCapabilityError: node 0 cannot be reached.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        served = False
        while not self._leaving.is_set() and (begun := await self._next_start()):
            self._last = begun
            logger.info("node 0 has started vLLM; starting it here")
            child = self._start()
            try:
                code, ready = await self._until_over(begun, child)
            finally:
                await child.stop(self._config.stop_grace_s)
            served = served or ready
            if code is not None and not served:
                raise engine_failure("vLLM ended while it started", code, child.log)
            if code is not None:
                logger.error("vLLM ended here (status %d); waiting for node 0 to start it again", code)

    def _signalled(self) -> None:
        now = asyncio.get_running_loop().time()
        self._leave_at = now + self._stay_s if self._leave_at is None else now
        self._leaving.set()

    async def _next_start(self) -> str:
        """Wait until node 0 starts vLLM, and identify that start; empty if a signal came first."""
        loop = asyncio.get_running_loop()
        reached, reported = loop.time(), loop.time()
        while not self._leaving.is_set():
            seen, now = await self._look(), loop.time()
            if isinstance(seen, Seen):
                reached = now
                if seen.state == State.STARTING and seen.start != self._last:
                    return seen.start
            elif seen.odd and not self._last:  # later, an odd answer is one that did not come
                raise ConfigurationError(
                    f"what answers at {self._head} is not node 0's fp8pipe serve", why=seen.odd,
                    fix="give node 0's address with --master-addr, and the port that it serves on with --port",
                )  # fmt: skip
            elif now - reached > self._config.start_timeout_s:
                raise MissingCapabilityError(
                    f"node 0 does not answer at {self._head}", why=f"tried for {now - reached:.0f} s",
                    fix="start it with --host 0.0.0.0, and give every node its --master-addr and the same --port",
                )  # fmt: skip
            if now - reported > _REPORT_EVERY_S:
                reported = now
                state = seen.state if isinstance(seen, Seen) else "no answer"
                logger.info("waiting for node 0 at %s: %s", self._head, state)
            await self._pause()
        return ""

    async def _until_over(self, begun: str, child: Child) -> tuple[int | None, bool]:
        """Wait until this start of vLLM is over, here or on node 0, or this node may leave.

        Returns the child's exit code, None if it still runs, and whether node 0 was ready in the meantime.
        """
        loop, missed, ready = asyncio.get_running_loop(), 0, False
        while (code := child.exit_code()) is None:
            seen = await self._look()
            if isinstance(seen, Seen):
                missed, ready = 0, ready or seen.state == State.READY
                if seen.start != begun or seen.state in (State.WAITING, State.STOPPED):
                    logger.warning("vLLM has ended on node 0: ending it here")
                    break
            else:
                missed += 1
                # After a signal node 0 is expected to go; one slow answer is no sign of that.
                if missed >= self._config.probe_failures or (seen.gone and self._leave_at is not None):
                    logger.warning("node 0 does not answer at %s: ending vLLM here", self._head)
                    break
            if self._leave_at is not None and loop.time() >= self._leave_at:
                break
            await self._pause()
        return code, ready

    async def _look(self) -> Seen | Missed:
        seen = await asyncio.to_thread(self._head.look)
        mine = f"sha256:{self._artifact.digest}"
        if isinstance(seen, Seen) and seen.digest != mine:
            raise BadArtifactError(
                f"{self._artifact.root} is not the export that node 0 serves",
                why=f"it is {mine}, and node 0 at {self._head} serves {seen.digest}",
                fix="copy the export of node 0 to this node",
            )
        if isinstance(seen, Seen) and (others := differences(self._run, seen.run)):
            raise ConfigurationError(
                f"node 0 at {self._head} runs vLLM in another way than this node",
                why=f"this node has {'; '.join(others)}, and node 0 has not",
                fix="install the same versions on all nodes, and start them with the same options and variables",
            )
        return seen

    async def _pause(self) -> None:
        pause_s = _LOOKS_AFTER * self._config.probe_every_s
        if self._leave_at is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), pause_s)
        else:
            await asyncio.sleep(pause_s)
