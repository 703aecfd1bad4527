"""The bounds for the form that serves, in a real vLLM: right models of many seeds stay within them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import usual
from held_weights import held_weights
from tiny_checkpoints import FORMATS, make_model, write_fp8
from torch import Tensor

from exporters.vllm.environment import find_vllm_python, last_lines
from exporters.vllm.form import ServingForm
from fp8pipe.core.errors import MissingCapabilityError
from validation.vllm.launcher import PROBE, ProbeJob
from validation.vllm.reference import Reference, Text, served_figures

SEEDS = range(usual(2, long=15))
HOST = Path(__file__).parents[2] / "serving" / "vllm_plugin" / "engine_host.py"
FORM = next(form for form in FORMATS if form.name == "ct-channel-dynamic")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def sequences(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[int(t) for t in torch.randint(0, 256, (48,), generator=generator)] for _ in range(4)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str, dict[str, Tensor], Path, Any]]:
    """Seed, rounding of activations, exact weights, checkpoint and the probe's result: all engines in one process."""
    try:
        python = find_vllm_python()
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("noise")
    form, cases, jobs = ServingForm(enforce_eager=True), [], []
    for seed in SEEDS:
        exact = write_fp8(root / str(seed), make_model(seed), FORM)
        for activations in ("none", "quant"):
            job = ProbeJob(str(root / str(seed)), form.arguments(), {}, sequences(seed), variables={})
            extra = {"dump": str(root), "result": str(root / "result.json")}
            jobs.append({**asdict(job), **extra, "environment": {"FP8PIPE_VLLM_ACTIVATIONS": activations}})
            cases.append((seed, activations, exact, root / str(seed)))
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    with (root / "log").open("wb") as log:
        command = [str(python), "-P", str(HOST), str(PROBE), str(root / "jobs.json")]
        env = form.variables(VLLM_ENABLE_V1_MULTIPROCESSING="0")
        subprocess.run(command, stdout=log, stderr=log, env=env, check=False, timeout=3600)
    assert (root / "result.json").is_file(), last_lines(root / "log", 60)
    results = json.loads((root / "result.json").read_text(encoding="utf-8"))
    return [(*case, result) for case, result in zip(cases, results, strict=True)]


def test_right_models_are_within_the_bounds(runs: list[tuple[int, str, dict[str, Tensor], Path, Any]]) -> None:
    worst = {"none": 0.0, "quant": 0.0}
    for seed, activations, exact, place, result in runs:
        assert "error" not in result, result
        reference = Reference(place, held_weights(exact))
        texts = [Text.of(ids) for ids in sequences(seed)]
        true = reference.logprobs(texts)
        names = [name for name, _ in reference.model.named_modules() if name.endswith("_proj")]
        reference.take_form(torch.bfloat16, names if activations == "quant" else ())
        form = reference.logprobs(texts)
        figures = served_figures(true, form, result["logprobs"])
        part = max(figures["engine_kl"], figures["form_kl"]) / figures["bound_kl"]
        print(seed, activations, part, figures)
        worst[activations] = max(worst[activations], part)
        assert figures["decided_otherwise"] == 0, (seed, activations, figures)
    assert max(worst.values()) < 1, worst
    print("worst part of the bound:", worst)
