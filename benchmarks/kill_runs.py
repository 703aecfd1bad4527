"""Kill a run at random times, resume it, and compare all digests with those of an uninterrupted run.

    python benchmarks/kill_runs.py --recipe recipes/end-to-end.yaml --kills 20 --jobs 2 --work runs/kills \\
        --set smollm2.steps=3 --set smollm2.rank=8 --set smollm2.heldout_limit=4 --set smollm2.final_merge_batches=1 \\
        --set smollm2.save_every=1 --set digits.images=8 --set digits.calibration=gaussian \\
        --set 'digits.distill={steps: 8, save_every: 2}' --set 'smollm2.gates=[]' --set 'digits.gates=[]'

The gates of the models are removed, as models from such short runs would not pass them.

SIGKILL is sent only to the process of `fp8pipe run`, to test that its stages and engines end as well. The time of each
kill is uniformly distributed over the duration of a whole run. If a run completes before its time has come, its digests
are compared and a new run is started.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def command(options, directory):
    sets = [part for value in options.overrides for part in ("--set", value)]
    program = [sys.executable, "-P", "-m", "fp8pipe", "run", str(options.recipe)]
    return [*program, "--output", str(directory), "--no-report", "--jobs", str(options.jobs), *sets]


def contents(directory):
    """The content digest of every stage of a run, and the sha256 of every file that is not volatile, by name."""
    found = {}
    for stage in json.loads((directory / "run.json").read_text())["stages"]:
        found[stage["name"]] = stage["content"]
        manifest = directory / stage["output"] / "manifest.json"
        if manifest.is_file():
            files = json.loads(manifest.read_text())["files"]
            found |= {f"{stage['name']}/{f['path']}": f["sha256"] for f in files if not f["volatile"]}
    return found


def running(directory):
    """The name of the stage that was running when the run was killed: the last one started that is not recorded."""
    try:
        ended = {stage["name"] for stage in json.loads((directory / "run.json").read_text())["stages"]}
    except OSError:
        ended = set()
    begun = sorted((directory / "stages").glob("*.key"), key=lambda path: path.stat().st_mtime)
    return next((path.stem for path in reversed(begun) if path.stem not in ended), "between stages")


def main():
    """Run the recipe once, then kill and resume runs of it; returns 1 if a digest differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="stages side by side (1)")
    parser.add_argument("--work", type=Path, required=True, help="directory; emptied")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="STAGE.KEY=VALUE")
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    directory = options.work / "run"  # the same directory for all runs, as some settings contain its path
    started = time.monotonic()
    subprocess.run(command(options, directory), check=True, stderr=subprocess.DEVNULL)
    length, expected = time.monotonic() - started, contents(directory)
    print(f"left alone: {length:.0f} s, {len(expected)} digests", flush=True)
    moments, different, compared = random.Random(options.seed), 0, 0
    shutil.rmtree(directory)
    kills = 0
    while kills < options.kills:
        process = subprocess.Popen(command(options, directory), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(1, length))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            print(f"kill {kills}: {running(directory)}", flush=True)
            continue
        compared += 1
        different += report(directory, expected)
        shutil.rmtree(directory)
    subprocess.run(command(options, directory), check=True, stderr=subprocess.DEVNULL)
    different += report(directory, expected)
    print(f"{kills} kills, {compared + 1} runs that ended, {different} digests that differ")
    return 1 if different else 0


def report(directory, expected):
    """Compare a completed run with the expected digests, print the names of those that differ, and return how many."""
    found = contents(directory)
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    print(f"ended: {len(found)} digests, differing: {', '.join(wrong) or 'none'}", flush=True)
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
