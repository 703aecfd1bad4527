"""Exporting holds some blocks of rows in memory, not a matrix, a shard or a model: the kernel's own measurement."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8pipe.models.language.structure import read_structure

# Anonymous memory, sampled: the resident peak would count pages of the source's mapped file, which the kernel keeps or
# drops as it likes.
CHILD = """
import sys, threading, time, torch
from pathlib import Path
from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.models.language.structure import read_structure
def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024
def watch():
    while True:
        most[0] = max(most[0], anonymous())
        time.sleep(0.002)
torch.set_num_threads(1)
read_structure(Path(sys.argv[1]))  # transformers and the architecture are loaded before the measurement
before = anonymous()
most = [before]
threading.Thread(target=watch, daemon=True).start()
export_vllm(Path(sys.argv[1]), Path(sys.argv[2]), VllmExportOptions(format=sys.argv[3]))
print(most[0] - before)
"""
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_that_of_some_blocks(make_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    small = make_model("llama")
    config = json.loads((small / "config.json").read_text()) | LARGE
    config.pop("head_dim", None)
    (base / "config.json").write_text(json.dumps(config))
    shapes = read_structure(base).tensors
    tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model_bytes = (base / "model.safetensors").stat().st_size
    assert model_bytes > 200e6
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(base), str(tmp_path / "export"), "fp8"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout.split()[-1])
    # Blocks of 1 MiB in fp32, and what torch loads on first use: 17 MB were seen. Whole matrices, of which the largest
    # has 11.5 MB in fp32, took 70 to 125 MB.
    assert growth < 50e6, f"{growth / 1e6:.0f} MB for a model of {model_bytes / 1e6:.0f} MB"
