"""The mutation operators of `scripts/mutants.py`: each makes one small edit of a module's syntax tree."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

COMPARE = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
              ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd}  # fmt: skip
TWINS = {"min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin", "amin": "amax"}
COMMUTE = ("min", "max", "equal", "same_bits", "maximum")
# Calls, keyword arguments and assignments that are not mutated, since they only affect messages, or no result at all.
SPOKEN_CALLS = ("Field", "warn", "warning", "info", "debug", "error", "exception", "advance", "print", "getLogger")
SPOKEN_KEYWORDS = ("description", "detail", "strict", "encoding", "indent", "fix", "why", "help", "alias", "parents")
SPOKEN_NAMES = ("__all__", "__slots__")


@dataclass(frozen=True)
class Mutant:
    """One edit of a module.

    Attributes:
        name: short digest of the edit without its position, so that it stays the same if other code moves.
        module: path of the file, relative to the repository.
        line: its current line number.
        where: qualified name of the enclosing function; empty at module level.
        operator: kind of edit.
        before: the original code.
        after: the code that replaces it.
        start: byte offset of the original code in the file.
        end: byte offset of the end of the original code.
    """

    name: str
    module: str
    line: int
    where: str
    operator: str
    before: str
    after: str
    start: int
    end: int


def mutants_of(module: str, source: bytes) -> list[Mutant]:
    """All mutants of a file that are syntactically valid.

    Args:
        module: path of the file, used in the mutants' names.
        source: the contents of the file.
    """
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    seen: dict[str, int] = {}
    made = []
    for where, node, operator, after in _walk(ast.parse(source), ""):
        start, end = (offsets[row - 1] + column for row, column in
                      ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)))  # fmt: skip
        try:
            compile(source[:start] + after.encode() + source[end:], module, "exec")
        except SyntaxError:
            continue
        before = " ".join(source[start:end].decode().split())
        key = f"{module}:{where}:{operator}:{before}:{after}"
        seen[key] = seen.get(key, 0) + 1
        name = hashlib.sha256(f"{key}:{seen[key]}".encode()).hexdigest()[:10]
        made.append(Mutant(name, module, node.lineno, where, operator, before, after, start, end))
    return made


def _walk(node: ast.AST, where: str) -> Iterator[tuple[str, ast.expr | ast.stmt, str, str]]:
    """Yield (function, node, operator, replacement code), skipping annotations, messages and other text."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        where = f"{where}.{node.name}".lstrip(".")
        for child in node.body:
            yield from _walk(child, where)
        return
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield from _walk(node.value, where)
        return
    spoken = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in SPOKEN_NAMES
    typing = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    if spoken or typing or isinstance(node, ast.JoinedStr):
        return
    if isinstance(node, (ast.Assign, ast.Return)) and isinstance(node.value, ast.Tuple):
        for child in node.value.elts:  # dropping an element would only make the unpacking fail, which any test detects
            yield from _walk(child, where)
        return
    if isinstance(node, (ast.expr, ast.stmt)):
        yield from ((where, *found) for found in _faults(node, where))
    if isinstance(node, ast.Raise):
        return
    if isinstance(node, ast.Call):
        if _called(node) in SPOKEN_CALLS:
            return
        for argument in (*node.args, *(k.value for k in node.keywords if k.arg not in SPOKEN_KEYWORDS)):
            yield from _walk(argument, where)
        yield from _walk(node.func, where)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, where)


def _called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def _faults(node: ast.expr | ast.stmt, where: str) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    """Yield (node to replace, operator, replacement code) for one node, without its children."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            swapped = [COMPARE[type(o)]() if p == place else o for p, o in enumerate(node.ops)]
            kind = "boundary" if isinstance(operator, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) else "comparison"
            yield node, kind, _code(ast.Compare(node.left, swapped, node.comparators))
            if kind == "boundary":
                flipped = [ast.Gt() if isinstance(o, (ast.Lt, ast.LtE)) else ast.Lt() for o in node.ops]
                yield node, "comparison", _code(ast.Compare(node.left, flipped, node.comparators))
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield node, "boolean", _code(ast.BoolOp(other, node.values))
        for place in range(len(node.values)):
            kept = node.values[:place] + node.values[place + 1 :]
            yield node, "boolean", _code(kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield node, "boolean", _code(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield node, "arithmetic", _code(ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right))
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield node, "constant", str(not node.value)
        elif isinstance(node.value, int):
            yield from ((node, "constant", f"({node.value + step})") for step in (1, -1))
        elif isinstance(node.value, float):
            yield node, "constant", repr(node.value * 2 or 1.0)
    elif isinstance(node, ast.Call):
        plain = not any(isinstance(a, ast.Starred) for a in node.args[:2])
        if len(node.args) >= 2 and plain and _called(node) not in ("isinstance", "getattr", *COMMUTE):
            a, b, *rest = node.args
            yield node, "arguments", _code(ast.Call(node.func, [b, a, *rest], node.keywords))
        if _called(node) in TWINS:
            twin = TWINS[_called(node)]
            func = ast.Name(twin) if isinstance(node.func, ast.Name) else ast.Attribute(node.func.value, twin)
            yield node, "boolean", _code(ast.Call(func, node.args, node.keywords))
    elif isinstance(node, (ast.List, ast.Tuple, ast.Set)) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
        if len(node.elts) >= 2 and where and not all(isinstance(e, ast.Constant) for e in node.elts):
            for place in range(len(node.elts)):
                yield node, "item", _code(type(node)(elts=node.elts[:place] + node.elts[place + 1 :]))
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield node.test, "condition", _code(ast.UnaryOp(ast.Not(), node.test))
        if isinstance(node, ast.If):
            yield node.test, "condition", "False"
    elif isinstance(node, ast.Return) and node.value is not None:
        yield from ((node, "return", f"return {value}") for value in _other_values(node.value))
    elif isinstance(node, (ast.Raise, ast.AugAssign, ast.Continue, ast.Break)):
        yield node, "statement", "pass"
    elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        if isinstance(node.value, (ast.Yield, ast.YieldFrom)):
            yield node, "statement", f"if False: {_code(node)}"
        elif not (isinstance(node.value, ast.Call) and _called(node.value) in SPOKEN_CALLS):
            yield node, "statement", "pass"


def _other_values(value: ast.expr) -> list[str]:
    truth = isinstance(value, (ast.Compare, ast.BoolOp))
    if truth or (isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)):
        return ["True", "False"]
    if isinstance(value, ast.Constant):
        return [str(not value.value)] if isinstance(value.value, bool) else []
    if isinstance(value, (ast.List, ast.ListComp)):
        return ["[]"]
    return ["''"] if isinstance(value, ast.JoinedStr) else ["None"]


def _code(node: ast.AST) -> str:
    text = ast.unparse(ast.fix_missing_locations(node))
    return f"({text})" if isinstance(node, ast.expr) else text
