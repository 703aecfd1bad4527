"""The option models: importable without torch, and each field a flag or known to be the file's alone."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from exporters.target import targets
from exporters.tensorrt.target import TrtExportOptions
from fp8pipe.cli import LazyGroup
from fp8pipe.cli.options import options_of
from fp8pipe.core.config import FrozenConfig
from pipeline.finetune.config import FinetuneConfig
from pipeline.vit.config import QuantizeVitConfig
from serving.config import LanguageConfig, ServeConfig, VisionConfig
from validation.bench.record import BenchConfig, ServeCheckConfig
from validation.tasks.record import EvaluateConfig

# By model, what stands in --config alone, besides what is nested.
CONFIG_ONLY: dict[type[FrozenConfig], set[str]] = {
    FinetuneConfig: {
        "weight_decay", "beta2", "clip_norm", "heldout_limit", "keep_checkpoints", "gradient_batches",
        "final_merge_batches", "dtype",
    },
    QuantizeVitConfig: {"rounding", "synthesis", "conditioning", "distill"},
    ServeConfig: set(),
    VisionConfig: set(),
    LanguageConfig: {"extra", "supervision"},
    BenchConfig: set(),
    ServeCheckConfig: {"extra"},
    EvaluateConfig: {"extra"},
    **{target.options: {"force"} for target in targets()},
    TrtExportOptions: {"force", "enterprise"},
}  # fmt: skip
NESTED = {
    QuantizeVitConfig: {"synthesis.steps": "synthesis-steps", "distill.steps": "distill-steps"},
    LanguageConfig: {"supervision.engine_timeout_s": "engine-timeout-s"},
    TrtExportOptions: {
        "enterprise.workspace_mib": "workspace", "enterprise.version_compatible": "version-compatible",
    },
}  # fmt: skip
OTHER_NAMES = {
    "batches": "batch", "prompts": "prompt", "cors_origins": "cors-origin", "certificates": "certificate",
    "compute_capabilities": "compute-capability", "max_shard_bytes": "max-shard-size",
}  # fmt: skip
COMMANDS = {
    "finetune": (FinetuneConfig,), "quantize-vit": (QuantizeVitConfig,), "bench": (BenchConfig,),
    "serve": (VisionConfig, LanguageConfig), "serve-check": (ServeCheckConfig,),
    "evaluate": (EvaluateConfig,),
}  # fmt: skip


@pytest.mark.parametrize("model", CONFIG_ONLY)
def test_every_field_is_a_flag_or_the_files_alone(model):
    flags = {option.path: option.flag for option in options_of(model)}
    expected = {name: OTHER_NAMES.get(name, name.replace("_", "-")) for name in model.model_fields}
    expected = {name: flag for name, flag in expected.items() if name not in CONFIG_ONLY[model]}
    assert flags == expected | NESTED.get(model, {})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_its_models_options_with_their_help(name):
    command = LazyGroup().get_command(click.Context(click.Group()), name)
    assert command is not None
    given = {option.name: option for option in command.params if isinstance(option, click.Option)}
    for model in COMMANDS[name]:
        for option in options_of(model):
            made = given[option.parameter]
            assert f"--{option.flag}" in made.opts
            assert option.help() in (made.help or "")
            assert made.default is None  # or it would win over the file's value
            if isinstance(option.kind[0], tuple):
                assert isinstance(made.type, click.Choice)


def test_no_model_needs_torch():
    imports = "; ".join(f"import {model.__module__}" for model in CONFIG_ONLY)
    code = f"import sys; {imports}; print([name for name in ('torch', 'numpy', 'onnx') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
