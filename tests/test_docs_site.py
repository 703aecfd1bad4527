"""The documentation site: a strict build, and the reference in it, compared with what the code itself says.

One build serves all tests here; it takes six seconds of one core. Strict means that a link or an anchor that leads
nowhere, and a page that is not in the navigation, fail it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest

from exporters.target import targets
from fp8pipe.artifact.manifest import Manifest
from fp8pipe.cli import COMMANDS, main
from fp8pipe.cli.stages import stage_schemas
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError
from pipeline.finetune.config import FinetuneConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site, built as `make docs` does."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="pip install 'fp8pipe[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class _Sections(HTMLParser):
    """The text of each section of a page, by the anchor of its heading."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self._anchor = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if re.fullmatch("h[1-6]", tag):
            self._anchor = dict(attrs).get("id") or ""

    def handle_data(self, data: str) -> None:
        self.texts[self._anchor] = self.texts.get(self._anchor, "") + data


def _sections(site: Path, page: str) -> dict[str, str]:
    parser = _Sections()
    parser.feed((site / "reference" / page).read_text(encoding="utf-8"))
    return parser.texts


def _lacking(text: str, names: set[str]) -> set[str]:
    """Names that are not words of the text."""
    return names - set(re.findall(r"[\w-]+", text))


def test_the_reference_has_every_command_and_option(site):
    sections = _sections(site, "commands.html")
    above = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(above, name)
        options = {flag for one in command.params if isinstance(one, click.Option)
                   for flag in (*one.opts, *one.secondary_opts)}  # fmt: skip
        assert options, name
        assert _lacking(sections[f"fp8pipe-{name}"], options) == set(), name


def test_the_reference_has_every_setting_and_field(site):
    settings = _sections(site, "settings.html")
    for title, schema in stage_schemas().items():
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        assert _lacking(settings[anchor], set(schema["properties"])) == set(), title
    manifest = _sections(site, "manifest.html")
    assert _lacking(manifest["manifestjson"], set(Manifest.model_fields)) == set()
    for target in targets():
        assert _lacking(manifest[f"details-of-{target.kind}"], set(target.details.model_fields)) == set(), target.kind


def test_the_reference_has_every_exit_code_and_a_cure(site):
    page = " ".join(_sections(site, "errors.html").values())
    assert _lacking(page, {str(one.exit_code) for one in Fp8PipeError.__subclasses__()}) == set()
    with pytest.raises(ConfigurationError) as raised:
        build_config(FinetuneConfig, {"sizzle": 1})
    assert raised.value.fix in page
    # As many as the code has, counted without parsing it; some are built by helpers and share a row.
    calls = sum(
        len(re.findall(r"(?:raise|return) (?:errors\.)?(?:ConfigurationError|BadArtifactError)\(", path.read_text()))
        for folder in ("fp8pipe", "pipeline", "exporters", "validation", "serving", "calibration")
        for path in (ROOT / folder).rglob("*.py")
    )
    html = (site / "reference/errors.html").read_text(encoding="utf-8")
    assert html.count("<tr>") > calls > 200


def test_the_reference_has_every_variable_of_ours(site):
    page = " ".join(_sections(site, "variables.html").values())
    named = {
        name
        for folder in ("fp8pipe", "pipeline", "exporters", "validation", "serving", "calibration")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"\bFP8PIPE_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8"))
    }
    assert "FP8PIPE_CACHE" in named
    assert _lacking(page, named) == set()


def test_pages_load_nothing_from_the_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    loads = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*\shref=["']?\w*:?//""")
    assert [page.name for page in pages if loads.search(page.read_text(encoding="utf-8"))] == []
    assert (site / "search/search_index.json").is_file()
