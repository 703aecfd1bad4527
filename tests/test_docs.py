"""What documents name is there: links, anchors, files, modules, Python names, commands and their options."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import click
import pytest
from breadth import only_long
from doc_commands import run_command, shell_commands

from fp8pipe.cli import main
from fp8pipe.core import errors

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "serving/vllm_plugin/README.md"])
PACKAGES = ("fp8pipe", "calibration", "pipeline", "exporters", "validation", "serving")
FOLDERS = (*PACKAGES, "benchmarks", "deploy", "docs", "examples", "recipes", "scripts", "tests")
# A document about the past names what is no more.
DOCUMENTS_OF_TODAY = [document for document in DOCUMENTS if document.name != "CHANGELOG.md"]

_FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```\s*$", re.M | re.S)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FILE = re.compile(rf"(?<![\w/.$-])(?:{'|'.join(FOLDERS)})/[\w./*-]*(?![\w=])")  # labels of Kubernetes have a value
_MODULE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
# No word of these: fp8pipe says what the field says. Quoted words of the changelog's table are the exception.
_OLD_WORDS = re.compile(
    r"\b(mel[d]\w*|settl\w*|rehear[s]\w*|vouc[h]\w*|strange[r]s?|companions?|outlook|roads?|leash|rooms"
    r"|last[ _]flush\w*)\b",
    re.I,
)
# "one scale a tensor", "bytes a code": the field says per tensor, per code.
_PER = re.compile(
    r"\b(?:scales?|tokens|bytes|sequences|records?|powers? of two|one) an? "
    r"(?:tensor|row|token|channel|block|sequence|micro-batch|code)\b"
)
# Files that commands write, which begin like folders of this repository, and names made up for readers.
_MADE_UP = re.compile(r"serving/http\.|docs/NAME")


def _ids(documents: list[Path]) -> list[object]:
    return [pytest.param(document, id=str(document.relative_to(ROOT))) for document in documents]


@cache
def _anchors(document: Path) -> frozenset[str]:
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return frozenset(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)


@pytest.mark.parametrize("document", _ids(DOCUMENTS))
def test_every_link_leads_somewhere(document: Path):
    wrong = []
    for link in _LINK.findall(_FENCE.sub("", document.read_text(encoding="utf-8"))):
        place, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (document.parent / place) if place else document
        if not target.exists() or (anchor and anchor not in _anchors(target.resolve())):
            wrong.append(link)
    assert wrong == []


def test_every_page_is_linked_from_the_readme():
    linked = set(_LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages - linked == set()
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"} - linked == set()


@pytest.mark.parametrize("document", _ids(DOCUMENTS_OF_TODAY))
def test_every_file_is_there(document: Path):
    named = {found.rstrip("./") for found in _FILE.findall(document.read_text(encoding="utf-8"))}
    assert sorted(name for name in named if not _made_up(name) and not list(ROOT.glob(name))) == []


def _made_up(name: str) -> bool:
    """CONTRIBUTING names files that a reader would add: they have `NAME` in them, or `toy`."""
    return bool(re.search(r"NAME|toy\b|toy/", name))


@pytest.mark.parametrize("document", _ids(DOCUMENTS_OF_TODAY))
def test_every_module_and_name_is_there(document: Path):
    text = document.read_text(encoding="utf-8")
    named = {found for span in _SPAN.findall(text) for found in _MODULE.findall(span)}
    fences = [body for language, body in _FENCE.findall(text) if language == "python"]
    for node in (node for body in fences for node in ast.walk(ast.parse(body))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            named |= {f"{node.module}.{name.name}" for name in node.names}
    assert sorted(name for name in named if not _made_up(name.replace(".", "/")) and not _is_there(name)) == []


def _is_there(dotted: str) -> bool:
    """Whether it is a package, a module, a name in one, or an attribute of such a name; nothing is imported."""
    parts = dotted.split(".")
    place = ROOT / parts[0]
    for index, part in enumerate(parts[1:], 1):
        if (place / part).is_dir():
            place /= part
            continue
        inner = place / f"{part}.py"
        source = inner if inner.is_file() else place / "__init__.py"
        names = parts[index + 1 : index + 2] if inner.is_file() else [part]
        return all(re.search(rf"\b{name}\b", source.read_text(encoding="utf-8")) for name in names)
    return True


@pytest.mark.parametrize("document", _ids(DOCUMENTS_OF_TODAY))
def test_every_command_is_one_that_click_takes(document: Path):
    """Commands, options, choices, types, and what is required; nothing is run."""
    wrong = []
    for line in shell_commands(document):
        words = _words(line.text)
        if "fp8pipe" not in words:
            continue
        name, *rest = words[words.index("fp8pipe") + 1 :]  # after `torchrun -m`, too
        found = main.get_command(click.Context(main), name)
        try:
            if found is None:
                raise click.UsageError(f"no command {name}")
            found.make_context(name, rest, parent=click.Context(main))
        except click.UsageError as error:
            # Words that stand for others: `finetune ... --report-to wandb`, `--update-rule NAME`.
            if not re.search(r"\(\.\.\.\)|'NAME'", error.format_message()):
                wrong.append(f"line {line.line}: {line.text}: {error.format_message()}")
    assert wrong == []


@pytest.mark.parametrize("document", _ids(DOCUMENTS_OF_TODAY))
def test_every_script_and_target_of_make_is_there(document: Path):
    """`python FILE --option` and `make TARGET VARIABLE=value`: what is named stands in the file or in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wrong = []
    for line in shell_commands(document):
        words = [word for word in _words(line.text) if word != "-P"]
        if words[:1] == ["python"] and words[1].endswith(".py"):
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            wrong += [f"line {line.line}: {word}" for word in words[2:]
                      if re.match("--[a-z]", word) and f'"{word.partition("=")[0]}"' not in source]  # fmt: skip
        elif words[:1] == ["make"]:
            known = [rf"^{word.partition('=')[0]} \?=" if "=" in word else rf"^{word}:" for word in words[1:]]
            wrong += [f"line {line.line}: {line.text}" for one in known if not re.search(one, makefile, re.M)]
    assert wrong == []


