"""The Python interface: light to import, the same settings and refusals as the command line."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import fp8pipe
from fp8pipe.core.errors import ConfigurationError


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, fp8pipe\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'click', 'onnx', 'pipeline', 'exporters'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "fp8pipe.finetune, fp8pipe.export\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [name for name in fp8pipe.__all__ if name != "__version__"])
def test_every_name_is_there_and_documented(name: str):
    found = getattr(fp8pipe, name)
    assert inspect.isfunction(found)
    assert inspect.getdoc(found)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        fp8pipe.tune  # noqa: B018 (asked for its error)


def test_wrong_settings_are_refused_all_at_once(tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        fp8pipe.finetune("sample:smollm2", "sample:chatterbot", tmp_path / "x", steps=0, leraning_rate=1.0)
    assert "steps" in caught.value.why
    assert "leraning_rate: unknown key, did you mean 'learning_rate'?" in caught.value.why
    with pytest.raises(ConfigurationError, match=r"sizzle|unknown"):
        fp8pipe.quantize_vit("sample:vit-digits", "w8a8", tmp_path / "x", sizzle=1)


def test_an_unknown_target_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="--target gguf does not accept this source"):
        fp8pipe.export(tmp_path, "gguf", tmp_path / "x")
