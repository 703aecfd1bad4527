"""The modules of fp8pipe as syntax trees, and strings in them as a reader would see them."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["ROOT", "Module", "called", "modules", "sentence"]

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("fp8pipe", "calibration", "pipeline", "exporters", "validation", "serving")


@dataclass(frozen=True)
class Module:
    """A module of fp8pipe."""

    path: str  # from the repository's root
    text: str
    tree: ast.Module
    nodes: tuple[ast.AST, ...]  # of the whole tree; walking it is what takes long


@cache
def modules() -> tuple[Module, ...]:
    """Every module, packages in the order of the data flow."""
    gc.disable()  # the collector would visit the nodes of all trees again and again, which takes longer than parsing
    try:
        return tuple(_read(path) for package in _PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    finally:
        gc.freeze()
        gc.enable()


def _read(path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    return Module(str(path.relative_to(ROOT)), text, tree, tuple(ast.walk(tree)))


def called(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.Call]]:
    """(last part of the function's name, call) of every call to a function that has a name."""
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node.func.id if isinstance(node.func, ast.Name) else node.func.attr, node


def sentence(node: ast.expr | None) -> str:
    """The text of a message; what is filled in at run time is shown as `{expression}`, choices as `one / other`."""
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else _filled(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return sentence(node.left) + sentence(node.right)
    if isinstance(node, ast.IfExp):
        return " / ".join(dict.fromkeys(text for text in (sentence(node.body), sentence(node.orelse)) if text))
    if isinstance(node, ast.BoolOp):
        return " / ".join(text for text in map(sentence, node.values) if text)
    return "{" + ast.unparse(node) + "}"


def _filled(part: ast.expr) -> str:
    assert isinstance(part, ast.FormattedValue)
    inner = part.value
    if isinstance(inner, ast.IfExp) and isinstance(inner.body, ast.Constant | ast.JoinedStr):
        return sentence(inner)
    return "{" + ast.unparse(inner) + "}"
