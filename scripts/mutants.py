"""Mutation testing of the code that verifies, validates and quantizes: a test must detect each mutant.

A mutant is a module with one small edit of its syntax tree (`mutations.py`). `scripts/mutants.toml` lists, for each
module, its tests and the number of mutants to sample, and explains the survivors that are accepted. The sample depends
only on the seed. All tests run in a copy of the source tree. This process imports the libraries once and forks for
every mutant, so that a mutant takes only the time of its tests.

    python scripts/mutants.py                     the whole sample; writes docs/mutants.md and build/mutants.json
    python scripts/mutants.py --modules artifact/gate --count 40 --seed 3     more mutants of one module; no page
    python scripts/mutants.py --only 3f2a         run one mutant again, by a prefix of its name, and show the output

Exit code 1: more than 5 % of the mutants survive, or a survivor has no explanation.
"""

from __future__ import annotations

import argparse
import gc
import importlib
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
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from mutations import Mutant, mutants_of

ROOT = Path(__file__).resolve().parent.parent
TABLE, PAGE, REPORT = ROOT / "scripts/mutants.toml", ROOT / "docs/mutants.md", ROOT / "build/mutants.json"
MOST_SURVIVORS = 0.05
# Imported before the first fork, because the tests would import them in every run.
LIBRARIES = (
    "numpy", "torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxruntime", "safetensors.torch", "pydantic", "click",
    "hypothesis", "fastapi", "prometheus_client", "PIL.Image", "httpx", "tokenizers", "transformers", "pytest",
    *(f"transformers.models.{family}.modeling_{family}" for family in ("llama", "qwen2", "gpt2", "auto")),
)  # fmt: skip
PACKAGES = ("fp8pipe", "pipeline", "exporters", "validation", "serving", "calibration")
# Without the cache plugin and the final garbage collection of unraisableexception, a run is a second shorter.
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
SLOW_TOO = "not vllm and not gpu"
QUICK = f"{SLOW_TOO} and not slow"


def sample(table: dict, modules: list[str], count: int | None, seed: int) -> list[Mutant]:
    """Draw a reproducible sample of mutants.

    Args:
        table: the contents of scripts/mutants.toml.
        modules: only modules whose path contains one of these strings; all if empty.
        count: mutants per module; None takes the module's own number from `table`.
        seed: seed of the sample.
    """
    drawn = []
    for module, entry in table["modules"].items():
        if modules and not any(part in module for part in modules):
            continue
        found = mutants_of(module, (ROOT / module).read_bytes())
        random.Random(f"{seed}:{module}").shuffle(found)
        drawn += found[: count or entry["count"]]
    return drawn


def copy_tree(place: Path) -> None:
    """Copy every file that git tracks, or would add, to `place`."""
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)


def import_libraries() -> ModuleType:
    """Import the libraries that the tests use, but unload the project's own modules, which each test run imports anew.

    Returns:
        The module that declares torchvision's operators. The caller must keep it, since they are removed with it.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.environ["FP8PIPE_TEST_BREADTH"] = "long"  # run the tests with all their cases
    sys.path.insert(0, str(ROOT))
    compat = importlib.import_module("fp8pipe.models.compat")
    compat.declare_torchvision_operators()
    for name in LIBRARIES:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()
    return compat


def run_tests(place: Path, entry: dict, limit_s: float, log: Path, *, keep_compiled: bool) -> str:
    """Run the tests of a module with pytest, in a fork of this process.

    Args:
        place: root of the copied source tree.
        entry: the module's entry in scripts/mutants.toml.
        limit_s: time limit, seconds; the process and all its children are killed then.
        log: file for the output.
        keep_compiled: whether Python may write bytecode files into the tree.

    Returns:
        `passed`, `failed` or `too long`.
    """
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

        marked = SLOW_TOO if entry.get("slow") else QUICK
        code = pytest.main([*PYTEST, "-m", marked, *entry["tests"]])
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
    """Kill the remaining processes of a test run."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return


def write_page(results: list[dict], table: dict, seed: int) -> None:
    """Write docs/mutants.md: the number of mutants and survivors per module, and an explanation of each survivor."""
    rows: dict[str, list[int]] = {}
    for result in results:
        row = rows.setdefault(result["module"], [0, 0])
        row[0] += 1
        row[1] += result["result"] == "passed"
    left = [result for result in results if result["result"] == "passed"]
    lines = [
        "# Mutation testing", "",
        "`make mutants` makes mutants of the modules that verify, validate and quantize: one small edit each.",
        "A mutant is killed when a test of its module fails, and survives when all pass. This page is written by that",
        "command; the explanations of survivors are in `scripts/mutants.toml`.", "",
        f"Seed {seed}: {len(results)} mutants, {len(left)} survived ({len(left) / max(len(results), 1):.1%}; "
        f"the limit is {MOST_SURVIVORS:.0%}).", "",
        "| module | mutants | survived |", "|---|---|---|",
        *(f"| `{module}` | {drawn} | {alive} |" for module, (drawn, alive) in rows.items()), "",
        "## Survivors", "",
    ]  # fmt: skip
    for result in left:
        reason = table.get("explained", {}).get(result["name"], "**not explained**")
        before, after = (result[key].replace("`", "'")[:160] for key in ("before", "after"))
        where = f"`{result['where']}`" if result["where"] else "module level"
        lines.append(f"- `{result['name']}` {result['module']}, {where}: `{before}` became `{after}`. {reason}")
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main() -> int:
    """Run from the command line; returns 0 if at most 5 % of the mutants survive and every survivor is explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="*", default=[], help="only modules whose path contains one of these")
    parser.add_argument("--count", type=int, help="number of mutants per module (default: as in scripts/mutants.toml)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only mutants whose name starts with this")
    parser.add_argument("--list", action="store_true", help="only print the sample")
    parser.add_argument("--minutes", type=float, default=90, help="start no mutant after this many minutes")
    options = parser.parse_args()
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    drawn = sample(table, options.modules, 10**6 if options.only else options.count, options.seed)
    drawn = [mutant for mutant in drawn if mutant.name.startswith(options.only)]
    if options.list:
        print("\n".join(f"{m.name} {m.module}:{m.line} {m.where}: {m.before} -> {m.after}" for m in drawn))
        return 0
    started, results, limits = time.monotonic(), [], {}
    _kept = import_libraries()
    with tempfile.TemporaryDirectory(prefix="fp8pipe-mutants-") as scratch:
        place, log = Path(scratch) / "tree", Path(scratch) / "log"
        copy_tree(place)
        for number, mutant in enumerate(drawn, 1):
            if time.monotonic() - started > 60 * options.minutes:
                print(f"out of time: {len(drawn) - number + 1} mutants were not tried")
                break
            tests, path = table["modules"][mutant.module], place / mutant.module
            if mutant.module not in limits:
                before = time.monotonic()
                if run_tests(place, tests, 1200, log, keep_compiled=True) != "passed":
                    sys.exit(f"the tests of {mutant.module} fail on the unchanged module:\n{log.read_text()[-3000:]}")
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
    print(f"{len(left)} of {len(results)} mutants survived; not explained: {', '.join(unexplained) or 'none'}")
    return int(bool(unexplained) or len(left) > MOST_SURVIVORS * len(results))


if __name__ == "__main__":
    sys.exit(main())
