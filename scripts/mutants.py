"""Mutation testing of the proof: one small fault at a time in the code that judges, and a test must notice.

`scripts/mutants.toml` says which tests cover which module, how many faults are drawn from it, and why a survivor may
survive. A fault is one edit of the syntax tree; the sample follows from the seed. Everything happens in a copy of the
tree: this process imports the libraries once, and forks for every fault, so that a run costs only its tests.

    python scripts/mutants.py                     the whole sample; writes docs/mutants.md and build/mutants.json
    python scripts/mutants.py --modules artifact/gate --count 40 --seed 3     more of one module, no page
    python scripts/mutants.py --only 3f2a         one fault again, by the beginning of its name, with its output

Exit code 1: more than 5 % survive, or a survivor has no explanation.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE, PAGE, REPORT = ROOT / "scripts/mutants.toml", ROOT / "docs/mutants.md", ROOT / "build/mutants.json"
MOST_SURVIVORS = 0.05
# Imported before the first fork: what the tests would import anyway, each time.
LIBRARIES = ("numpy", "torch", "onnx", "onnx_ir", "onnxruntime", "safetensors.torch", "pydantic", "click", "hypothesis",
             "fastapi", "prometheus_client", "PIL.Image", "httpx", "transformers", "tokenizers", "pytest")  # fmt: skip

COMPARE = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
              ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd}  # fmt: skip
TWINS = {"min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin", "amin": "amax"}
# Without plugins, and without what looks for forgotten objects at the end, a run costs a second less.
PYTEST = (
    "-x",
    "-q",
    "-m",
    "not slow and not vllm and not gpu",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:unraisableexception",
)
COMMUTE = ("min", "max", "equal", "same_bits", "maximum")
# What these are given or do is for people to read, or changes nothing that is judged.
SPOKEN_CALLS = ("Field", "warn", "warning", "info", "debug", "error", "exception", "advance", "print", "getLogger")
SPOKEN_KEYWORDS = ("description", "detail", "strict", "encoding", "indent", "fix", "why", "help", "alias", "parents")
SPOKEN_NAMES = ("__all__", "__slots__")


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: digest of all else but the line, so that it stays the same when other code moves.
        module: the file, relative to the root.
        line: where it is now.
        where: the function.
        operator: kind of fault.
        before: the code that is there.
        after: the code in its place.
        start: byte offset in the file.
        end: the same, behind it.
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
    """Every fault that the operators find in a file."""
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    seen: dict[str, int] = {}
    made = []
    for where, node, operator, after in _walk(ast.parse(source), ""):
        start, end = (offsets[row - 1] + column for row, column in
                      ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)))  # fmt: skip
        before = " ".join(source[start:end].decode().split())
        key = f"{module}:{where}:{operator}:{before}:{after}"
        seen[key] = seen.get(key, 0) + 1
        name = hashlib.sha256(f"{key}:{seen[key]}".encode()).hexdigest()[:10]
        made.append(Mutant(name, module, node.lineno, where, operator, before, after, start, end))
    return made


def _walk(node: ast.AST, where: str) -> Iterator[tuple[str, ast.expr | ast.stmt, str, str]]:
    """(function, node, operator, code in its place), skipping annotations, messages and what is for people only."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        where = f"{where}.{node.name}".lstrip(".")
        for child in node.body:
            yield from _walk(child, where)
        return
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield from _walk(node.value, where)
        return
    if isinstance(node, ast.JoinedStr):
        return
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in SPOKEN_NAMES:
        return
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        return
    if isinstance(node, (ast.Assign, ast.Return)) and isinstance(node.value, ast.Tuple):
        for child in node.value.elts:  # without one of them the unpacking fails, which shows nothing
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
    """The faults of one node."""
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
    if isinstance(value, (ast.Compare, ast.BoolOp)) or (
        isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)
    ):
        return ["True", "False"]
    if isinstance(value, (ast.List, ast.ListComp)):
        return ["[]"]
    if isinstance(value, ast.JoinedStr):
        return ["''"]
    if isinstance(value, ast.Constant):
        return {True: ["False"], False: ["True"]}.get(value.value, []) if isinstance(value.value, bool) else []
    return ["None"]


def _code(node: ast.AST) -> str:
    text = ast.unparse(ast.fix_missing_locations(node))
    return f"({text})" if isinstance(node, ast.expr) else text


def sample(table: dict, modules: list[str], count: int | None, seed: int) -> list[Mutant]:
    """The faults to try: so many of each module, and the same ones each time."""
    drawn = []
    for module, entry in table["modules"].items():
        if modules and not any(part in module for part in modules):
            continue
        found = mutants_of(module, (ROOT / module).read_bytes())
        random.Random(f"{seed}:{module}").shuffle(found)
        drawn += found[: count or entry["count"]]
    return drawn


