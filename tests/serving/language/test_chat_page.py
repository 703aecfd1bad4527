"""The chat page in Debian's Chromium, over the real front and a small real server that streams."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from services import Running, ready, running, wait_until

from serving.http.admission import hash_key, new_key

CHROMIUM = shutil.which("chromium")
STUB = str(Path(__file__).with_name("serve_stub.py"))
KEY = new_key()

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture
def service(export: Path, tmp_path: Path) -> Iterator[Running]:
    (tmp_path / "keys").write_text(hash_key(KEY) + "\n", encoding="utf-8")
    with running(STUB, str(export), str(tmp_path), str(tmp_path / "keys")) as found:
        wait_until(lambda: ready(found))
        yield found


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_a_chat_with_a_key_and_a_crash(service: Running, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 780}, color_scheme="dark")
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(service.url)
    page.fill("#text", "How are you?")
    page.press("#text", "Enter")
    page.wait_for_selector(".error:has-text('needs an API key')")
    assert page.input_value("#text") == "How are you?"  # nothing typed is lost
    page.fill("#key", KEY)
    page.screenshot(path=tmp_path / "key-phone-dark.png")
    page.click("#send")
    page.wait_for_selector(".assistant:has-text('word 2')")
    assert page.inner_text("#send") == "Stop"  # shown before the answer has ended
    page.wait_for_selector(".assistant:has-text('word 9'):not(.busy)")
    page.screenshot(path=tmp_path / "answer-phone-dark.png")
    page.set_viewport_size({"width": 1280, "height": 800})
    page.emulate_media(color_scheme="light")
    page.fill("#text", "break")
    page.click("#send")
    page.wait_for_selector(".error:has-text('broke off')")
    page.screenshot(path=tmp_path / "broken-desktop-light.png")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert faults == []
