"""torchvision's operators are declared only where its own library cannot bring them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from fp8pipe.models.compat import declare_torchvision_operators, import_transformers
declare_torchvision_operators()
declare_torchvision_operators()
print(hasattr(torch.ops.torchvision, "nms"), hasattr(torch.ops.torchvision, "qnms"))
if len(sys.argv) > 2:
    print(import_transformers().LlamaConfig.__name__)
"""


def run(*arguments: object) -> list[str]:
    command = [sys.executable, "-c", CHECK, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def broken_torchvision(tmp_path: Path) -> Path:
    """A package of that name whose library does not load, as the CUDA build's on a CPU build of torch."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_C.so").write_bytes(b"not a library")
    return tmp_path


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch needs no declaration")
def test_declared_when_the_library_does_not_load(broken_torchvision):
    assert run(broken_torchvision) == ["True True"]


def test_without_timm_the_fix_is_named(tmp_path: Path):
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from fp8pipe.models.compat import import_timm\n"
        "try:\n    import_timm()\nexcept Exception as error:\n    print(error.exit_code, error.fix)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("11 pip install")
    assert "fp8pipe[vit]" in done.stdout


def test_transformers_imports():
    assert run("/", "transformers")[-1] == "LlamaConfig"
