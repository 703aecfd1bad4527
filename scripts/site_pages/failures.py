"""The pages of errors and gates: every message with its cure, every gate's name, as they stand in the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import click

from fp8pipe.artifact.gate import Verdict
from fp8pipe.core import errors
from site_pages.sources import called, modules, sentence
from site_pages.tables import cell, code, table

__all__ = ["errors_page", "gates_page"]

_ERRORS = """# Errors and exit codes

Every error says what happened, why, and what to do next. The tables list all of them by exit code, as they stand in the
code: what is in braces is filled in when the error is raised. `--json` puts the same three parts into the document on
stdout, as `error`.

"""
_GATES = """# Gates and verdicts

A gate compares a measured value with a threshold. Gates are recorded in manifests and records with value, comparison
and threshold; what is in braces below is filled in when the gate is measured.

"""
_CONSTRUCTORS = {"Gate": "", "none_of": "equal 0", "at_most": "at most"}


def _base(name: str, bases: dict[str, str]) -> str:
    """The class of `errors` that a class derives from, for the exit code; empty if it is none of them."""
    while name and not hasattr(errors, name):
        name = bases.get(name, "")
    return name


def errors_page() -> str:
    """Exit codes, then every error of each."""
    defined = {name: getattr(errors, name) for name in vars(errors) if name.endswith("Error")}
    codes = [("0", "", "Done."), (str(click.UsageError.exit_code), "`UsageError`", "Wrong usage of the command line.")]
    for name, kind in defined.items():
        codes.append((str(kind.exit_code), code(name), cell((kind.__doc__ or "").partition("\n")[0])))
    text = _ERRORS + table(("exit code", "class", "meaning"), sorted(codes, key=lambda row: int(row[0])))
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    for kind, row in _raised():
        found.setdefault(kind, []).append(row)
    for name in sorted(found, key=lambda name: defined[name].exit_code):
        text += f"\n## {name}\n\nExit code {defined[name].exit_code}.\n\n"
        text += table(("what", "why", "fix", "module"), found[name])
    return text


def _raised() -> Iterator[tuple[str, tuple[str, str, str, str]]]:
    bases = {
        node.name: ast.unparse(node.bases[0]).rpartition(".")[2]
        for module in modules() for node in module.nodes if isinstance(node, ast.ClassDef) and node.bases
    }  # fmt: skip
    for module in modules():
        for name, call in called(module.nodes):
            kind = _base(name, bases)
            given = {one.arg: one.value for one in call.keywords}
            what = call.args[0] if call.args else given.get("what")
            if kind.endswith("Error") and what is not None:
                parts = (sentence(part) for part in (what, given.get("why"), given.get("fix")))
                yield kind, (*map(cell, parts), code(module.path))


def gates_page() -> str:
    """Verdicts, and the gates that the code measures by module."""
    meaning = {name: note for name, note in zip(Verdict, _notes(Verdict), strict=True)}
    text = _GATES + "## Verdicts\n\nFrom best to worst; the last three end with exit code 14.\n\n"
    text += table(("verdict", "meaning"), [(code(name), cell(meaning[name])) for name in Verdict])
    return text + "\n## Gates\n\n" + table(("gate", "must be", "detail", "module"), _gates())


def _notes(kind: type[Verdict]) -> list[str]:
    """The docstrings below the members of an enumeration, in their order."""
    for module in modules():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
                found = [one.value.value for one in node.body if isinstance(one, ast.Expr)
                         and isinstance(one.value, ast.Constant)]  # fmt: skip
                return [str(text) for text in found[1:]]  # the first is that of the class
    raise LookupError(kind.__name__)


def _gates() -> list[tuple[str, str, str, str]]:
    found: dict[tuple[str, str], tuple[str, str, str, str]] = {}
    for module in modules():
        makers = {**_CONSTRUCTORS, **_local_makers(module.tree)}
        for name, call in called(module.nodes):
            if name not in makers or module.path == "fp8pipe/artifact/gate.py":
                continue
            given = {one.arg: one.value for one in call.keywords}
            title = call.args[0] if call.args else given.get("name")
            if isinstance(title, ast.Constant | ast.JoinedStr):
                named, required = sentence(title), _required(makers[name], call)
                row = (cell(named), cell(required), cell(_detail(given)), code(module.path))
                found.setdefault((module.path, named), row)
    return list(found.values())


def _local_makers(tree: ast.Module) -> dict[str, str]:
    """Functions of a module that return a gate and take its name first, with what they require of its value."""
    makers = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) == "Gate":
            inner = next((call for name, call in called(ast.walk(node)) if name in _CONSTRUCTORS), None)
            if node.args.args and node.args.args[0].arg == "name" and inner is not None:
                made = ast.unparse(inner.func)
                makers[node.name] = _required(_CONSTRUCTORS.get(made, ""), inner)
    return makers


def _required(known: str, call: ast.Call) -> str:
    if known:
        return known
    given = {one.arg: one.value for one in call.keywords}
    named = ast.unparse(given["comparison"]).rpartition(".")[2] if "comparison" in given else "EQUAL"
    comparison = named.replace("_", " ").lower()
    return f"{comparison} {sentence(given.get('threshold')) or '0'}"


def _detail(given: dict[str | None, ast.expr]) -> str:
    detail = given.get("detail")
    return sentence(detail) if isinstance(detail, ast.Constant | ast.JoinedStr) else ""
