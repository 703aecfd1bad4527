"""The page of environment variables: those that the code reads, with the meaning that the documents give them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

from site_pages.sources import ROOT, Module, called, modules
from site_pages.tables import code, table

__all__ = ["read_by_code", "variables_page"]

_HEAD = """# Environment variables

Those that the code reads, and where.

"""
# Documents whose tables say what a variable means.
_TABLES = ("docs/command-line.md", "docs/vllm.md")
_READERS = ("get", "setdefault", "pop")


def variables_page() -> str:
    """The whole page.

    Raises:
        LookupError: the code reads a variable that no document explains.
    """
    meanings: dict[str, str] = {}
    for name in _TABLES:
        for row in re.findall(r"^\| (`[A-Z].*) \|$", (ROOT / name).read_text(encoding="utf-8"), re.M):
            first, *_, last = row.split(" | ")
            for variable in re.findall(r"`([A-Z][A-Z0-9_]+)`", first):
                meanings.setdefault(variable, _from_reference(last, name))
    read = read_by_code()
    if missing := sorted(set(read) - set(meanings)):
        raise LookupError(f"explain in {_TABLES[0]}: {', '.join(missing)}")
    rows = [(code(name), meanings[name], ", ".join(map(code, read[name]))) for name in sorted(read)]
    return _HEAD + table(("variable", "meaning", "read in"), rows)


def _from_reference(text: str, document: str) -> str:
    """A cell of a document's table, with links as they are one folder below."""
    return re.sub(r"\]\(([\w-]+\.md)?(#[^)]*)?\)", lambda found: (
        f"](../{found[1] or document.removeprefix('docs/')}{found[2] or ''})"
    ), text)  # fmt: skip


def read_by_code() -> dict[str, list[str]]:
    """The modules that read each variable, by its name."""
    found: dict[str, list[str]] = {}
    for module in modules():
        if re.search("environ|envvar|FP8PIPE_", module.text):
            for name in sorted(_names(module)):
                found.setdefault(name, []).append(module.path)
    return found


def _names(module: Module) -> set[str]:
    """Names that the module looks up in `os.environ`, and those of fp8pipe's own, which may be handed on first."""
    bound: dict[str, tuple[str, ...]] = {}  # names of the module and of comprehensions, with the strings they stand for
    for node in module.nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                bound.setdefault(target.id, _strings(node.value, bound))
        elif isinstance(node, ast.comprehension) and isinstance(node.target, ast.Name):
            bound[node.target.id] = (*bound.get(node.target.id, ()), *_strings(node.iter, bound))
    found = {name for place in _looked_up(module) for name in _strings(place, bound) if name.isupper()}
    found |= {node.value for node in module.nodes if isinstance(node, ast.Constant)
              and isinstance(node.value, str) and re.fullmatch(r"FP8PIPE_[A-Z_]*[A-Z]", node.value)}  # fmt: skip
    return found


def _strings(node: ast.expr, bound: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The strings that an expression stands for: itself, those of a tuple, or those of a name."""
    if isinstance(node, ast.Constant):
        return (node.value,) if isinstance(node.value, str) else ()
    if isinstance(node, ast.Tuple):
        return tuple(text for one in node.elts for text in _strings(one, bound))
    if isinstance(node, ast.Starred):
        return _strings(node.value, bound)
    return bound.get(node.id, ()) if isinstance(node, ast.Name) else ()


def _looked_up(module: Module) -> Iterator[ast.expr]:
    """The expressions in the place of a variable's name."""
    for node in module.nodes:
        if isinstance(node, ast.Subscript) and _is_environment(node.value):
            yield node.slice
        elif isinstance(node, ast.Compare) and any(map(_is_environment, node.comparators)):
            yield node.left
        elif isinstance(node, ast.keyword) and node.arg == "envvar":
            yield node.value
    for name, call in called(module.nodes):
        if name in _READERS and isinstance(call.func, ast.Attribute) and _is_environment(call.func.value):
            yield call.args[0]


def _is_environment(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"
