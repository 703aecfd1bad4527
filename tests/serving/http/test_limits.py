"""The limits at their borders, with a clock of their own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving.http import admission as limits
from serving.http.admission import BodyAccount, BodyBudget, BodyLimitMiddleware, RateLimitMiddleware, refuse
from serving.http.problems import Problem


def scope_of(headers: tuple[tuple[bytes, bytes], ...] = (), **more: Any) -> dict[str, Any]:
    return {"type": "http", "path": "/v1/x", "headers": list(headers), "client": ("1.2.3.4", 5), "state": {}} | more


class Sender:
    """A client that sends these pieces, one after another, and then waits for ever."""

    def __init__(self, *pieces: bytes, pause_s: float = 0.0, ends: bool = True) -> None:
        self.pieces, self.pause_s, self.ends, self.taken = list(pieces), pause_s, ends, 0

    async def __call__(self) -> dict[str, Any]:
        if self.taken == len(self.pieces):
            await asyncio.Event().wait()
        await asyncio.sleep(self.pause_s)
        self.taken += 1
        more = not (self.ends and self.taken == len(self.pieces))
        return {"type": "http.request", "body": self.pieces[self.taken - 1], "more_body": more}


async def answer_of(app: Any, scope: dict[str, Any], receive: Any) -> dict[str, Any]:
    """The start of the response, with headers as a dictionary."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0] | {"headers": dict(sent[0]["headers"])}


async def reads_all(scope: Any, receive: Any, send: Any) -> None:
    """Says how many bytes came, or the problem's status."""
    size, more, status = 0, True, 200
    try:
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
    except Problem as problem:
        status = problem.status
    await send({"type": "http.response.start", "status": status, "headers": [(b"size", b"%d" % size)]})


def limited(max_bytes: int = 10, timeout_s: float = 5.0, total: int = 1000) -> BodyLimitMiddleware:
    return BodyLimitMiddleware(reads_all, max_bytes, timeout_s, BodyBudget(total))


def test_tokens_come_back_at_the_rate_and_never_beyond_the_burst(clock: Any) -> None:
    limit = RateLimitMiddleware(None, 2.0, 3, frozenset())
    assert [limit._take("a", 2.0) for _ in range(4)] == [0, 0, 0, 0.5]
    clock.now += 0.25
    assert limit._take("a", 2.0) == 0.25
    clock.now += 0.25
    assert limit._take("a", 2.0) == 0
    clock.now += 1e6
    assert [limit._take("a", 2.0) > 0 for _ in range(4)] == [False, False, False, True]