def copy_tree(place: Path) -> None:
    """Every file that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)


def run_tests(place: Path, tests: list[str], limit_s: float, log: Path, *, keep_compiled: bool) -> str:
    """`passed`, `failed` or `too long`: pytest in a fork of this process, with everything it started."""
    child = os.fork()
    if child == 0:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        os.chdir(place)
        sys.path.insert(0, str(place))
        sys.dont_write_bytecode = not keep_compiled
        os.environ |= {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "" if keep_compiled else "1"}
        import pytest

        code = pytest.main([*PYTEST, *tests])
        sys.stdout.flush()
        os._exit(int(code))
    ends = time.monotonic() + limit_s
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _end(child)
            return "passed" if status == 0 else "failed"
        time.sleep(0.05)
    _end(child)
    os.waitpid(child, 0)
    return "too long"


def _end(child: int) -> None:
    """End what a run of tests has left."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def write_page(results: list[dict], table: dict, seed: int) -> None:
    """The committed table."""
    rows: dict[str, list[int]] = {}
    for result in results:
        row = rows.setdefault(result["module"], [0, 0])
        row[0] += 1
        row[1] += result["result"] == "passed"
    left = [result for result in results if result["result"] == "passed"]
    lines = [
        "# Mutation testing of the proof", "",
        "`make mutants` puts one small fault at a time into the code that judges, and runs the tests of that module:",
        "one of them must fail. This page is written by it; the reasons are in `scripts/mutants.toml`.", "",
        f"Seed {seed}: {len(results)} faults, {len(left)} survive ({len(left) / max(len(results), 1):.1%}; "
        f"at most {MOST_SURVIVORS:.0%} may).", "",
        "| module | faults | survive |", "|---|---|---|",
        *(f"| `{module}` | {drawn} | {alive} |" for module, (drawn, alive) in rows.items()), "",
        "## Survivors", "",
    ]  # fmt: skip
    for result in left:
        reason = table.get("explained", {}).get(result["name"], "**not explained**")
        before, after = (result[key].replace("`", "'")[:160] for key in ("before", "after"))
        lines.append(
            f"- `{result['name']}` {result['module']}, `{result['where']}`: `{before}` became `{after}`. {reason}"
        )
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main() -> int:
    """Try the sample; 0 where few enough survive and each is explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="*", default=[], help="parts of modules' paths")
    parser.add_argument("--count", type=int, help="faults of each module; as the table says where it is not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="the beginning of one fault's name")
    parser.add_argument("--list", action="store_true", help="show the sample, run nothing")
    parser.add_argument("--minutes", type=float, default=90, help="begin no fault after so long")
    options = parser.parse_args()
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    drawn = sample(table, options.modules, 10**6 if options.only else options.count, options.seed)
    drawn = [mutant for mutant in drawn if mutant.name.startswith(options.only)]
    if options.list:
        print("\n".join(f"{m.name} {m.module}:{m.line} {m.where}: {m.before} -> {m.after}" for m in drawn))
        return 0
    started, results, limits = time.monotonic(), [], {}
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in LIBRARIES:
        __import__(name)
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="fp8pipe-mutants-") as scratch:
        place, log = Path(scratch) / "tree", Path(scratch) / "log"
        copy_tree(place)
        for number, mutant in enumerate(drawn, 1):
            if time.monotonic() - started > 60 * options.minutes:
                print(f"out of time: {len(drawn) - number + 1} faults were not tried")
                break
            tests, path = table["modules"][mutant.module]["tests"], place / mutant.module
            if mutant.module not in limits:
                before = time.monotonic()
                if run_tests(place, tests, 1200, log, keep_compiled=True) != "passed":
                    sys.exit(f"the tests of {mutant.module} fail without a fault:\n{log.read_text()[-3000:]}")
                limits[mutant.module] = 30 + 4 * (time.monotonic() - before)
            whole, before = path.read_bytes(), time.monotonic()
            path.write_bytes(whole[: mutant.start] + mutant.after.encode() + whole[mutant.end :])
            for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
                compiled.unlink()
            ended = run_tests(place, tests, limits[mutant.module], log, keep_compiled=False)
            path.write_bytes(whole)
            results.append(asdict(mutant) | {"result": ended, "seconds": round(time.monotonic() - before, 1)})
            mark = "SURVIVES" if ended == "passed" else ended
            print(f"{number}/{len(drawn)} {mark} {mutant.name} {mutant.module}:{mutant.line} {mutant.where}: "
                  f"{mutant.before[:90]} -> {mutant.after[:90]}", flush=True)  # fmt: skip
            if options.only:
                print(log.read_text()[-3000:])
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps({"seed": options.seed, "mutants": results}, indent=2) + "\n", encoding="utf-8")
    if not (options.modules or options.only or options.count) and len(results) == len(drawn):
        write_page(results, table, options.seed)
    left = [result for result in results if result["result"] == "passed"]
    unexplained = [result["name"] for result in left if result["name"] not in table.get("explained", {})]
    print(f"{len(left)} of {len(results)} survive; not explained: {', '.join(unexplained) or 'none'}")
    return int(bool(unexplained) or len(left) > MOST_SURVIVORS * len(results))


if __name__ == "__main__":
    sys.exit(main())
