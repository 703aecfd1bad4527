"""Hooks of mkdocs: add pages that are written from the code, and the documents at the repository's root.

Pages of the reference do not exist as files. README.md is the first page of the site, so that there is one introduction
and not two. Links to files that are no pages (examples, the licence) become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify
from site_pages import commands, failures, settings, variables

ROOT = Path(__file__).resolve().parents[1]
# Documents outside docs/, and what they are called on the site.
OUTSIDE = {
    "README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md", "serving/vllm_plugin/README.md": "vllm-plugin.md",
}  # fmt: skip
WRITTEN = {
    "reference/commands.md": commands.commands_page, "reference/recipe-keys.md": settings.recipe_page,
    "reference/settings.md": settings.settings_page, "reference/manifest.md": settings.manifest_page,
    "reference/gates.md": failures.gates_page, "reference/errors.md": failures.errors_page,
    "reference/variables.md": variables.variables_page, "reference/python.md": lambda: PYTHON,
}  # fmt: skip
# The Python interface, by modules; mkdocstrings reads their docstrings without importing them.
PYTHON = """# Python

## fp8pipe

::: fp8pipe.api
    options: {show_root_heading: false, members_order: source}

## fp8pipe.falqon

::: pipeline.falqon.own_loop
    options: {show_root_heading: false, members_order: source}

## Errors

::: fp8pipe.core.errors
    options: {show_root_heading: false, members_order: source}
"""
_FENCE = re.compile(r"(^ *```.*?^ *```\s*?$)", re.M | re.S)
_LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors are those of GitHub, where the same documents are read, too."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for source, place in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=_with_links(text, source)))
    for place, write in WRITTEN.items():
        files.append(File.generated(config, place, content=write()))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Links of documents in docs/ to what is outside of it."""
    place = page.file.src_uri
    return markdown if page.file.generated_by else _with_links(markdown, f"docs/{place}")


def _with_links(text: str, source: str) -> str:
    """The text with the links of a file of the repository as they are on the site; those in fences stay."""
    parts = _FENCE.split(text)
    return "".join(part if index % 2 else _LINK.sub(lambda found: _link(found, source), part)
                   for index, part in enumerate(parts))  # fmt: skip


def _link(found: re.Match[str], source: str) -> str:
    words, target, anchor = found[1], found[2], found[3] or ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path in OUTSIDE:
        return f"[{words}]({OUTSIDE[path]}{anchor})"
    if path.startswith("docs/"):
        return f"[{words.removeprefix('docs/')}]({path.removeprefix('docs/')}{anchor})"
    return words if (ROOT / path).exists() else found[0]  # of the latter mkdocs says that it leads nowhere
