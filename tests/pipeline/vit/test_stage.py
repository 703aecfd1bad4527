"""The stage and its command on a tiny model: what the artifact holds, and what users get wrong."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from forked import forked
from PIL import Image
from rebuilt_here import rebuild_here
from vit_families import family, vision_family

from calibration.image_set import ImageSet
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.kinds import Accuracy
from fp8pipe.cli import main
from fp8pipe.cli.tune import quantize_vit_command
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.quantized import load_quantized
from fp8pipe.models.vision.sources import load_vision_model, save_vision_model
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.stage import begin_student, quantize_vit


@pytest.fixture
def model(tmp_path):
    save_vision_model(vision_family(family("timm-vit")), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def _rebuilt_here(monkeypatch):
    """A fresh process costs seconds a run, and `test_blocks` and `test_the_command_writes_the_artifact` start it."""
    rebuild_here(monkeypatch)


def settings(model: Path, **changes: object) -> QuantizeVitConfig:
    values = {
        "model": str(model), "bits": "w4a4", "images": 8,
        "synthesis": {"steps": 2, "batch_size": 4}, "distill": {"steps": 3, "batch_size": 4, "save_every": 1},
    }  # fmt: skip
    return build_config(QuantizeVitConfig, values | changes)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (50, 50), (40 * index, 90, 200)).save(folder / name / f"{index}.png")
    return folder


def test_the_artifact_rebuilds_the_model_and_holds_its_images(model, pictures, tmp_path):
    artifact = quantize_vit(settings(model, evaluate=str(pictures)), tmp_path / "out")
    manifest = open_artifact(artifact.root, kind="vit").manifest
    by_name = {gate.name: gate for gate in manifest.gates}
    assert by_name["logits differing after a fresh process"].value == 0
    assert by_name["weights with too many codes"].value == 0
    assert manifest.details.accuracy.images == 6
    assert isinstance(manifest.details.accuracy, Accuracy)
    images = ImageSet.load(artifact.root / "calibration")
    assert len(images.images) == 8
    quantized = load_quantized(artifact.root)
    assert torch.isfinite(quantized(quantized.preprocessing.normalize(images.images))).all()
    assert len((artifact.root / "metrics.jsonl").read_text().splitlines()) == 3
    assert not list(artifact.root.glob("*checkpoint*"))
    assert not list(artifact.root.glob("*.partial"))


@pytest.mark.parametrize("calibration", ["gaussian", "patch-similarity", "images"])
def test_other_images_serve_too(calibration, model, pictures, tmp_path):
    spec = f"images:{pictures}" if calibration == "images" else calibration
    artifact = quantize_vit(settings(model, calibration=spec, images=6, bits="wfp8afp8"), tmp_path / "out")
    assert artifact.manifest.details.image_method == calibration
    assert artifact.manifest.details.precision == "wfp8afp8"


def test_bits_by_sensitivity_are_those_of_the_artifact(model, tmp_path):
    artifact = quantize_vit(
        settings(model, bits="w3a3", allocation="sensitivity", calibration="gaussian"), tmp_path / "out"
    )
    assert artifact.manifest.details.allocation == "sensitivity"
    entries = json.loads((artifact.root / "quantizers.json").read_text())["activations"].values()
    widths = {(entry["high"] - entry["low"]).bit_length() for entry in entries}
    assert len(widths - {8}) > 1
    assert widths <= {2, 3, 4, 5, 8}


def test_made_images_are_measured_on_views_and_pictures_as_they_are(model, pictures, tmp_path, monkeypatch):
    measured = []

    def begin(config, vision, structure, pixels):
        measured.append(pixels)
        return begin_student(config, vision, structure, pixels)

    monkeypatch.setattr("pipeline.vit.stage.begin_student", begin)
    plain = {"steps": 0, "augment": False}
    for name, changes in (
        ("made", {"calibration": "gaussian"}),
        ("reused", {"calibration": f"artifact:{tmp_path / 'made'}"}),
        ("as made", {"calibration": f"artifact:{tmp_path / 'made'}", "distill": plain}),
        ("own", {"calibration": f"images:{pictures}", "images": 6}),
        ("own again", {"calibration": f"artifact:{tmp_path / 'own'}", "images": 6}),
    ):
        quantize_vit(settings(model, **({"distill": {"steps": 0}} | changes)), tmp_path / name)
    kept = [ImageSet.load(tmp_path / name / "calibration").images for name in ("made", "own")]
    made, shown = (load_vision_model(str(model)).preprocessing.normalize(images) for images in kept)
    assert not torch.equal(measured[0], made)
    assert torch.equal(measured[1], measured[0])
    assert torch.equal(measured[2], made)
    assert torch.equal(measured[3], shown)
    assert torch.equal(measured[4], shown)


def test_a_backbone_says_what_took_the_place_of_classes(tmp_path):
    save_vision_model(vision_family(family("timm-dinov2")), tmp_path / "model")
    artifact = quantize_vit(settings(tmp_path / "model"), tmp_path / "out")
    assert any("backbone" in warning for warning in artifact.manifest.warnings)


def test_classes_that_do_not_match_are_refused_before_anything_is_made(model, pictures, tmp_path):
    (pictures / "ant").rename(pictures / "zebra")
    with pytest.raises(ConfigurationError, match="not classes") as caught:
        quantize_vit(settings(model, evaluate=str(pictures)), tmp_path / "out")
    assert "zebra" in str(caught.value.why)
    assert not (tmp_path / "out.partial").exists()


def test_a_broken_picture_is_refused_before_anything_is_made(model, pictures, tmp_path):
    (pictures / "bee" / "2.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ConfigurationError, match=r"2\.png cannot be read"):
        quantize_vit(settings(model, evaluate=str(pictures)), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ("images:{}/nowhere", "not an image folder"),
        ("images:{}/pictures", "too few pictures"),
        ("artifact:{}/nowhere", "holds no calibration images"),
        ("artifact:{}/model", "holds no calibration images"),
    ],
)
def test_images_that_are_not_there_leave_nothing_behind(calibration, said, model, pictures, tmp_path):
    with pytest.raises(ConfigurationError, match=said):
        quantize_vit(settings(model, calibration=calibration.format(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_pictures_for_calibration_need_no_classes(model, pictures, tmp_path):
    calm = {"calibration": f"images:{pictures / 'ant'}", "images": 3, "distill": {"steps": 0}}
    artifact = quantize_vit(settings(model, **calm), tmp_path / "out")
    assert ImageSet.load(artifact.root / "calibration").labels is None


_KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_stage import quantize_vit, settings
long = {"distill": {"steps": 16, "batch_size": 4, "save_every": 1}}
quantize_vit(settings(Path(sys.argv[2]), **long), Path(sys.argv[3]), resume=True)
"""


