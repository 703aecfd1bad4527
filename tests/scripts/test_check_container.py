"""Images built and served by a container engine: what is refused, and, where `FP8PIPE_CONTAINER` says how, all checks.

`FP8PIPE_CONTAINER` holds options of the script, for instance `--engine podman`.
"""

from __future__ import annotations

import os
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
from records import write_sound_record
from script_modules import load_script
from tiny_exports import write_export

main = load_script(Path(__file__).resolve().parents[2] / "scripts" / "check_container.py").main
OPTIONS = os.environ.get("FP8PIPE_CONTAINER")


def test_what_cannot_be_checked_is_refused(tmp_path, capsys):
    export = tmp_path / "export"
    export.mkdir()
    assert main([str(export)]) == 10
    assert "has no validation record" in capsys.readouterr().err
    (tmp_path / "export.validation.json").write_text("{}")
    assert main([str(export), "--engine", "no-such-engine"]) == 11
    assert "no-such-engine is not installed" in capsys.readouterr().err
    assert main([str(export), "--engine", "false"]) == 11  # an engine that cannot build
    assert "false build failed with exit code 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(OPTIONS is None, reason="FP8PIPE_CONTAINER does not say how to build images")
def test_the_image_serves_what_was_exported(tmp_path, capsys):
    export = write_export(tmp_path, "timm-vit")
    write_sound_record(export, versions={"onnxruntime": version("onnxruntime")})
    assert main([str(export), *shlex.split(OPTIONS or "")]) == 0
    assert capsys.readouterr().out.count("pass  ") == 8
