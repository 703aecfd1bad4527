"""torchvision can be imported beside a CPU build of torch, and what declares its operators waits until then."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PLUGIN = Path(__file__).parents[3] / "serving" / "vllm_plugin"
CHECK = """
import sys
sys.path[:0] = sys.argv[1:]
from fp8pipe_vllm_cpu.operators import install
install()
install()
print("torch" in sys.modules, sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path))
import torchvision
print(torchvision.seen, sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path))
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch needs no declaration")
def test_operators_are_declared_when_torchvision_is_imported(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "_C.so").write_bytes(b"built for another torch")
    text = 'import torch\nseen = [hasattr(torch.ops.torchvision, name) for name in ("nms", "qnms")]\n'
    (package / "__init__.py").write_text(text)
    command = [sys.executable, "-c", CHECK, str(PLUGIN), str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == ["False 1", "[True, True] 0"]