def test_a_killed_run_resumes_to_the_same_bits(model, tmp_path):
    long = {"distill": {"steps": 16, "batch_size": 4, "save_every": 1}}
    whole = quantize_vit(settings(model, **long), tmp_path / "whole")
    command = ("-c", _KILLED, str(Path(__file__).parent), str(model), str(tmp_path / "out"))
    kills = 0
    for step in (2, 9):
        process = forked(*command)
        mark = tmp_path / "out.partial" / "checkpoints"
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if any(int(p.name.removeprefix("step-")) >= step for p in mark.glob("step-*")):
                break
            time.sleep(0.005)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills
    resumed = quantize_vit(settings(model, **long), tmp_path / "out", resume=True)
    for name in ("model.safetensors", "quantizers.json"):
        assert (resumed.root / name).read_bytes() == (whole.root / name).read_bytes()


def test_resuming_with_other_options_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.vit.stage.deploy", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_vit(settings(model), tmp_path / "out")
    with pytest.raises(ConfigurationError, match="another configuration"):
        quantize_vit(settings(model, seed=1), tmp_path / "out", resume=True)


def run(*arguments: object) -> tuple[int, dict]:
    result = CliRunner().invoke(main, [str(a) for a in (*arguments, "--json")])
    return result.exit_code, json.loads(result.stdout) if result.stdout.strip() else {}


def test_the_command_writes_the_artifact(model, tmp_path, monkeypatch):
    monkeypatch.undo()
    code, document = run(
        "quantize-vit", "--model", model, "--bits", "w4a8", "--output", tmp_path / "out", "--images", 4,
        "--synthesis-steps", 1, "--distill-steps", 1,
    )  # fmt: skip
    assert code == 0
    assert document["precision"] == "w4a8"
    assert open_artifact(tmp_path / "out").manifest.config["synthesis"]["steps"] == 1


def test_a_dry_run_writes_nothing(model, tmp_path):
    few = ("--images", 4, "--synthesis-steps", 1, "--distill-steps", 1)
    code, document = run(
        "quantize-vit", "--model", model, "--bits", "w4a8", *few, "--output", tmp_path / "out", "--dry-run"
    )
    assert code == 0
    assert document["plan"]["linears"] > 0
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "wrong",
    [
        ("--bits", "w1a8"), ("--bits", "w4a9"), ("--bits", "int4"), ("--images", 0), ("--calibration", "noise"),
        ("--calibration", "images:/nowhere"), ("--model", "/nowhere"), ("--evaluate", "/nowhere"),
    ],
    ids=lambda wrong: " ".join(map(str, wrong)),
)  # fmt: skip
def test_bad_input_ends_with_10_and_a_reason(wrong, model, tmp_path):
    arguments = {"--model": model, "--bits": "w4a4", "--output": tmp_path / "out", "--images": 2} | dict([wrong])
    code, document = run("quantize-vit", *(x for pair in arguments.items() for x in pair), "--synthesis-steps", 1)
    assert code == 10
    assert document["error"]["what"]
    assert not (tmp_path / "out").exists()


def test_help_repeats_the_defaults_of_the_configuration():
    fields = QuantizeVitConfig.model_fields
    config = build_config(QuantizeVitConfig, {"model": "m", "bits": "w4a4"})
    shown = {option.name: option.help or "" for option in quantize_vit_command.params if hasattr(option, "help")}
    for name in ("calibration", "images", "edges", "seed"):
        assert f"[default: {fields[name].default}" in shown[name]
    assert f"[default: {config.synthesis.steps}" in shown["synthesis__steps"]
    assert f"[default: {config.distill.steps}" in shown["distill__steps"]


@pytest.mark.parametrize("given", ["0", "-3", "32x", "axb", "32x32x3", "99999", ""])
def test_image_sizes_that_are_none(given: str):
    with pytest.raises(ConfigurationError, match="quantize-vit settings") as caught:
        settings(Path("model"), image_size=given)
    assert "write 224, or HEIGHTxWIDTH" in caught.value.why


def test_the_image_size_that_was_asked_for(model, tmp_path):
    assert settings(model, image_size=32).image_size == "32x32"
    assert settings(model, image_size="96 x 32").size == (96, 32)
    assert settings(model).size is None
    with pytest.raises(ConfigurationError, match="reads images of 32x48 pixels"):
        quantize_vit(settings(model, image_size=64), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