def test_the_client_that_was_not_seen_longest_is_forgotten(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MAX_CLIENTS", 2)
    limit = RateLimitMiddleware(None, 1e-6, 1, frozenset())
    assert [limit._take(name, 1e-6) > 0 for name in "abab"] == [False, False, True, True]
    assert limit._take("c", 1e-6) == 0
    assert list(limit._buckets) == ["b", "c"]
    assert limit._take("b", 1e-6) > 0  # seen: now c is the oldest
    assert limit._take("a", 1e-6) == 0  # forgotten, hence new
    assert list(limit._buckets) == ["b", "a"]


@pytest.mark.parametrize(("rate", "burst", "expected"), [(3.0, None, 6), (0.2, None, 1), (None, None, 2), (3.0, 5, 5)])
def test_the_burst_is_two_seconds_of_the_rate_unless_it_is_given(rate, burst, expected) -> None:
    assert RateLimitMiddleware(None, rate, burst, frozenset()).burst == expected


@pytest.mark.parametrize(("rate", "path", "statuses"), [(0.4, "/v1/x", [200, 429]), (0.4, "/healthz", [200, 200]),
                                                        (None, "/v1/x", [200, 200])])  # fmt: skip
def test_a_request_beyond_the_rate_is_told_when_to_come_again(clock, rate, path, statuses) -> None:
    limit = RateLimitMiddleware(reads_all, rate, 1, frozenset(("/healthz",)))

    async def scene() -> list[dict[str, Any]]:
        return [await answer_of(limit, scope_of(path=path), Sender(b"")) for _ in range(2)]

    answers = asyncio.run(scene())
    assert [answer["status"] for answer in answers] == statuses
    assert answers[1]["headers"].get(b"retry-after") == (b"3" if 429 in statuses else None)  # 2.5 s, rounded up


def test_clients_are_told_apart_by_key_and_else_by_address() -> None:
    limit = RateLimitMiddleware(reads_all, 1e-6, 1, frozenset())
    alice, bob = ({"state": {"client_name": name}} for name in ("alice", "bob"))
    other = {"client": ("4.3.2.1", 5)}

    async def scene() -> list[int]:
        calls = (alice, bob, {}, other, alice, {"client": ("1.2.3.4", 77)}, {"client": None})
        return [(await answer_of(limit, scope_of(**call), Sender(b"")))["status"] for call in calls]

    assert asyncio.run(scene()) == [200, 200, 200, 200, 429, 429, 200]


def test_a_budget_is_taken_to_its_last_byte_and_given_back_once() -> None:
    budget = BodyBudget(10)
    one, two = BodyAccount(budget), BodyAccount(budget)
    one.take(6)
    two.take(4)
    with pytest.raises(Problem) as refused:
        two.take(1)
    assert refused.value.status == 503
    assert refused.value.headers == {"Retry-After": "1", "Connection": "close"}
    assert budget.held == 10
    one.close()
    one.close()
    assert budget.held == 4
    two.take(6)
    two.close()
    assert budget.held == 0


@pytest.mark.parametrize(
    ("pieces", "stated", "status", "size"),
    [
        ((b"x" * 10,), None, 200, b"10"), ((b"x" * 11,), None, 413, b"0"), ((b"x" * 6, b"y" * 5), None, 413, b"6"),
        ((b"x" * 10,), b"10", 200, b"10"), ((b"x" * 11,), b"11", 413, None), ((b"x",), b"1e9", 200, b"1"),
        ((b"x",), b"9" * 30, 413, None),
    ],
)  # fmt: skip
def test_a_body_may_have_so_many_bytes_and_no_more(pieces, stated, status, size) -> None:
    app = limited()
    headers = () if stated is None else ((b"content-length", stated),)
    sender = Sender(*pieces)
    answer = asyncio.run(answer_of(app, scope_of(headers), sender))
    assert (answer["status"], answer["headers"].get(b"size")) == (status, size)
    assert sender.taken == len(pieces)  # read to its end, or the sender would not hear the answer
    assert app.budget.held == 0


def test_bodies_that_do_not_fit_together_are_refused_and_read_to_their_end() -> None:
    app, sender = limited(max_bytes=100, total=7), Sender(b"x" * 4, b"y" * 4, b"z" * 4)
    assert asyncio.run(answer_of(app, scope_of(), sender))["status"] == 503
    assert sender.taken == 3
    assert app.budget.held == 0


def test_one_deadline_holds_for_the_whole_body() -> None:
    """Each piece comes in time, the body does not."""
    assert (
        asyncio.run(answer_of(limited(timeout_s=0.25), scope_of(), Sender(*[b"x"] * 9, pause_s=0.1)))["status"] == 408
    )
    assert asyncio.run(answer_of(limited(timeout_s=5), scope_of(), Sender(*[b"x"] * 9, pause_s=0.001)))["status"] == 200


def test_a_message_that_does_not_say_that_more_comes_is_the_last() -> None:
    """The specification's default: a body refused then is not waited for any further."""
    taken = []

    async def receive() -> dict[str, Any]:
        taken.append(1)
        return {"type": "http.request", "body": b"x" * 11}

    assert asyncio.run(answer_of(limited(), scope_of(), receive))["status"] == 413
    assert len(taken) == 1


def test_after_the_body_nothing_is_late() -> None:
    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 0.2)  # a problem, had the deadline still held
        await send({"type": "http.response.start", "status": 200, "headers": []})

    app = BodyLimitMiddleware(waits, 10, 0.05, BodyBudget(100))
    assert asyncio.run(answer_of(app, scope_of(), Sender(b"x")))["status"] == 200


@pytest.mark.parametrize(("headers", "taken"), [((), 3), (((b"Expect", b"100-Continue"),), 3),
                                                (((b"expect", b"100-Continue"),), 0)])  # fmt: skip
def test_a_client_that_waits_to_be_asked_is_not_asked(headers, taken) -> None:
    sender = Sender(b"a", b"b", b"c")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await refuse(Problem(413, "large", "too large"), scope, receive, send)

    assert asyncio.run(answer_of(app, scope_of(headers), sender))["status"] == 413
    assert sender.taken == taken


def test_what_is_thrown_away_is_bounded_in_bytes_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_DISCARD_BYTES", 25)
    sender = Sender(*[b"x" * 10] * 9)
    asyncio.run(limits._discard(sender))
    assert sender.taken == 3
    monkeypatch.setattr(limits, "_DISCARD_S", 0.05)
    waiting = Sender(b"x", ends=False)
    asyncio.run(asyncio.wait_for(limits._discard(waiting), 5))
    assert waiting.taken == 1
