"""Functions that take turns: what they need is brought once for all, in order, and a failure ends them all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from fp8pipe.core.turns import Turns


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of SIGINT, which it does not install where the shell started it in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def visit(turns: list[Turns], seen: list[tuple[str, int]], name: str, *things: int) -> str:
    for thing in things:
        turns[0].need(thing)
        seen.append((name, thing))
    return name


def test_things_are_brought_once_for_all_and_in_order() -> None:
    brought: list[int] = []
    seen: list[tuple[str, int]] = []
    turns = [Turns(brought.append)]
    results = turns[0].run([partial(visit, turns, seen, "a", 0, 1, 1), partial(visit, turns, seen, "b", 0, 2)])
    assert results == ["a", "b"]
    assert brought == [0, 1, 2]
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("a", 1), ("b", 2)]


def test_a_thing_that_is_needed_again_is_brought_again() -> None:
    brought: list[int] = []
    turns = [Turns(brought.append)]
    turns[0].run([partial(visit, turns, [], "a", 0, 1, 0)])
    assert brought == [0, 1, 0]


def test_a_failure_is_raised_and_nobody_waits_for_ever() -> None:
    def fail() -> str:
        turns[0].need(0)
        raise KeyError("gone")

    turns = [Turns(lambda thing: None)]
    functions: list[Callable[[], str]] = [partial(visit, turns, [], "a", 1), fail]
    with pytest.raises(KeyError, match="gone"):
        turns[0].run(functions)
    assert not any("_body" in thread.name for thread in threading.enumerate())


def test_an_interrupt_ends_what_computes_and_what_waits(interruptible: None) -> None:
    def interrupted() -> str:
        turns[0].need(0)
        os.kill(os.getpid(), signal.SIGINT)  # of the main thread, which waits for this one
        return visit(turns, seen, "interrupted", 1)

    seen: list[tuple[str, int]] = []
    turns = [Turns(lambda thing: None)]
    with pytest.raises(KeyboardInterrupt):
        turns[0].run([partial(visit, turns, seen, "a", 2), interrupted])
    assert not seen
    assert not any("_body" in thread.name for thread in threading.enumerate())


def test_what_cannot_be_brought_is_raised() -> None:
    def missing(thing: int) -> None:
        raise FileNotFoundError(thing)

    turns = [Turns(missing)]
    with pytest.raises(FileNotFoundError):
        turns[0].run([partial(visit, turns, [], "a", 0)])


def test_a_thread_that_the_system_refuses_is_the_error_and_those_before_it_end(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    turns = [Turns(lambda thing: None)]
    with pytest.raises(RuntimeError, match="can't start new thread"):
        turns[0].run([partial(visit, turns, [], name, 0) for name in "abc"])
    assert not started[0].is_alive()
