"""The report in a real browser: a phone, the dark, paper, and no request to anywhere. And its command."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from PIL import Image

from fp8pipe.cli import main
from fp8pipe.report import write_report

_CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if _CHROMIUM is None:
        pytest.skip("no chromium on the path: apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def written(run_directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    Image.new("RGB", (90, 60), (200, 30, 30)).save(folder / "real.png")
    return write_report(run_directory, folder / "report.html", folder / "real.png")[0]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_it_fits_the_screen_and_asks_nobody(browser, written, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.route("**/*", lambda route: route.abort() if route.request.url.startswith("http") else route.continue_())
    page.goto(f"file://{written}")
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    right = "e => e.getBoundingClientRect().right > innerWidth + 1"
    parts = "[...document.querySelectorAll('td, p, pre, svg, img, h1, h2, h3, li')]"
    assert page.evaluate(f"{parts}.filter({right}).length") == 0
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.locator("img").count() == 5  # sheet, three calibration images, the real one
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert complaints == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_their_ground(browser, written, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(f"file://{written}")
    script = """() => {
      const level = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255).map(
        x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
      const paper = level(getComputedStyle(document.body).backgroundColor);
      return [...document.querySelectorAll('.badge, .lead, td, a, figcaption, h1, code.digest')].map(e => {
        const ink = level(getComputedStyle(e).color);
        return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05); }).reduce((a, b) => Math.min(a, b)); }"""
    assert page.evaluate(script) >= 4.5  # WCAG AA
    page.close()


def test_paper_shows_what_the_screen_folds(browser, written):
    page = browser.new_page()
    page.goto(f"file://{written}")
    page.emulate_media(media="print")
    assert page.evaluate("document.querySelector('details td').checkVisibility()")
    assert page.evaluate("document.querySelector('details td').getBoundingClientRect().height > 0")
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    page.close()


def test_the_command_writes_into_the_run_and_tells_where(run_directory):
    done = CliRunner().invoke(main, ["report", str(run_directory), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["verdict"] == "INFEASIBLE"
    assert document["path"] == str(run_directory / "report.html")
    (run_directory / "report.html").unlink()


def test_the_command_refuses_what_it_cannot_read(run_directory, tmp_path):
    (tmp_path / "empty").mkdir()
    assert CliRunner().invoke(main, ["report", str(tmp_path / "empty")]).exit_code == 12
    assert CliRunner().invoke(main, ["report", str(tmp_path / "absent")]).exit_code == 12
    (tmp_path / "words.png").write_text("no picture")
    given = ["report", str(run_directory), "--output", str(tmp_path / "r.html"), "--image", str(tmp_path / "words.png")]
    assert CliRunner().invoke(main, given).exit_code == 10
    assert CliRunner().invoke(main, ["report", str(run_directory), "--output", "/proc/r.html"]).exit_code == 10


def test_an_export_that_was_never_validated_is_called_so(run_directory, tmp_path):
    export = shutil.copytree(run_directory / "served", tmp_path / "export")
    done = CliRunner().invoke(main, ["report", str(export), "--json"])
    assert json.loads(done.stdout)["verdict"] == "NOT-VALIDATED"
    page = (tmp_path / "export.report.html").read_text()
    assert "No validation has judged this export" in page
    assert "PROVED-WITHOUT-RUNNING" not in page
