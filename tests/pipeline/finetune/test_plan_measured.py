"""Plans against what then happens: real runs as processes, peak resident memory by the kernel, bytes on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from breadth import LONG, only_long

from fp8pipe.core.plan import can_measure

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not can_measure(), reason="peaks of memory are read from /proc")]
# A parent of its own, small: ru_maxrss of a child begins with what its parent held when it was forked.
RUN = """
import json, os, subprocess, sys
child = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
open(sys.argv[1], "w").write(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024]))
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-m", "fp8pipe", *map(str, arguments)]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def size(*roots: Path) -> int:
    total = 0
    for root in roots:
        for file in root.rglob("*"):
            try:
                total += file.stat().st_size if file.is_file() else 0
            except FileNotFoundError:  # renamed meanwhile
                continue
    return total


def planned(*arguments: object) -> dict:
    ended = subprocess.run(
        command(*arguments, "--dry-run", "--json"), capture_output=True, text=True, env=environment(), check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)["plan"]


def measured(output: Path, *arguments: object) -> tuple[int, int, int]:
    """Peak memory, most bytes on disk, bytes of the finished output."""
    answer, most, done = output.with_name("usage.json"), [0], threading.Event()
    partial = output.with_name(f"{output.name}.partial")

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], size(output, partial))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", RUN, str(answer), *command(*arguments)], env=environment(), check=True
        )
    finally:
        done.set()
        watcher.join()
    code, peak = json.loads(answer.read_text())
    assert code in (0, 14)  # a few steps may teach nothing, which is a failed gate: the artifact is there
    return peak, max(most[0], size(output)), size(output)


def compare(output: Path, *arguments: object) -> None:
    plan = planned(*arguments, "--output", output)
    assert not output.exists()
    assert not output.with_name(f"{output.name}.partial").exists()
    peak, disk, written = measured(output, *arguments, "--output", output)
    figures = {
        "memory": (plan["peak_memory_bytes"], peak),
        "disk": (plan["disk_bytes"], disk),
        "output": (plan["output_bytes"], written),
    }
    print({name: [f"{value / 1e6:.1f} MB" for value in pair] for name, pair in figures.items()})
    mapped = plan.get("mapped_bytes", 0)  # weights that may be in memory, too
    for name, (predicted, found) in figures.items():
        least, most = 0.8 * predicted, 1.2 * (predicted + (mapped if name == "memory" else 0))
        assert least <= found <= most, name


def test_finetuning_a_small_model(make_base, tmp_path):
    """Its activations are most of what it allocates, which is two fifths of its peak: they cannot be left out."""
    base = make_base(
        vocab_size=2048, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4
    )
    text = tmp_path / "text.jsonl"
    rows = [{"prompt": f"say {n}", "completion": f"{n} and so on " * 16} for n in range(120)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "config.yaml"
    config.write_text("{heldout_limit: 4, final_merge_batches: 16}")
    options = ("--rank", 8, "--steps", 2, "--batch-size", 16, "--sequence-length", 256, "--save-every", 1)
    compare(tmp_path / "out", "finetune", "--model", base, "--data", text, "--config", config, *options)


@only_long
def test_finetuning_smollm2(tmp_path):
    options = ("--steps", 2, "--batch-size", 4, "--sequence-length", 64)
    config = tmp_path / "config.yaml"
    config.write_text("{heldout_limit: 8, final_merge_batches: 4}")
    given = ("--model", "sample:smollm2", "--data", "sample:chatterbot", "--config", config, *options)
    compare(tmp_path / "out", "finetune", *given)


def test_quantizing_and_exporting_a_vit(tmp_path):
    options = ("--bits", "w4a8", "--images", 80, "--calibration", "gaussian", "--distill-steps", 3)
    artifact = tmp_path / "vit"
    compare(artifact, "quantize-vit", "--model", "sample:vit-digits", *options)
    compare(tmp_path / "onnx", "export", artifact, "--target", "onnx")
    if LONG:
        compare(tmp_path / "trt", "export", artifact, "--target", "trt", "--compute-capability", "8.9")
        compare(tmp_path / "repository", "serve-repository", tmp_path / "onnx")


def test_exporting_to_vllm(tmp_path):
    compare(tmp_path / "out", "export", "sample:smollm2", "--target", "vllm")
