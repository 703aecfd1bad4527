"""What tests of admission share."""

from __future__ import annotations

import pytest

from serving.http import admission


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(admission, "time", found)
    return found
