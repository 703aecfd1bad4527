"""Measure the cost of exact INT8 sums in ONNX Runtime on a processor without VNNI.

Without VNNI, pairs of 8-bit products are added in 16 bits, which can saturate; the option `session.x64quantprecision`
makes the sums exact but takes time. The INT8 graphs of fp8pipe and of ONNX Runtime's `quantize_static` are timed with
and without this option, in turn with the float graph, and the time in ONNX Runtime is broken down by operator. The
graphs are those that `onnx_peers.py` writes to its `--work`.

    python benchmarks/onnx_sums.py --work runs/peers
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime

EXACT = {"session.x64quantprecision": "1"}
CALLS = 15  # number of profiled calls


def session(path, entries, profile=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def by_operator(path, entries, pixels, work):
    """Milliseconds per call that ONNX Runtime spends in each type of operator (a `Counter`).

    Args:
        path: the graph.
        entries: session configuration entries.
        pixels: input of the graph.
        work: directory for the profile.
    """
    running = session(path, entries, work / "profile")
    for _ in range(CALLS):
        running.run(None, {running.get_inputs()[0].name: pixels})
    profile, spent = Path(running.end_profiling()), Counter()
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"] / 1000 / CALLS
    profile.unlink()
    return spent


def main():
    """Time all variants, then profile the float graph and fp8pipe's INT8 graph with exact sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory with the graphs of onnx_peers.py")
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    ours, peer = options.work / "ours-int8-onnx" / "model.onnx", options.work / "onnxruntime-u8.onnx"
    files = {
        "float": (options.work / "float.onnx", {}), "ours, exact": (ours, EXACT), "ours, saturating": (ours, {}),
        "quantize_static, exact": (peer, EXACT), "quantize_static, saturating": (peer, {}),
    }  # fmt: skip
    running = {name: session(*file) for name, file in files.items()}
    shape = [side if isinstance(side, int) else 1 for side in running["float"].get_inputs()[0].shape]
    pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    times = {name: [] for name in running}
    for turn in range(options.rounds + 1):
        for name, one in running.items():
            began = time.perf_counter()
            one.run(None, {one.get_inputs()[0].name: pixels})
            if turn:  # the first call warms up
                times[name].append(time.perf_counter() - began)
    for name, found in times.items():
        ratio = median(a / b for a, b in zip(times["float"], found, strict=True))
        print(f"{name:28} {1000 * median(found):6.1f} ms  {ratio:.2f}x")
    for name in ("float", "ours, exact"):
        spent = by_operator(*files[name], pixels, options.work)
        shown = ", ".join(f"{operator} {value:.1f}" for operator, value in spent.most_common(5))
        print(f"{name}: {sum(spent.values()):.1f} ms in operators: {shown}")


if __name__ == "__main__":
    main()
