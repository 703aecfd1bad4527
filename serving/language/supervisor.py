"""Keeps vLLM's server running: starts it, waits until it answers, watches it, and starts it again after a crash.

A first start that fails ends the service, since the export or the machine is at fault and a restart would not help.
Once it has answered, a crash is followed by a restart, after 1, 2, 4 ... seconds, until it has stayed up for a while.
A server that lives but does not answer, or whose engine makes no token any more, is killed and started again likewise.

vLLM's server and its engine are two processes: `/health` is answered by the first, and stays good while the second
hangs. So the engine is asked for one token now and then. Under load that request waits in line with the others, so an
engine counts as hung only if, for the whole time limit, the token did not come and none of vLLM's token counters moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
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
    """Where the server stands."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"  # for the next restart
    STOPPED = "stopped"


class Child:
    """The command, running below a guard in a session of its own.

    Its output goes to `log`, which is begun anew with each run, so that it cannot fill a disk with restarts.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        with log.open("wb") as out:
            self._process, self._held = start_guarded(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=dict(env)
            )
        self.log = log

    def exit_code(self) -> int | None:
        """None while it runs; the signal's number, negative, if a signal ended it."""
        code = self._process.poll()
        return code if code is None or code <= 128 else 128 - code

    async def stop(self, grace_s: float) -> None:
        """End every process that was started: politely, then not. Also to be called after it ended by itself."""
        if self.exit_code() is None and grace_s > 0:
            self._process.terminate()  # the guard passes it on
            await self._wait(grace_s)
        with contextlib.suppress(OSError):
            os.close(self._held)  # the guard kills what is left
            self._held = -1
        await self._wait(5.0)
        # Had the guard been killed itself, workers might have stayed behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._wait(5.0)

    async def _wait(self, longest_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + longest_s
        while self._process.poll() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)


class Supervisor:
    """Runs children, made by `start`, one after another; the engine is asked for tokens under the name `model`."""

    def __init__(self, start: Callable[[], Child], upstream: Upstream, model: str, config: SupervisorConfig) -> None:
        self._start, self.upstream, self.model, self.config = start, upstream, model, config
        self.state = State.STARTING
        self.restarts = 0
        self.child: Child | None = None
        self.failure: Fp8PipeError | None = None
        self._crashes = 0
        self._ever_ready = False
        self._since = 0.0
        self._last_start_s = 5.0
        self._suspect = asyncio.Event()

    @property
    def retry_after_s(self) -> int:
        """When to ask again: what the last start took, less what has passed of this one; 5 when that is over."""
        left = self._last_start_s - (asyncio.get_running_loop().time() - self._since)
        return min(60, math.ceil(left)) if left > 0 else 5

    async def run(self, on_failure: Callable[[], None]) -> None:
        """Supervise until cancelled, then end the child. A failed first start is told by `on_failure` and `failure`."""
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
        """A request failed inside the server: look at once; whether it is healthy."""
        if self.state is State.READY and await self._healthy():
            return True
        if self.state is State.READY:
            self._suspect.set()
        return False

    async def _one_run(self) -> int:
        """Start, watch, and clean up one child; its exit code."""
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
        """Its exit code if it ended meanwhile; the state tells whether it is ready."""
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
        """Until it ended (its exit code), or does not answer any more (None)."""
        config, missed = self.config, 0
        hung = asyncio.create_task(self._until_hung())
        try:
            while (code := child.exit_code()) is None:
                missed = 0 if await self._healthy() else missed + 1
                if missed >= config.probe_failures or (missed and self._suspect.is_set()):
                    logger.error("vLLM's server does not answer: it is ended")
                    break
                if hung.done():
                    hung.result()  # raises what is not foreseen
                    logger.error("vLLM's engine has made no token for %g s: it is ended", config.engine_timeout_s)
                    break
                await self._pause()
        finally:
            hung.cancel()
        if asyncio.get_running_loop().time() - self._since > config.steady_s:
            self._crashes = 0
        return code

    async def _until_hung(self) -> None:
        """Ask for a token again and again; return once the engine shows no sign of life for `engine_timeout_s`."""
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
        with contextlib.suppress(UpstreamError):  # others notice that the server broke off
            await self.upstream.fetch(b"POST", b"/v1/completions", [(b"content-type", b"application/json")], body)

    async def _lives(self, probe: asyncio.Task[None], timeout_s: float) -> bool:
        """Whether the probe is answered, errors included, before the counters stand still for `timeout_s`."""
        loop = asyncio.get_running_loop()
        seen, deadline = b"", loop.time() + timeout_s
        while True:
            done, _ = await asyncio.wait({probe}, timeout=max(0.01, min(timeout_s / 4, deadline - loop.time())))
            if done:
                return True
            text = await self.upstream.get(b"/metrics", timeout_s / 4) or b""
            counters = b"\n".join(line for line in text.splitlines() if line.startswith(_COUNTERS))
            if counters and counters != seen:
                # The first look only says where they stand.
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
        logger.error("vLLM ended (status %d) and is started again in %.1f s; its log: %s", code, delay, log)
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
