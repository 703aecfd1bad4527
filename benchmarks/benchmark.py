"""Measure this project against its peers, and write the figures as JSON and as a page of tables.

    python benchmarks/benchmark.py                    # all comparisons
    python benchmarks/benchmark.py --only vision      # one of them; may be repeated
    python benchmarks/benchmark.py --quick            # small sizes, to test the benchmark itself

Peers are installed into environments of their own (`--environments`) when they are first needed. A peer that cannot be
installed or fails is a row that says why. In every round all contenders take their turn; figures are medians, and
ratios are formed within a round. docs/performance.md explains the tables.

The output directory gets `benchmark.json`, `benchmark.md`, charts, and in `work/` the models, exports and logs, which
the next run replaces. Exit code 1 means that a contender of this project itself could not be measured.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comparison.environments import project
from comparison.harness import Settings, run_comparison
from comparison.page import names, render, write_page
from comparison.processes import ROOT
from comparison.results import Benchmark, Result

from fp8pipe.core.machine import describe_machine

# Each is a function `build(settings)` of the module; imported when it runs.
COMPARISONS = {
    "training": "comparison.training:build",
    "fp8-export": "comparison.fp8_export:build",
    "fp8-export-large": "comparison.fp8_export:build_large",
    "vision": "comparison.vision:build",
    "vllm": "comparison.vllm_cpu:build",
    "serving": "comparison.serving:build",
    "startup": "comparison.startup:build",
    "server-startup": "comparison.startup:build_server",
}
_SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "onnxruntime", "onnx", "numpy")


def commit() -> str:
    """The commit of the working tree, with + if tracked files differ from it; empty outside a repository."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    return "" if head.returncode else head.stdout.strip() + ("+" if changed.returncode else "")


def run(chosen: list[str], settings: Settings, output: Path) -> Benchmark:
    """Run comparisons one after the other; the files are written again after each.

    Args:
        chosen: keys of `COMPARISONS`.
        settings: shared settings.
        output: the directory to write to.

    Returns:
        The results.
    """
    results: list[Result] = []
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *sys.argv]),
        "quick": settings.quick, "commit": commit(), "machine": describe_machine(),
        "versions": {"python": sys.version.split()[0], **project(*_SHOWN).versions()}, "load": os.getloadavg()[0],
    }  # fmt: skip
    found = Benchmark(**about, results=[])
    for name in chosen:
        module, _, function = COMPARISONS[name].partition(":")
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append(run_comparison(name, getattr(import_module(module), function), settings))
        found = Benchmark(**about, results=results)
        (output / "benchmark.json").write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
        write_page(found, output)
        print(render(results[-1]), flush=True)
    return found


def main() -> None:
    """Parse the command line, run, and exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=COMPARISONS, help="a comparison; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, to test the benchmark itself")
    parser.add_argument("--rounds", type=int, help="number of rounds; default: that of each comparison")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of an engine")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-peers", help="environments of the peers")
    options = parser.parse_args()
    if (options.rounds is not None and options.rounds < 1) or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    work = (options.output / ("work-quick" if options.quick else "work")).absolute()
    shutil.rmtree(work, ignore_errors=True)  # what earlier code of this project wrote must not be measured
    work.mkdir(parents=True)
    settings = Settings(work, options.environments.absolute(), options.threads, options.rounds, options.quick)
    found = run(options.only or list(COMPARISONS), settings, options.output)
    broken = names(found.results)
    if broken:
        sys.exit(f"not measured, in whole or in this project's part: {', '.join(broken)}")


if __name__ == "__main__":
    main()
