"""What `serve-check` tells the service that it starts."""

from __future__ import annotations

import click
import pytest
from small_artifacts import details_of

from fp8pipe.artifact import ArtifactWriter
from fp8pipe.cli.serve import serve_command
from fp8pipe.core.errors import ConfigurationError
from validation.bench.check import serve_check
from validation.bench.record import ServeCheckConfig


def test_the_form_of_serving_is_given_as_serve_takes_it():
    form = {"dtype": "float16", "max_model_len": 64, "enforce_eager": False, "kv_cache_gib": 2}
    config = ServeCheckConfig(**form, extra=("--swap-space", "1"), tokens=3)
    with click.Context(serve_command) as context:
        serve_command.parse_args(context, ["export", *config.options()])
    assert {name: context.params[name] for name in form} == form
    assert context.params["extra"] == config.extra
    assert ServeCheckConfig(tokens=3).options() == []


def test_a_vision_export_has_no_form(tmp_path):
    with ArtifactWriter(tmp_path / "export", kind="onnx-export", stage="export") as writer:
        (writer.root / "model.onnx").write_bytes(b"\x4a\x05graph")  # a field that says nothing
        writer.commit(details=details_of("onnx-export"))
    with pytest.raises(ConfigurationError, match="--dtype float16 cannot be given"):
        serve_check(tmp_path / "export", ServeCheckConfig(dtype="float16"))
