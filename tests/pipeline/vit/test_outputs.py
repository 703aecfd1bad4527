"""Models whose outputs are no choice of one class: what is distilled, judged and refused, and how a command ends."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.nn import functional
from vision_checkpoints import save_transformers
from vit_families import family, vision_family

from fp8pipe.artifact import Verdict, none_of, open_artifact
from fp8pipe.cli import main
from fp8pipe.models.vision.sources import save_vision_model
from pipeline.vit.losses import distillation, label_distillation, value_distance

_FEW = ("--images", 8, "--distill-steps", 1, "--calibration", "gaussian")


@pytest.fixture(autouse=True)
def _rebuilt_here(monkeypatch):
    """A fresh process costs seconds a run, and `test_blocks` starts it."""
    monkeypatch.setattr("pipeline.vit.deploy.rebuild_gate", lambda *_: none_of("rebuilt in a fresh process", 0))


def run(model, output, *options):
    arguments = ("quantize-vit", "--model", model, "--output", output, *_FEW, *options)
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "changes",
    [
        {"problem_type": "multi_label_classification"}, {"problem_type": "regression", "num_labels": 3},
        {"num_labels": 1},
    ],
    ids=["labels", "values", "one"],
)  # fmt: skip
def test_outputs_are_judged_where_no_class_is_chosen(changes, tmp_path):
    save_transformers(tmp_path / "model", "hf-deit", **changes)
    good = run(tmp_path / "model", tmp_path / "my good", "--bits", "w8a8")
    assert good.exit_code == 0, good.output
    root = tmp_path / "my good"
    assert f"next: fp8pipe export '{root}' --target onnx --output '{root}-onnx'" in good.stdout
    bad = run(tmp_path / "model", tmp_path / "bad", "--bits", "w2a2", "--edges", "same")
    assert bad.exit_code == 14, bad.output
    assert "next:" not in bad.output
    for name, passed in (("my good", True), ("bad", False)):
        gates = {gate.name: gate for gate in open_artifact(tmp_path / name).manifest.gates}
        gate = gates["agreement with the teacher's outputs"]
        assert gate.passed is passed
        assert "top-1 agreement with the teacher" not in gates
        assert passed or gate.verdict is Verdict.REGRESSION
    assert "agreement with the teacher's outputs" in bad.stderr


def test_a_model_that_overflows_agrees_with_nothing(tmp_path):
    """Finite weights, and answers that are not: NaN on both sides is no agreement."""
    save_vision_model(vision_family(family("timm-vit")), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["head.weight"] *= 3e38
    save_file({k: v.clamp(-3e38, 3e38) for k, v in weights.items()}, tmp_path / "model" / "model.safetensors")
    ended = run(tmp_path / "model", tmp_path / "out", "--bits", "w8a8", "--distill-steps", 0, "--json")
    assert ended.exit_code == 14, ended.output
    document = json.loads(ended.stdout)
    gate = next(gate for gate in document["gates"] if gate["name"].startswith("top-1 agreement"))
    assert gate["value"] == 0
    assert document["error"]["exit_code"] == 14
    assert (tmp_path / "out" / "manifest.json").is_file()  # kept for a look


def test_pictures_have_no_class_where_the_model_chooses_none(tmp_path):
    save_transformers(tmp_path / "model", "hf-deit", num_labels=1)
    (tmp_path / "pictures" / "LABEL_0").mkdir(parents=True)
    ended = run(tmp_path / "model", tmp_path / "out", "--bits", "w8a8", "--evaluate", tmp_path / "pictures")
    assert ended.exit_code == 10
    assert "a single label" in ended.stderr


def test_labels_are_distilled_each_by_itself():
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=random, dtype=torch.float64) * 3 for _ in range(2))
    found = label_distillation(student, teacher, 2.0)
    # Of one label: the divergence of the two outcomes' softmax.
    pairs = [torch.stack((x / 2, torch.zeros_like(x)), -1).flatten(0, 1) for x in (student, teacher)]
    oracle = functional.kl_div(
        pairs[0].log_softmax(1), pairs[1].log_softmax(1), reduction="sum", log_target=True
    )  # fmt: skip
    assert float(found) == pytest.approx(float(oracle) / 4 * 4, rel=1e-5)
    assert float(label_distillation(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    one = teacher[:, :1]
    assert float(distillation(student[:, :1], one, 2.0)) == 0  # a softmax of one output teaches nothing
    assert float(label_distillation(student[:, :1], one, 2.0)) > 0


def test_values_are_distilled_on_the_scale_of_the_images():
    teacher = torch.tensor([[100.0], [104.0]])
    assert float(value_distance(torch.full((2, 1), 102.0), teacher)) == pytest.approx(1)  # knows no image
    assert float(value_distance(10 * teacher, 10 * teacher + 10)) == pytest.approx(0.25)
    assert float(value_distance(torch.tensor([[50.0]]), torch.tensor([[100.0]]))) == pytest.approx(0.25)