@only_long
def test_the_first_run_works_as_it_stands(tmp_path):
    """The commands of docs/start.md up to the service, one after the other, in a folder of their own."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    lines = [line for line in shell_commands(ROOT / "docs/start.md") if line.text.split()[0] in ("fp8pipe", "python")]
    until = next(index for index, line in enumerate(lines) if line.text.startswith("fp8pipe serve"))
    assert until >= 6
    for line in lines[:until]:
        program = {"fp8pipe ": f"{sys.executable} -P -m fp8pipe "} if line.text.startswith("fp8pipe") else {}
        python = {"python ": f"{sys.executable} "} if line.text.startswith("python") else {}
        done = run_command(line, tmp_path, program | python, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, f"{line.text}\n{done.stdout}{done.stderr}"
    verdict = json.loads((tmp_path / "out/digits-onnx.validation.json").read_text(encoding="utf-8"))["verdict"]
    assert verdict == "ACCEPT"


def _words(command: str) -> list[str]:
    """The words of a command; none of a line whose last string goes on in the next line."""
    try:
        return shlex.split(command.replace("\\\n", " "), comments=True)
    except ValueError:
        return []


def test_the_table_of_exit_codes_is_that_of_the_errors():
    table = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    listed = set(map(int, re.findall(r"^\| (\d+) \|", table, re.M)))
    classes = [errors.Fp8PipeError, *errors.Fp8PipeError.__subclasses__(), click.UsageError]
    assert listed == {0, *(one.exit_code for one in classes)}


@pytest.mark.parametrize("document", _ids(DOCUMENTS_OF_TODAY))
def test_the_words_are_the_fields(document: Path):
    text = document.read_text(encoding="utf-8")
    assert [found[0] for pattern in (_OLD_WORDS, _PER) for found in pattern.finditer(text)] == []
