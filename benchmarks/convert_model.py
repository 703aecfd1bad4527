"""Memory of `fp8pipe finetune` while it converts a large model to FALQON's base, killed half-way and resumed.

    python benchmarks/convert_model.py --work DIR                  # Llama-3.1-8B's shape: 27 GB of disk in all
    python benchmarks/convert_model.py --work DIR --shape small --whole

The checkpoint is that of `large_model.py`. The command runs with its defaults except for a smaller batch and one batch
of gradients, so that a CPU takes minutes for it; it is killed when it has written `--cut` of its files, started again
with --resume, and killed once the conversion is complete. `--whole` converts a second time without the first kill and
compares every file.

Printed are seconds on the clock, the peak of resident memory (`VmHWM`, which counts the mapped files that the system
keeps cached), the peak of anonymous memory (`RssAnon`), asked for every 50 ms, and the bytes of the base's files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from large_model import SHAPES, forget, make

TOKENS = 64


def convert(command, output, until):
    """Run until `until` is true of the folder of checkpoints, then kill; seconds, and peaks of memory."""
    began, resident, anonymous = time.monotonic(), 0, 0
    with (output.parent / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        while process.poll() is None and not until(output.with_name(f"{output.name}.partial") / "checkpoints"):
            text = Path(f"/proc/{process.pid}/status").read_text()
            if "VmHWM:" in text:
                resident = max(resident, int(text.split("VmHWM:")[1].split()[0]) * 1024)
                anonymous = max(anonymous, int(text.split("RssAnon:")[1].split()[0]) * 1024)
            time.sleep(0.05)
        if process.poll() is not None:
            sys.exit(f"it ended before:\n{Path(log.name).read_text()[-3000:]}")
        process.kill()
        process.wait()
    return time.monotonic() - began, resident, anonymous


def finished(folder):
    record = folder / "base.json"
    return json.loads(record.read_text())["files"] if record.is_file() else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers of the same widths")
    parser.add_argument("--initialisation", default="gradient")
    parser.add_argument("--cut", type=int, default=10)
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    shape = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    named = f"model-{options.shape}{f'-{options.layers}' if options.layers else ''}"
    model, data, config = (options.work / name for name in (named, "data.jsonl", "config.yaml"))
    make(model, shape)
    forget(model)
    line = {"prompt": "a b c d e f g h", "completion": " ".join("ijklmnopqrstuvwxyz")}
    data.write_text("".join(json.dumps({**line, "prompt": f"a {n}"}) + "\n" for n in range(64)))
    config.write_text("gradient_batches: 1\n")
    command = [sys.executable, "-P", "-m", "fp8pipe", "finetune", "--model", model, "--data", data, "--config", config,
               "--batch-size", 1, "--sequence-length", TOKENS, "--no-packing", "--device", "cpu",
               "--initialisation", options.initialisation]  # fmt: skip
    print(f"{'run':24}{'seconds':>9}{'resident':>11}{'anonymous':>11}{'base files':>12}", flush=True)
    found = {}
    for name, output, until in (
        ("cut", "cut", lambda folder: len(finished(folder)) >= options.cut),
        ("resumed", "cut", lambda folder: (folder / "run.json").is_file()),
        *([("whole", "whole", lambda folder: (folder / "run.json").is_file())] if options.whole else []),
    ):
        place = options.work / output
        seconds, *memory = convert([*map(str, command), "--output", str(place), "--resume"], place, until)
        folder = place.with_name(f"{output}.partial") / "checkpoints"
        found[name] = finished(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        peaks = "".join(f"{value / 1e9:8.2f} GB" for value in memory)
        print(f"{name:24}{seconds:9.1f}{peaks}{len(found[name]):5} {size / 1e9:.2f} GB", flush=True)
    if options.whole:
        print("files of a run that was not cut:", "equal" if found["whole"] == found["resumed"] else "DIFFERENT")
    for output in ("cut", "whole"):
        shutil.rmtree(options.work / f"{output}.partial", ignore_errors=True)


if __name__ == "__main__":
    main()
