"""The page in a real browser: a picture, its classes, an error, a phone, the dark."""

from __future__ import annotations

import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
_CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser():
    if _CHROMIUM is None:
        pytest.skip("no chromium on the path: apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.parametrize(("width", "scheme"), [(1180, "light"), (390, "dark")])
def test_a_picture_becomes_classes(browser, server, png, tmp_path, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    blocked, foreign = [], []
    page.on("console", lambda message: blocked.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: foreign.append(request.url))
    page.goto(server.url)
    page.wait_for_function("document.getElementById('name').textContent === 'tiny'")
    (tmp_path / "a.png").write_bytes(png)
    page.set_input_files("#file", tmp_path / "a.png")
    page.wait_for_selector("#bars li")
    assert page.locator("#bars li").count() == 5
    assert page.locator("#times").is_visible()
    best = page.locator("#bars i").first.evaluate("e => getComputedStyle(e, '::before').width")
    assert float(best.removesuffix("px")) > 3
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not blocked
    assert all(url.startswith((server.url, "blob:", "data:")) for url in foreign)
    (tmp_path / "b.txt").write_text("no image")
    page.set_input_files("#file", tmp_path / "b.txt")
    page.wait_for_selector(".result.bad")
    assert "not an image" in page.locator("#message").inner_text()
    page.close()
