"""Functions that take turns, and wait for each other where they need things of which only one can be there at a time.

Each has its own thread, so that it can stop in the middle of code that knows nothing of turns. Only one thread runs at
any time: nothing needs a lock, and the order is always the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

__all__ = ["Turns"]

Result = TypeVar("Result")


class _GivenUpError(Exception):
    """Ends a waiting function after another has failed."""


class _Runner(Generic[Result]):
    """One function and its state."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self.function = function
        self.awaits: int | None = None  # what it needs next; None while it runs, and at the end
        self.turn = threading.Event()
        self.thread: threading.Thread | None = None
        self.results: list[Result] = []  # one, at the end
        self.error: BaseException | None = None


class Turns:
    """One run of functions that need numbered things, of which one is there at a time.

    Args:
        bring: puts a thing in the place of the one before.
    """

    def __init__(self, bring: Callable[[int], None]) -> None:
        self._bring = bring
        self._present: int | None = None
        self._runner: _Runner[Any] | None = None  # whose turn it is
        self._back = threading.Event()  # its turn is over
        self._given_up = False

    def need(self, thing: int) -> None:
        """Called by a function: returns once this thing is there."""
        runner = self._runner
        assert runner is not None
        if thing == self._present:
            return
        runner.awaits = thing
        self._back.set()
        runner.turn.wait()
        if self._given_up:
            raise _GivenUpError
        runner.turn.clear()

    def run(self, functions: Sequence[Callable[[], Result]]) -> list[Result]:
        """The functions' results; once all of them wait, the lowest thing that one of them needs is brought.

        Raises:
            Exception: the first that a function or `bring` raises; all threads have ended by then.
        """
        runners = [_Runner(function) for function in functions]
        try:
            for runner in runners:
                runner.thread = threading.Thread(target=self._body, args=(runner,), daemon=True)
                self._resume(runner, runner.thread.start)
            while waiting := [runner for runner in runners if runner.awaits is not None]:
                self._present = min(runner.awaits for runner in waiting if runner.awaits is not None)
                self._bring(self._present)
                for runner in waiting:
                    if runner.awaits == self._present:
                        self._resume(runner, runner.turn.set)
        finally:  # after an error or an interrupt, too: none is left waiting, or computing
            self._given_up = True
            for runner in runners:
                runner.turn.set()
                if runner.thread is not None and runner.thread.is_alive():
                    runner.thread.join()
        return [result for runner in runners for result in runner.results]

    def _resume(self, runner: _Runner[Any], wake: Callable[[], None]) -> None:
        """Let one run until it waits or ends."""
        self._runner, runner.awaits = runner, None
        self._back.clear()
        wake()
        self._back.wait()
        if runner.error is not None:
            raise runner.error

    def _body(self, runner: _Runner[Any]) -> None:
        try:
            runner.results.append(runner.function())
        except _GivenUpError:
            return
        except BaseException as error:  # handed to the caller of `run`
            runner.error = error
        self._back.set()
