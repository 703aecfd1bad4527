"""Whether the engine still makes tokens, which the server in front of it does not know.

vLLM's server and its engine are two processes: `/health` is answered by the first, and stays good while the second
hangs. So the engine is asked for one token now and then. Under load that request waits in line with the others, so an
engine counts as hung only if, for the whole time limit, the token did not come and none of vLLM's token counters moved.
"""

from __future__ import annotations

import asyncio
import json

from serving.language.upstream import Headers, Upstream, UpstreamError

__all__ = ["until_hung"]

_COUNTERS = (b"vllm:generation_tokens_total", b"vllm:prompt_tokens_total", b"vllm:iteration_tokens_total_count")
_JSON: Headers = [(b"content-type", b"application/json")]


async def until_hung(upstream: Upstream, model: str, timeout_s: float, every_s: float) -> None:
    """Watch the engine; return once it hangs.

    It hangs when nothing shows a sign of life for `timeout_s`; `every_s` is the pause between two tokens.
    """
    body = json.dumps({"model": model, "prompt": "a", "max_tokens": 1}).encode()
    while True:
        await asyncio.sleep(every_s)
        probe = asyncio.create_task(_ask(upstream, b"POST", b"/v1/completions", body))
        try:
            if not await _lives(upstream, probe, timeout_s):
                return
        finally:
            probe.cancel()


async def _lives(upstream: Upstream, probe: asyncio.Task[bytes], timeout_s: float) -> bool:
    """Whether the probe is answered, errors included, before the counters stand still for `timeout_s`."""
    loop = asyncio.get_running_loop()
    seen, deadline = b"", loop.time() + timeout_s
    while True:
        done, _ = await asyncio.wait({probe}, timeout=max(0.01, min(timeout_s / 4, deadline - loop.time())))
        if done:
            return True
        counters = await _counters(upstream, timeout_s / 4)
        if counters and counters != seen:
            # The first look only says where they stand.
            deadline = loop.time() + timeout_s if seen else deadline
            seen = counters
        if loop.time() >= deadline:
            return False


async def _counters(upstream: Upstream, timeout_s: float) -> bytes:
    try:
        async with asyncio.timeout(timeout_s):
            text = await _ask(upstream, b"GET", b"/metrics")
    except TimeoutError:
        return b""
    return b"\n".join(line for line in text.splitlines() if line.startswith(_COUNTERS))


async def _ask(upstream: Upstream, method: bytes, target: bytes, body: bytes = b"") -> bytes:
    """The answer's body; empty when the server broke off, which others notice."""
    try:
        _, answer = await upstream.fetch(method, target, _JSON if body else [], body)
        return answer
    except UpstreamError:
        return b""
