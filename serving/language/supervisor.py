"""Keeps vLLM's server running: starts it, waits until it responds, monitors it, and restarts it after a crash.

If the first start fails, the service ends: the cause is the export or the machine, and a restart would not help. Later
crashes are followed by a restart after 1, 2, 4 ... seconds; the delay is reset once the server has stayed up for a
while. A server that runs but does not respond, or whose engine produces no more tokens, is killed and restarted too.

vLLM's server and its engine are separate processes, and the server answers `/health` with 200 even while the engine
hangs. So a request for one token is sent regularly. Under load it waits in vLLM's queue with the others; therefore an
engine counts as hung only if, for the whole timeout, the token did not arrive and vLLM's token counters did not change.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from exporters.vllm.environment import engine_failure
from fp8pipe.core.errors import Fp8PipeError
from fp8pipe.core.guard import start_guarded
from serving.config import SupervisorConfig
from serving.language.upstream import Upstream, UpstreamError

logger = logging.getLogger(__name__)
_COUNTERS = (b"vllm:generation_tokens_total", b"vllm:prompt_tokens_total", b"vllm:iteration_tokens_total_count")


class State(StrEnum):
    """State of vLLM's server."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"  # for the next restart
    STOPPED = "stopped"


class Child:
    """One run of vLLM's server, started at once, in its own process session.

    A guard process kills everything that the command started when `stop` is called or this process ends. The output
    goes to `log`, which each run overwrites, so that restarts cannot fill the disk.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        with log.open("wb") as out:
            self._process, self._held = start_guarded(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=dict(env)
            )
        self.log = log

    def exit_code(self) -> int | None:
        """The exit code; None while it runs, and minus the signal number if a signal ended it."""
        code = self._process.poll()
        return code if code is None or code <= 128 else 128 - code

    async def stop(self, grace_s: float) -> None:
        """Stop all its processes: SIGTERM and, after at most `grace_s` seconds, SIGKILL.

        Must be called even if the command ended by itself, because its workers may still be running.
        """
        if self.exit_code() is None and grace_s > 0:
            self._process.terminate()  # the guard forwards the signal
            await self._wait(grace_s)
        with contextlib.suppress(OSError):
            os.close(self._held)  # makes the guard kill the remaining processes
            self._held = -1
        await self._wait(5.0)
        # If the guard itself was killed, workers may still be running.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._wait(5.0)

    async def _wait(self, longest_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + longest_s
        while self._process.poll() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)


class Supervisor:
    """Keeps a server running, by starting a new child whenever one has ended.

    Args:
        start: starts the server and returns its child.
        upstream: the client for requests to the server.
        model: the model's name in the API, for requests of one token.
        config: timeouts and intervals.
    """

    def __init__(self, start: Callable[[], Child], upstream: Upstream, model: str, config: SupervisorConfig) -> None:
        self._start, self.upstream, self.model, self.config = start, upstream, model, config
        self.state = State.STARTING
        self.restarts = 0
        self.start_id = ""  # identifies one start of the server
        self.child: Child | None = None
        self.failure: Fp8PipeError | None = None
        self._crashes = 0
        self._ever_ready = False
        self._since = 0.0
        self._last_start_s = 5.0
        self._suspect = asyncio.Event()

    @property
    def retry_after_s(self) -> int:
        """Estimated seconds until the server is ready: the duration of the last start minus the time since this one.

        At most 60; 5 if that time is over.
        """
        left = self._last_start_s - (asyncio.get_running_loop().time() - self._since)
        return min(60, math.ceil(left)) if left > 0 else 5

    async def run(self, on_failure: Callable[[], None]) -> None:
        """Run and restart the server until this task is cancelled, then stop it.

        If the first start fails, `failure` is set to the error, `on_failure` is called, and the method returns.
        """
        try:
            while True:
                code = await self._one_run()
                if not self._ever_ready:
                    assert self.child is not None
                    self.failure = engine_failure("vLLM ended while it started", code, self.child.log)
                    on_failure()
                    return
                await self._delay(code)
        finally:
            self._enter(State.STOPPED)
            self.upstream.close()
            if self.child is not None:
                await self.child.stop(self.config.stop_grace_s)

    async def suspect(self) -> bool:
        """Check the server at once, because a request to it failed; returns whether it is ready and healthy."""
        if self.state is State.READY and await self._healthy():
            return True
        if self.state is State.READY:
            self._suspect.set()
        return False

    async def _one_run(self) -> int:
        """Start, monitor and clean up one child; returns its exit code, which is not 0 if it had to be killed."""
        self.start_id = secrets.token_hex(8)
        self._enter(State.STARTING)
        self._suspect.clear()
        self.child = child = self._start()
        code = await self._until_ready(child)
        if self.state is State.READY:
            code = await self._while_ready(child)
        self._enter(State.WAITING)
        self.upstream.close()
        await child.stop(0)
        return code if code is not None else (child.exit_code() or 1)

    async def _until_ready(self, child: Child) -> int | None:
        """Wait until the child is ready (then the state is READY), it ends (returns its exit code), or time is up."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.start_timeout_s
        while (code := child.exit_code()) is None and loop.time() < deadline:
            if await self._healthy():
                self._last_start_s = loop.time() - self._since
                self._enter(State.READY)
                break
            await self._pause()
        return code

    async def _while_ready(self, child: Child) -> int | None:
        """Monitor the child until it ends (returns its exit code) or stops responding (returns None)."""
        config, missed = self.config, 0
        hung = asyncio.create_task(self._until_hung())
        try:
            while (code := child.exit_code()) is None:
                missed = 0 if await self._healthy() else missed + 1
                if missed >= config.probe_failures or (missed and self._suspect.is_set()):
                    logger.error("vLLM's server does not answer: terminating it")
                    break
                if hung.done():
                    hung.result()  # raises unexpected errors of the task
                    logger.error(
                        "vLLM's engine has generated no token for %g s: terminating it", config.engine_timeout_s
                    )
                    break
                await self._pause()
        finally:
            hung.cancel()
        if asyncio.get_running_loop().time() - self._since > config.steady_s:
            self._crashes = 0
        return code

    async def _until_hung(self) -> None:
        """Request a token periodically; returns once the engine has generated nothing for `engine_timeout_s`."""
        while True:
            await asyncio.sleep(self.config.engine_probe_every_s)
            probe = asyncio.create_task(self._one_token())
            try:
                if not await self._lives(probe, self.config.engine_timeout_s):
                    return
            finally:
                probe.cancel()

    async def _one_token(self) -> None:
        body = json.dumps({"model": self.model, "prompt": "a", "max_tokens": 1}).encode()
        with contextlib.suppress(UpstreamError):  # a failing server is detected elsewhere
            await self.upstream.fetch(b"POST", b"/v1/completions", [(b"content-type", b"application/json")], body)

    async def _lives(self, probe: asyncio.Task[None], timeout_s: float) -> bool:
        """Wait for the probe; False if it gets no response and the token counters do not change for `timeout_s`.

        An error response counts as a response.
        """
        loop = asyncio.get_running_loop()
        seen, deadline = b"", loop.time() + timeout_s
        while True:
            done, _ = await asyncio.wait({probe}, timeout=max(0.01, min(timeout_s / 4, deadline - loop.time())))
            if done:
                return True
            text = await self.upstream.get(b"/metrics", timeout_s / 4) or b""
            counters = b"\n".join(line for line in text.splitlines() if line.startswith(_COUNTERS))
            if counters and counters != seen:
                # The first reading does not extend the deadline, since there is nothing to compare it with.
                deadline = loop.time() + timeout_s if seen else deadline
                seen = counters
            if loop.time() >= deadline:
                return False

    async def _pause(self) -> None:
        try:
            await asyncio.wait_for(self._suspect.wait(), self.config.probe_every_s)
        except TimeoutError:
            return
        if await self._healthy():
            self._suspect.clear()

    async def _delay(self, code: int) -> None:
        delay = min(self.config.longest_delay_s, self.config.first_delay_s * 2**self._crashes)
        self._crashes += 1
        self.restarts += 1
        log = "" if self.child is None else self.child.log
        logger.error("vLLM ended (status %d) and will be restarted in %.1f s; its log: %s", code, delay, log)
        await asyncio.sleep(delay)

    async def _healthy(self) -> bool:
        return await self.upstream.get(b"/health", self.config.probe_timeout_s) is not None

    def _enter(self, state: State) -> None:
        if state is not self.state or not self._since:
            logger.info("vLLM is %s", state.value)
        self._ever_ready = self._ever_ready or state is State.READY
        if state is not State.WAITING:
            self._since = asyncio.get_running_loop().time()
        self.state = state
